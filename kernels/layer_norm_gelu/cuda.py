"""Channel-wise LayerNorm and exact GELU on a GPU through CUDA C++."""

from __future__ import annotations

import torch

from .. import build
from ..library import CUDA_DTYPES

# The most blocks whose partial gradients are summed.
_PARTS = 1024


def launch_layer_norm_gelu_fwd(x, weight, bias, sizes, eps, nhwc, y, mean, rstd):
    """Fill y (as x), mean and rstd (B, H, W) float32 from dense x (B, C, H, W), weight and bias (C,) float32."""
    tensors = (x, weight, bias, sizes, y, mean, rstd)
    build.call_cuda("layer_norm_gelu_fwd", *tensors, *x.shape, nhwc, eps, CUDA_DTYPES[x.dtype])


def launch_layer_norm_gelu_bwd(dy, x, weight, bias, sizes, mean, rstd, nhwc, dx, dweight, dbias):
    """Fill dx (as x), dweight and dbias (C,) float32; dy and x dense with the same strides."""
    sums = torch.empty((_PARTS, 2, x.shape[1]), dtype=torch.float32, device=x.device)
    tensors = (dy, x, weight, bias, sizes, mean, rstd, sums, dx, dweight, dbias)
    build.call_cuda("layer_norm_gelu_bwd", *tensors, *x.shape, nhwc, _PARTS, CUDA_DTYPES[x.dtype])
