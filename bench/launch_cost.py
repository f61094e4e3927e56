"""What a launch executes: its machine code walked for some of its blocks, and the sums of the whole grid."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from .gpu_model import Executed, Gpu, tensor_flop
from .machine_code import Binary, Pointer
from .sass import LOADS, REGION, STORES, Code, Walk

_WARP = 32
# Where the sizes of blocks and of the grid are in the constant bank, by the place of the first parameter.
_SIZES = {0x380: (0x360, 0x370)}
_OLDER_SIZES = (0x0, 0xC)
# A grid's blocks are like one another but for its end, and so are a block's warps.
_PLACES = (0.0, 0.35, 0.7)
_MANY_STEPS = 20_000


def execute(
    gpu: Gpu,
    binary: Binary,
    grid: Sequence[int],
    block: Sequence[int],
    values: Sequence[int | None],
    tensors: Mapping[int, int] | None = None,
    contents: Mapping[int, Sequence[int]] | None = None,
) -> Executed:
    """Walk a launch.

    Args:
        grid, block: their sizes, as many as were passed.
        values: of the parameters, integers as the kernel sees their bits; None is unknown.
        tensors: address >> REGION of a tensor -> its bytes.
        contents: address >> REGION -> the 32-bit integers of a tensor that decides about loops.
    """
    code = Code(binary.code)
    grid, block = (tuple(sizes) + (1,) * (3 - len(sizes)) for sizes in (grid, block))
    constants = _constants(binary, grid, block, values)
    contents = contents or {}

    def memory(address: int, size: int) -> int | None:
        words = contents.get(address >> REGION)
        place, rest = divmod(address & ((1 << REGION) - 1), 4)
        return words[place] & 0xFFFFFFFF if words and size == 4 and not rest and place < len(words) else None

    blocks, warps = math.prod(grid), -(-math.prod(block) // _WARP)
    last = blocks - 1

    def walk(program: int, warp: int) -> Walk:
        return code.walk(constants, _special(program, warp, grid, block), memory, gpu.latency)

    programs = sorted({int(last * place) for place in _PLACES if last})
    inner: list[Walk] = []
    for program in programs:
        inner.append(walk(program, 0))
        if sum(inner[-1].executed) < _MANY_STEPS:
            inner += [walk(program, warp) for warp in range(1, warps)]
    outer = [walk(last, warp) for warp in range(warps if not inner or len(inner) > len(programs) else 1)]
    # The last block counts once, the others as often as there are.
    walks = [(last / blocks / len(inner), one) for one in inner] + [(1 / blocks / len(outer), one) for one in outer]
    return _sum(code, walks, blocks * warps, warps, tensors or {})


def _sum(code: Code, walks: Sequence, all_warps: int, warps: int, tensors: Mapping[int, int]) -> Executed:
    total = Executed()
    touched: dict[bool, Counter] = {True: Counter(), False: Counter()}
    unknown: set[int] = set()
    for weight, one in walks:
        for instruction, times in zip(code.instructions, one.executed, strict=True):
            base, count = instruction.base, times * weight
            total.instructions += count
            total.mufu += count * (base == "MUFU")
            total.lds += count * (base in ("LDS", "LDSM"))
            total.barriers += count * (base == "BAR")
            total.tensor += count * (base.endswith("MMA") and base != "HFMA2")
            total.flop += count * tensor_flop(instruction) * warps
        for (index, region), times in one.touched.items():
            instruction = code.instructions[index]
            moved = times * weight * all_warps * _WARP * instruction.bits / 8
            load = instruction.base in LOADS
            assert load or instruction.base in STORES
            (total.loaded if load else total.stored)[instruction.bits] += moved
            touched[load][region] += moved
        total.cycles = max(total.cycles, one.cycles)
        unknown |= one.unknown
    total.unknown = len(unknown)
    written = {region for region in touched[False] if region is not None}
    inputs = {region: size for region, size in tensors.items() if region not in written or region in touched[True]}
    read = {region for region in touched[True] if region is not None}
    outputs = {region: size for region, size in tensors.items() if region not in read or region in written}
    total.minimum_bytes = _least(touched[True], inputs) + _least(touched[False], outputs)
    return total


def _least(touched: Mapping[int | None, float], tensors: Mapping[int, int]) -> float:
    """Bytes that loads, or stores, must move. An address that depends on data may be in any of ``tensors``."""
    known = {region: min(touched.get(region, 0.0), size) for region, size in tensors.items()}
    left = sum(size - known[region] for region, size in tensors.items())
    return sum(known.values()) + min(touched.get(None, 0.0), left)


def parameter_values(pointers_and_numbers: Sequence[Pointer | float | None], sizes: Sequence[int]) -> list[int | None]:
    """Bits of arguments for ``execute``; floating point is unknown to it."""
    values: list[int | None] = []
    for argument, size in zip(pointers_and_numbers, sizes, strict=True):
        if isinstance(argument, Pointer):
            values.append(argument.address)
        elif argument is None or isinstance(argument, float):
            values.append(None)
        else:
            values.append(int(argument) & ((1 << 8 * size) - 1))
    return values


def _constants(binary: Binary, grid: Sequence[int], block: Sequence[int], values: Sequence) -> dict[int, int]:
    first = binary.parameters[0][0] if binary.parameters else 0
    of_block, of_grid = _SIZES.get(first, _OLDER_SIZES)
    words = {
        start + 4 * i: size for start, sizes in ((of_block, block), (of_grid, grid)) for i, size in enumerate(sizes)
    }
    for (offset, size), value in zip(binary.parameters, values, strict=False):
        if value is None:
            continue
        place = offset & ~3
        shifted = value << 8 * (offset & 3)
        for word in range(max(1, -(-(size + (offset & 3)) // 4))):
            words[place + 4 * word] = words.get(place + 4 * word, 0) | (shifted >> 32 * word & 0xFFFFFFFF)
    return words


def _special(program: int, warp: int, grid: Sequence[int], block: Sequence[int]) -> dict[str, int]:
    registers = {"SR_CgaCtaId": 0, "SR_LANEID": 0}
    for name, index, sizes in (("SR_CTAID", program, grid), ("SR_TID", warp * _WARP, block)):
        coordinates = np.unravel_index(index, sizes, order="F")  # x first
        registers |= {f"{name}.{axis}": int(place) for axis, place in zip("XYZ", coordinates, strict=True)}
    return registers
