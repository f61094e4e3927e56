"""GroupNorm with one group and exact GELU in one operation."""

from __future__ import annotations

import torch

from .. import image_norm, registry
from . import ops, reference


def group_norm_gelu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, *, impl: str | None = None
) -> torch.Tensor:
    """GroupNorm over (C, H, W) of each sample, then the exact (erf) GELU: what follows each convolution of the stem.

    Sources: Wu and He, "Group Normalization", 2018; Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.

    Args:
        x: (B, C, H, W) floating point. Contiguous and channels_last memory are read as they are, other strides are
            copied first.
        weight: (C,) scale of each channel, of x's dtype or wider.
        bias: (C,), likewise.
        eps: added to the variance.
        impl: see ``mimdet.kernels.selector``.

    Returns:
        (B, C, H, W) in x's dtype and memory format. Statistics and arithmetic are float32; only x and the statistics
        are kept for backward. Results repeat bitwise, whatever the number of threads.

    Raises:
        TypeError: an argument that is not of a floating point dtype.
        ValueError: an argument of another rank, size or device.
        KernelUnavailableError: ``impl`` names what cannot run.
    """
    image_norm.check(ops.NAME, x, weight, bias)
    impl = registry.choose(ops.NAME, impl, x.device.type, x.dtype)
    if impl == "eager":
        return reference.group_norm_gelu(x, weight, bias, eps)
    return torch.ops.mimdet.group_norm_gelu(x, weight, bias, eps, impl)[0]
