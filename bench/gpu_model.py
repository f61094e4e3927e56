"""What a kernel takes on a GPU, from its machine code: the limits of four GPUs, and a model of one launch.

The model is a lower bound. Its terms are the times of what a launch must do, and the longest is its prediction:

- issue: executed instructions over four a clock and multiprocessor
- mufu: special functions (exponentials, reciprocals, roots)
- tensor: matrix products on tensor cores
- memory: each tensor's touched bytes once, over the bandwidth of DRAM
- latency: what one warp takes by itself, times the rounds in which the blocks run

The multiprocessor with the most blocks decides, so grids that fill the GPU partly take longer. Left out are conflicts
of shared memory, pipes that take fewer than four instructions a clock (integers, conversions), caches, clocks that
drop, and terms that do not overlap: kernels reach 80-90 % of it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from .machine_code import Binary
from .sass import Instruction

REGISTERS = 65536  # of a multiprocessor, and 32 bits each
_SCHEDULERS = 4  # each issues one warp instruction in a clock
_MUFU = 16  # lanes a clock and multiprocessor: CUDA C++ programming guide, "Arithmetic Instructions"
_WARP = 32
# Bytes of shared memory that CUDA reserves for each block: CUDA C++ programming guide, "Compute Capabilities".
_RESERVED = 1024


@dataclass(frozen=True)
class Gpu:
    """Limits of one GPU.

    Attributes:
        name: of the product.
        sms: multiprocessors.
        ghz: clock under load.
        gb_s: bandwidth of DRAM.
        tensor_flop: dense 16-bit FLOPs of a multiprocessor's tensor cores in a clock.
        shared: bytes of shared memory of a multiprocessor.
        warps, blocks: most that a multiprocessor holds.
        latency: clocks until a load from DRAM, one from shared memory and a special function have their result.
        source: of these numbers.
    """

    name: str
    sms: int
    ghz: float
    gb_s: float
    tensor_flop: int
    shared: int
    warps: int
    blocks: int
    latency: Mapping[str, int]
    source: str


# Shared memory, warps, blocks: CUDA C++ programming guide, "Technical Specifications per Compute Capability".
# Latencies: Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture" (2024, arXiv 2402.13499),
# which measured an A100, an RTX 4090 and an H100. The B200 has the H100's here, and a special function 18 clocks.
GPUS = {
    "sm_80": Gpu(
        "A100 SXM 80 GB", 108, 1.41, 2039, 2048, 164 * 1024, 64, 32, {"global": 466, "shared": 29, "other": 18},
        "NVIDIA A100 Tensor Core GPU Architecture (whitepaper), and the datasheet of the A100 80 GB",
    ),
    "sm_89": Gpu(
        "L40S", 142, 2.52, 864, 1024, 100 * 1024, 48, 24, {"global": 541, "shared": 30, "other": 18},
        "NVIDIA Ada GPU Architecture (whitepaper), and the datasheet of the L40S",
    ),
    "sm_90": Gpu(
        "H200 SXM", 132, 1.755, 4800, 4096, 228 * 1024, 64, 32, {"global": 479, "shared": 29, "other": 18},
        "NVIDIA H100 Tensor Core GPU Architecture (whitepaper), bandwidth of the datasheet of the H200; the clock is"
        " the boost of the H100 PCIe, for a GPU that computes stays below the SXM's 1.98 GHz",
    ),
    "sm_100": Gpu(
        "B200 SXM", 148, 1.85, 8000, 8192, 228 * 1024, 64, 32, {"global": 479, "shared": 29, "other": 18},
        "NVIDIA Blackwell Architecture (technical brief), datasheet of the HGX B200; the clock follows from its 2.25"
        " dense PFLOP/s",
    ),
}  # fmt: skip


@dataclass
class Executed:
    """Counts of a launch.

    Attributes:
        instructions, mufu, tensor, lds, barriers: that a warp issues, on average.
        flop: of a block, on tensor cores.
        loaded, stored: bits of a lane's access -> bytes of the whole grid, for lanes that are not switched off.
        minimum_bytes: that the grid must move: no more than each tensor has.
        cycles: of the slowest warp that was walked.
        unknown: loops and branches that depend on data, and count once.
    """

    instructions: float = 0.0
    mufu: float = 0.0
    tensor: float = 0.0
    lds: float = 0.0
    barriers: float = 0.0
    flop: float = 0.0
    loaded: Counter[int] = field(default_factory=Counter)
    stored: Counter[int] = field(default_factory=Counter)
    minimum_bytes: float = 0.0
    cycles: int = 0
    unknown: int = 0


@dataclass(frozen=True)
class Prediction:
    """Times in microseconds; ``bound`` names the longest term."""

    minimum_us: float
    predicted_us: float
    bound: str
    waves: float
    warps_per_sm: int


def blocks_per_sm(gpu: Gpu, registers: int, shared: int, warps: int) -> int:
    """Blocks that a multiprocessor holds at once, by registers of a thread, shared bytes and warps of a block."""
    by_registers = gpu.blocks
    if registers:
        # Registers are allocated to warps in units of 256, from the scheduler's quarter of them.
        of_warp = -(-registers * _WARP // 256) * 256
        by_registers = REGISTERS // _SCHEDULERS // of_warp * _SCHEDULERS // warps
    by_shared = gpu.shared // (-(-(shared + _RESERVED) // 128) * 128)
    return max(0, min(gpu.blocks, gpu.warps // warps, by_registers, by_shared))


def predict(gpu: Gpu, binary: Binary, blocks: int, executed: Executed) -> Prediction:
    """Of one launch of so many blocks.

    Raises:
        ValueError: a block does not fit into a multiprocessor.
    """
    held = blocks_per_sm(gpu, binary.registers, binary.shared, binary.warps)
    if not held:
        raise ValueError(f"{binary.name}: a block needs more registers or shared memory than a {gpu.name} has")
    most = math.ceil(blocks / gpu.sms)  # of one multiprocessor
    rounds = math.ceil(blocks / (gpu.sms * held))
    clocks = {
        "issue": most * binary.warps * executed.instructions / _SCHEDULERS,
        "mufu": most * binary.warps * executed.mufu * _WARP / _MUFU,
        "tensor": most * executed.flop / gpu.tensor_flop,
        "latency": rounds * executed.cycles,
    }
    times = {name: clock / (gpu.ghz * 1e3) for name, clock in clocks.items()}
    times["memory"] = executed.minimum_bytes / (gpu.gb_s * 1e3)
    bound = max(times, key=times.get)
    whole = blocks * executed.flop / (gpu.tensor_flop * gpu.sms * gpu.ghz * 1e3)
    waves = blocks / (gpu.sms * held)
    return Prediction(max(times["memory"], whole), times[bound], bound, waves, min(held, most) * binary.warps)


def tensor_flop(instruction: Instruction) -> int:
    """FLOPs that one warp's instruction does on tensor cores; 0 for others.

    Hopper's HGMMA is one instruction of four warps, each of which issues it. Blackwell's tcgen05 has its sizes in
    memory, so it counts as 0. Products of TF32 take twice the time of 16-bit ones, and count so.
    """
    name = instruction.name
    if name.startswith("HGMMA."):
        rows, columns, depth = (int(size) for size in name.split(".")[1].split("x"))
        return 2 * rows * columns * depth // 4 * (2 if ".TF32" in name else 1)
    if instruction.base == "HMMA":
        digits = name.split(".")[1]
        rows, columns, depth = 16, 8, int(digits[3:])
        return 2 * rows * columns * depth * (2 if ".TF32" in name else 1)
    return 0
