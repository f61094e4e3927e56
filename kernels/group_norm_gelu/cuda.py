"""GroupNorm with one group and exact GELU on a GPU through CUDA C++: scratch memory, and the work of one block.

Parts of a sample depend on its size alone, so its result does not depend on the rest of the batch.
"""

from __future__ import annotations

import torch

from ..library import call_cuda

# Elements that a block reads at once, and the most that its counters hold.
_CHUNK = 4096
_MOST = 2**24
# Parts per sample to aim for.
_PARTS = 512


def launch_group_norm_gelu_fwd(x, weight, bias, sizes, eps, nhwc, y, mean, rstd):
    """Fill y (as x), mean and rstd (B,) float32 from dense x (B, C, H, W), weight and bias (C,) float32."""
    per_part = min(_round_up(-(-x[0].numel() // _PARTS), _CHUNK), _MOST)
    parts = -(-x[0].numel() // per_part)
    moments = torch.empty((x.shape[0], parts, 4), dtype=torch.float32, device=x.device)
    arguments = x, weight, bias, sizes, eps, nhwc, moments, y, mean, rstd
    call_cuda("group_norm_gelu_fwd", *arguments, sizes=(*x.shape, parts, per_part), typed=(x,))


def launch_group_norm_gelu_bwd(dy, x, weight, bias, sizes, mean, rstd, nhwc, dx, dparameters):
    """Fill dx (as x), dparameters (2, C) float32, of bias and of weight; dy and x dense with the same strides."""
    batch, channels, height, width = x.shape
    positions = height * width
    # Positions of all channels for a block, or of one channel.
    step = max(16, -(-positions // _PARTS)) if nhwc else _round_up(-(-positions // 16), _CHUNK // 2)
    parts = -(-positions // step)
    sums = torch.empty((batch, parts, 2, channels), dtype=torch.float32, device=x.device)
    totals = torch.empty((batch, 2, channels), dtype=torch.float32, device=x.device)
    means = torch.empty((batch, 2), dtype=torch.float32, device=x.device)
    arguments = dy, x, weight, bias, sizes, mean, rstd, nhwc, sums, totals, means, dx, dparameters
    call_cuda("group_norm_gelu_bwd", *arguments, sizes=(*x.shape, parts, step), typed=(x,))


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
