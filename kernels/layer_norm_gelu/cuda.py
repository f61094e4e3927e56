"""Channel-wise LayerNorm and exact GELU on a GPU through CUDA C++."""

from __future__ import annotations

import torch

from ..library import call_cuda

# The most blocks whose partial gradients are summed.
_PARTS = 1024


def launch_layer_norm_gelu_fwd(x, weight, bias, sizes, eps, nhwc, y, mean, rstd):
    """Fill y (as x), mean and rstd (B, H, W) float32 from dense x (B, C, H, W), weight and bias (C,) float32."""
    arguments = x, weight, bias, sizes, eps, nhwc, y, mean, rstd
    call_cuda("layer_norm_gelu_fwd", *arguments, sizes=tuple(x.shape), typed=(x,))


def launch_layer_norm_gelu_bwd(dy, x, weight, bias, sizes, mean, rstd, nhwc, dx, dparameters):
    """Fill dx (as x), dparameters (2, C) float32, of bias and of weight; dy and x dense with the same strides."""
    sums = torch.empty((_PARTS, 2, x.shape[1]), dtype=torch.float32, device=x.device)
    arguments = dy, x, weight, bias, sizes, mean, rstd, nhwc, sums, dx, dparameters
    call_cuda("layer_norm_gelu_bwd", *arguments, sizes=(*x.shape, _PARTS), typed=(x,))
