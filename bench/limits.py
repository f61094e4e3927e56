"""The machine's limits, copy bandwidth and GEMM rate, measured in the same run as everything else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch

from .measure import measure, timer_for

_ROUNDS = 10
_LONGEST = 0.5  # seconds of one GEMM


def measure_limits(device: str, dtypes: Iterable[torch.dtype], scale: float = 1.0) -> dict[str, float]:
    """Copy bandwidth and one GEMM rate for each dtype.

    Args:
        device: "cpu" or "cuda".
        dtypes: of the matrices.
        scale: of the buffers' and the matrices' sizes, for tests.

    Returns:
        ``copy_gb_s``, bytes read and written; ``gemm_<dtype>_tflop_s``.
    """
    rates = {gemm_key(dtype): _gemm(device, dtype, scale) for dtype in dtypes}
    return {"copy_gb_s": _copy(device, scale), **rates}


def gemm_key(dtype: torch.dtype) -> str:
    """Name of a dtype's rate in ``measure_limits``."""
    return f"gemm_{str(dtype).removeprefix('torch.')}_tflop_s"


def floor_seconds(limits: Mapping[str, float], dtype: torch.dtype | None, flops: float, moved: float) -> float:
    """Least seconds for this work: the longer of computing in ``dtype`` and of moving bytes."""
    computing = flops / limits[gemm_key(dtype)] / 1e12 if flops else 0.0
    return max(computing, moved / limits["copy_gb_s"] / 1e9)


def _copy(device: str, scale: float) -> float:
    size = int((512 if _is_gpu(device) else 128) * 2**20 * scale)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _least(lambda: target.copy_(source), device) / 1e9


def _gemm(device: str, dtype: torch.dtype, scale: float) -> float:
    largest = int((8192 if _is_gpu(device) and dtype.itemsize < 4 else 4096 if _is_gpu(device) else 1536) * scale)
    timer = timer_for(device)
    for side in (largest // part or 1 for part in (8, 4, 2, 1)):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        run = partial(torch.mm, a, b, out=torch.empty_like(a))
        run()
        # A processor without instructions for the dtype would take minutes for the largest.
        if side == largest or 8 * timer(run, 1) > _LONGEST:
            break
    return 2 * side**3 / _least(run, device) / 1e12


def _is_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


def _least(run, device: str) -> float:
    """Seconds of the fastest round: other programs on the machine only add time."""
    with torch.no_grad():
        timings = measure({"run": run}, _ROUNDS, timer=timer_for(device))
    return min(timings.samples["run"])
