"""Bias and exact GELU in one pass."""

from __future__ import annotations

import torch

from .. import checks
from ..dispatch import resolve
from . import ops, reference


def bias_gelu(x: torch.Tensor, bias: torch.Tensor, *, impl: str | None = None) -> torch.Tensor:
    """``GELU(x + bias)`` with the exact (erf) GELU: a linear layer's bias and its activation.

    Computed in float32 (float64 for float64). Gradients of first order, which repeat bitwise: the bias's is summed in
    one order, whatever the number of threads. Activation memory is x alone. Source: Hendrycks
    and Gimpel, "Gaussian Error Linear Units", 2016.

    Args:
        x: (..., C) float; any strides.
        bias: (C,) float, of any dtype.
        impl: see ``mimdet.kernels.dispatch``.

    Returns:
        Like x, contiguous.

    Raises:
        TypeError: an argument that is not of a float dtype.
        ValueError: a bias of another length or on another device.
        KernelUnavailableError: ``impl`` names what cannot run.
    """
    checks.tensors(ops.NAME, x=x, bias=bias)
    if x.dim() < 1 or bias.shape != x.shape[-1:]:
        raise ValueError(f"bias_gelu: bias must be (C,) for x (..., C), got {tuple(bias.shape)} for {tuple(x.shape)}")
    impl = resolve(ops.NAME, impl, x.device, (x.dtype,))
    if impl == "eager":
        return reference.bias_gelu(x, bias)
    return ops.run(x, bias if bias.dtype == torch.float32 else bias.float(), impl)
