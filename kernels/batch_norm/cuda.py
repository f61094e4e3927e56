"""Batch norm and ReLU on a GPU through CUDA C++: scratch, and how many cells one block takes."""

from __future__ import annotations

import torch

from ..library import call_cuda

# Parts that the cells of a channel should be cut into, and the fewest cells of a part.
_PARTS = 512
_LEAST = 64


def launch_batch_norm_moments(x, sizes, nhwc, moments):
    """Fill moments (2 * C + 1,) float32 from dense x (N, C, H, W); sizes (N, 2) int32 or None."""
    count, step = _parts(x, nhwc)
    scratch = torch.empty((count, x.shape[1], 4), dtype=torch.float32, device=x.device)
    call_cuda("batch_norm_moments", x, sizes, nhwc, moments, scratch, sizes=(*x.shape, count, step), typed=(x,))


def launch_batch_norm_statistics(parts, eps, unbiased, statistics):
    """Fill statistics (3 * C + 1,) from dense parts (P, 2 * C + 1), both float32."""
    call_cuda("batch_norm_statistics", parts, eps, unbiased, statistics, sizes=(len(parts), parts.shape[1] // 2))


def launch_batch_norm_fwd(x, weight, bias, mean, rstd, sizes, relu, nhwc, y):
    """Fill y (as x) from dense x (N, C, H, W), float32 (C,) parameters, sizes (N, 2) int32 or None."""
    arguments = x, weight, bias, mean, rstd, sizes, relu, nhwc, y
    call_cuda("batch_norm_fwd", *arguments, sizes=tuple(x.shape), typed=(x,))


def launch_batch_norm_sums(dy, x, weight, bias, mean, rstd, sizes, relu, nhwc, sums):
    """Fill sums (2, C) float32; dy and x dense with the same strides."""
    count, step = _parts(x, nhwc)
    parts = torch.empty((count, 2, x.shape[1]), dtype=torch.float32, device=x.device)
    arguments = dy, x, weight, bias, mean, rstd, sizes, relu, nhwc, sums, parts
    call_cuda("batch_norm_sums", *arguments, sizes=(*x.shape, count, step), typed=(x,))


def launch_batch_norm_bwd(dy, x, weight, bias, mean, rstd, means, sizes, relu, nhwc, dx):
    """Fill dx (as x) from means (2, C) float32; dy and x dense with the same strides."""
    arguments = dy, x, weight, bias, mean, rstd, means, sizes, relu, nhwc, dx
    call_cuda("batch_norm_bwd", *arguments, sizes=tuple(x.shape), typed=(x,))


def _parts(x: torch.Tensor, nhwc: bool) -> tuple[int, int]:
    """Parts of all cells, and cells of a part. A block of NCHW maps has one channel, so there are fewer of them."""
    cells = x.shape[0] * x.shape[2] * x.shape[3]
    step = max(_LEAST, -(-cells // _PARTS)) if nhwc else max(2048, -(-cells // 32))
    return -(-cells // step), step
