"""Main loops of Triton kernels in sm_90's machine code, compiled without a GPU."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from support.aot import launches, target
from support.kernel_cases import pretend


class Loop(NamedTuple):
    """The loop of a kernel that has the most matrix products.

    Attributes:
        kernel: its name.
        instructions: number of them.
        products: WGMMA instructions (HGMMA).
        waits: for WGMMA instructions; as many as products if ptxas serialized them.
        exponentials: instructions of the EX2 unit.
        constants: the launch's.
    """

    kernel: str
    instructions: int
    products: int
    waits: int
    exponentials: int
    constants: dict


def main_loops(op, run):
    """``Loop`` of every kernel with WGMMA that ``run()`` would launch for ``op`` on sm_90; none runs."""
    with target(90), pretend("triton", op), launches() as recorded:
        run()
        built = [(one, one.kernel.warmup(*one.arguments, grid=one.grid, **one.constants)) for one in recorded]
    loops = []
    for one, kernel in built:
        bodies = [body for body in _loops(_disassembled(kernel.asm["cubin"])) if _count(body, "HGMMA")]
        if bodies:
            body = max(bodies, key=lambda b: _count(b, "HGMMA"))
            counts = [_count(body, pattern) for pattern in ("HGMMA", "WARPGROUP.DEPBAR", "MUFU.EX2")]
            loops.append(Loop(kernel.metadata.name, len(body), *counts, one.constants))
    return loops


def _count(body, pattern):
    return sum(pattern in line for line in body)


def _disassembled(cubin):
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def _loops(code):
    """Instructions between each backward branch and its label."""
    instructions, labels, loops = [], {}, []
    for line in code.splitlines():
        if label := re.match(r"\s*\.(L\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
            branch = re.search(r"BRA.*\.(L\w+)", instruction[1])
            if branch and branch[1] in labels:
                loops.append(instructions[labels[branch[1]] :])
    return loops
