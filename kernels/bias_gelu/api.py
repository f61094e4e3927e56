"""Bias and exact GELU in one pass."""

from __future__ import annotations

import torch

from .. import checks, registry
from . import ops, reference


def bias_gelu(x: torch.Tensor, bias: torch.Tensor, *, impl: str | None = None) -> torch.Tensor:
    """``GELU(x + bias)`` with the exact (erf) GELU: a linear layer's bias and its activation.

    Computed in float32 (float64 for float64). Gradients of first order; the bias's is a sum of one order whatever the
    number of threads, so it repeats bitwise. Backward keeps x alone and computes the GELU's derivative anew.
    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.

    Args:
        x: (..., C) float; any strides.
        bias: (C,) float, of any dtype.
        impl: see ``mimdet.kernels.selector``.

    Returns:
        Like x, contiguous.

    Raises:
        TypeError: an argument that is not of a float dtype.
        ValueError: a bias of another length or on another device.
        KernelUnavailableError: ``impl`` names what cannot run.
    """
    checks.tensors(ops.NAME, x=x, bias=bias)
    for name, tensor in (("x", x), ("bias", bias)):
        if not tensor.is_floating_point():
            raise TypeError(f"bias_gelu: {name} must be of a float dtype, got {tensor.dtype}")
    if x.dim() < 1 or tuple(bias.shape) != (x.shape[-1],):
        raise ValueError(f"bias_gelu: bias must be (C,) for x (..., C), got {tuple(bias.shape)} for {tuple(x.shape)}")
    if bias.device != x.device:
        raise ValueError(f"bias_gelu: bias is on {bias.device}, x on {x.device}")
    impl = registry.choose(ops.NAME, impl, x.device.type, x.dtype)
    if impl == "eager":
        return reference.bias_gelu(x, bias)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return ops.run(rows, bias.float(), impl).view(x.shape)
