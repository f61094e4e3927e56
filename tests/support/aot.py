"""Compiles Triton kernels ahead of time, without a GPU.

``python tests/support/aot.py`` prints a table of every kernel that the tests compile; it takes pytest's options,
such as ``-k gather``.
"""

import contextlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple


class Compiled(NamedTuple):
    """Resources of one kernel compiled for one target; 16-byte loads and stores are None for AMD."""

    name: str
    target: str
    registers: int
    stack: int
    shared: int
    loads_16: int | None
    stores_16: int | None


class Launch(NamedTuple):
    """A recorded launch."""

    kernel: object
    grid: tuple[int, ...]
    arguments: tuple
    constants: dict


# Results of compile_for in this process.
compiled_so_far: list[Compiled] = []


def _driver(capability):
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class Absent(DriverBase):
        """A driver of a GPU that is not here."""

        @classmethod
        def is_active(cls):
            return True

        @staticmethod
        def map_python_to_cpp_type(ty):
            return "void*" if ty.startswith("*") else ty

        def __init__(self):
            pass

        def get_current_target(self):
            return GPUTarget("hip", capability, 64) if _is_amd(capability) else GPUTarget("cuda", capability, 32)

        def get_current_device(self):
            return capability  # one device per target, else Triton's cache returns the first target's kernel

        def get_current_stream(self, device):
            return 0

        def get_active_torch_device(self):
            import torch

            return torch.device("cpu")

        def get_benchmarker(self):
            raise RuntimeError("nothing runs here")

    return Absent()


def _is_amd(capability):
    return isinstance(capability, str)


@contextlib.contextmanager
def target(capability):
    """Inside, ``kernel.warmup(...)`` compiles for sm_<capability>, or for AMD's "gfx942"."""
    from triton.runtime.driver import driver

    before = driver._active
    driver.set_active(_driver(capability))
    try:
        yield
    finally:
        driver._active = before


@contextlib.contextmanager
def launches():
    """Inside, Triton kernels are not launched; yields the list of recorded launches."""
    from triton.runtime.jit import JITFunction

    recorded = []
    run = JITFunction.run

    def record(kernel, *arguments, grid, warmup, **constants):
        if warmup:
            return run(kernel, *arguments, grid=grid, warmup=warmup, **constants)
        recorded.append(Launch(kernel, grid, arguments, constants))
        return None

    JITFunction.run = record
    try:
        yield recorded
    finally:
        JITFunction.run = run


def compile_for(capability, kernel, *arguments, grid=(1,), **constants):
    """Compile one launch for sm_<capability> or "gfx942"; tensors may be on the CPU.

    Returns:
        ``Compiled``, from the resources and the machine code that cuobjdump or the compiler prints.

    Raises:
        AssertionError: an address is computed from a product that may wrap in 32 bits.
    """
    with target(capability):
        built = kernel.warmup(*arguments, grid=grid, **constants)
    narrow = narrow_products(built.asm["ttir"])
    assert not narrow, f"{built.metadata.name}: addresses from 32-bit products that may wrap: {narrow}"
    measure = _measure_amd if _is_amd(capability) else _measure_nvidia
    compiled = measure(built, capability)
    compiled_so_far.append(compiled)
    return compiled


def compile_pair(op, capability, run):
    """``Compiled`` of every Triton kernel that ``run()`` would launch for ``op``; none runs."""
    from support.kernel_cases import pretend

    with target(capability), pretend("triton", op), launches() as recorded:
        run()
    return [compile_for(capability, one.kernel, *one.arguments, grid=one.grid, **one.constants) for one in recorded]


def count_instructions(op, capability, assembly, pattern, run, **options):
    """How often ``pattern`` is in the code of the Triton kernels that ``run()`` would launch for ``op``; none runs.

    Args:
        op, capability, run: as for ``compile_pair``.
        assembly: "ptx" or "amdgcn".
        pattern: regular expression.
        options: of the compiler, in place of those of the launches.
    """
    from support.kernel_cases import pretend

    with target(capability), pretend("triton", op), launches() as recorded:
        run()
    with target(capability):
        built = [one.kernel.warmup(*one.arguments, grid=one.grid, **one.constants | options) for one in recorded]
    return sum(len(re.findall(pattern, one.asm[assembly])) for one in built)


def _measure_nvidia(built, capability):
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
        code = subprocess.run([tools / "nvdisasm", file.name], capture_output=True, text=True, check=True).stdout
    usage_match = re.search(r"REG:(\d+)\s+STACK:(\d+)", usage)
    return Compiled(
        built.metadata.name,
        f"sm_{capability}",
        int(usage_match[1]),
        int(usage_match[2]),
        built.metadata.shared,
        len(re.findall(r"LDG\.E\.(?:\w+\.)*128", code)),
        len(re.findall(r"STG\.E\.(?:\w+\.)*128", code)),
    )


def _measure_amd(built, capability):
    code = built.asm["amdgcn"]
    registers, stack = (int(re.search(rf"\.{key}:\s+(\d+)", code)[1]) for key in _AMD_KEYS)
    return Compiled(built.metadata.name, capability, registers, stack, built.metadata.shared, None, None)


_AMD_KEYS = ("vgpr_count", "private_segment_fixed_size")

_INT32 = 2**31
# Largest program ids: limits of CUDA's grid along x, and along y or z.
_PROGRAMS = {"x": _INT32 - 1, "y": 2**16 - 1, "z": 2**16 - 1}
_DEFINITION = re.compile(r"%([\w.$-]+)(?::\d+)? = (?:\"?)([\w.]+)(.*)")
_OPERAND = re.compile(r"%[\w.$#-]+")


def narrow_products(ttir):
    """Names of the addresses in Triton's IR that depend on an int32 product whose factors allow 2**31 or more.

    Every integer has a bound: constants, ranges and program ids their value, arguments and loaded values that of their
    type. Sums are assumed to fit: int32 counts (channels, tokens) are far below 2**31.
    """
    bounds, wrapped, narrow = {}, set(), []
    for line in ttir.splitlines():
        definition = _DEFINITION.search(line.split(" loc(")[0])
        if not definition:
            continue
        name, operation, rest = definition.groups()
        name = f"%{name}"
        operands = [o.split("#")[0] for o in _OPERAND.findall(rest)]
        widest = 2**63 if re.search(r"\bi64\b|xi64>", rest.rsplit(":", 1)[-1]) else _INT32 - 1
        known = [bounds.get(o, widest) for o in operands]
        bound = widest
        if operation == "arith.constant":
            number = re.search(r"(-?\d+)>? :", rest)
            bound = abs(int(number[1])) if number else widest
        elif operation == "tt.make_range":
            bound = int(re.search(r"end = (\d+)", rest)[1])
        elif operation == "tt.get_program_id":
            bound = _PROGRAMS[rest.split()[0]]
        elif operation == "arith.muli":
            bound = known[0] * known[1]
        elif operation in ("arith.addi", "arith.subi"):
            bound = min(sum(known), widest)
        elif operation in ("arith.divsi", "arith.divui"):
            bound = known[0]
        elif operation in ("arith.remsi", "arith.remui", "arith.minsi"):
            bound = min(known)
        elif operation.startswith(("arith.ext", "tt.splat", "tt.expand_dims", "tt.broadcast", "tt.reshape")):
            bound = known[0]
        wraps = operation == "arith.muli" and widest < _INT32 and bound >= _INT32
        passes_on = operation.startswith(("arith.", "tt.splat", "tt.expand_dims", "tt.broadcast", "tt.reshape"))
        wrapped.discard(name)
        if wraps or (passes_on and "cmp" not in operation and wrapped.intersection(operands)):
            wrapped.add(name)
        bounds[name] = min(bound, widest)
        if operation == "tt.addptr" and operands[1] in wrapped:
            narrow.append(name)
    return narrow


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
