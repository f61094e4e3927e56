"""Compiles Triton kernels ahead of time, without a GPU; the work is that of ``mimdet.bench.machine_code``.

``python tests/support/aot.py`` prints a table of every kernel that the tests compile; it takes pytest's options,
such as ``-k gather``.
"""

import contextlib
import re
import sys
from pathlib import Path
from typing import NamedTuple

from mimdet.bench.machine_code import compile_triton, narrow_products, target
from mimdet.kernels.ahead import Launch, launches

__all__ = [
    "Compiled",
    "Launch",
    "compile_for",
    "compile_pair",
    "count_instructions",
    "instructions",
    "launches",
    "narrow_products",
    "target",
]


class Compiled(NamedTuple):
    """Resources of one kernel compiled for one target; 16-byte loads and stores of global memory, None for AMD."""

    name: str
    target: str
    registers: int
    stack: int
    shared: int
    loads_16: int | None
    stores_16: int | None


# Results of compile_for in this process.
compiled_so_far: list[Compiled] = []


def compile_for(capability, kernel, *arguments, grid=(1,), **constants):
    """Compile one launch for sm_<capability> or "gfx942"; tensors may be on the CPU.

    Returns:
        ``Compiled``, from the resources and the machine code that cuobjdump or the compiler prints.

    Raises:
        AssertionError: an address is computed from a product that may wrap in 32 bits.
    """
    built = compile_triton(capability, Launch(kernel, grid, arguments, constants))
    narrow = narrow_products(built.ttir)
    assert not narrow, f"{built.name}: addresses from 32-bit products that may wrap: {narrow}"
    is_amd = isinstance(capability, str)
    names = ("LDG(?:STS)?", "STG")
    wide = [None if is_amd else len(re.findall(rf"{name}\.E\.(?:\w+\.)*128", built.code)) for name in names]
    arch = capability if is_amd else f"sm_{capability}"
    compiled = Compiled(built.name, arch, built.registers, built.stack, built.shared, *wide)
    compiled_so_far.append(compiled)
    return compiled


def record(op, run, capability=90):
    """Every ``Launch`` of a Triton kernel that ``run()`` would make for ``op`` on sm_<capability>; none runs."""
    from support.kernel_cases import pretend

    with target(capability), pretend("triton", op), launches() as recorded:
        run()
    return recorded


def compile_pair(op, capability, run):
    """``Compiled`` of every Triton kernel that ``run()`` would launch for ``op``; none runs."""
    recorded = record(op, run, capability)
    return [compile_for(capability, one.kernel, *one.arguments, grid=one.grid, **one.constants) for one in recorded]


def resident(launch):
    """How many programs of a launch a multiprocessor of sm_90 holds at once, by its registers, warps and memory."""
    compiled = compile_for(90, launch.kernel, *launch.arguments, grid=launch.grid, **launch.constants)
    warps = launch.constants["num_warps"]
    registers = -(-compiled.registers // 8) * 8 * 32 * warps
    return min(65536 // registers, 64 // warps, 32, 227 * 1024 // (compiled.shared + 1024))


def count_instructions(op, capability, assembly, pattern, run, **options):
    """How often ``pattern`` is in the code of the Triton kernels that ``run()`` would launch for ``op``; none runs.

    Args:
        op, capability, run: as for ``compile_pair``.
        assembly: "ptx" or "amdgcn".
        pattern: regular expression.
        options: of the compiler, in place of those of the launches.
    """
    recorded = record(op, run, capability)
    with target(capability):
        built = [one.kernel.warmup(*one.arguments, grid=one.grid, **one.constants | options) for one in recorded]
    return sum(len(re.findall(pattern, one.asm[assembly])) for one in built)


def instructions(capability, kernel, *arguments, grid=(1,), **constants):
    """Machine instructions of one launch compiled for sm_<capability>, in order, without NOPs."""
    code = compile_triton(capability, Launch(kernel, grid, arguments, constants)).code
    lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(\S[^;]*);", code)
    assert lines, code[-2000:]
    return [instruction for instruction in lines if not instruction.startswith("NOP")]


def table(*options):
    """Markdown, one row per launch that the tests compile; pytest's output goes to stderr.

    Args:
        options: for pytest, such as "-k gather".

    Returns:
        the table, and pytest's exit status.
    """
    import pytest
    from support import aot

    folder = Path(__file__).parent.parent / "kernels"
    with contextlib.redirect_stdout(sys.stderr):
        status = pytest.main(["-q", "-p", "no:cacheprovider", "-k", "compiles", *options, str(folder)])
    rows = [["kernel", "target", "registers", "stack", "shared", "16-byte loads", "16-byte stores"]]
    rows += [["-"] * len(rows[0])]
    # Tests of several shapes may compile the same kernel.
    rows += [list(map(str, kernel)) for kernel in dict.fromkeys(aot.compiled_so_far)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows), status


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    text, exit_status = table(*sys.argv[1:])
    print(text)
    sys.exit(exit_status)
