"""Main loops of Triton kernels in sm_90's machine code, compiled without a GPU."""

from typing import NamedTuple

from support.aot import record

from mimdet.bench.machine_code import compile_triton
from mimdet.bench.sass import Code


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
    loops = []
    for one in record(op, run):
        binary = compile_triton(90, one)
        code = Code(binary.code)
        names = [[each.name for each in code.instructions[first : last + 1]] for first, last in code.loops]
        body = max(names, key=lambda body: _count(body, "HGMMA"), default=[])
        if _count(body, "HGMMA"):
            counts = [_count(body, start) for start in ("HGMMA", "WARPGROUP.DEPBAR", "MUFU.EX2")]
            loops.append(Loop(binary.name, len(body), *counts, one.constants))
    return loops


def _count(body, start):
    return sum(name.startswith(start) for name in body)
