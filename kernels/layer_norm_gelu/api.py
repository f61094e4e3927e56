"""Channel-wise LayerNorm and exact GELU in one operation."""

from __future__ import annotations

import torch

from .. import image_norm
from . import ops, reference


def layer_norm_gelu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    *,
    sizes: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """LayerNorm over the channels of each position, then the exact (erf) GELU.

    Sources: Ba, Kiros and Hinton, "Layer Normalization", 2016; Hendrycks and Gimpel, "Gaussian Error Linear Units",
    2016.

    Args:
        x: (B, C, H, W) floating point. Contiguous and channels_last memory are read as they are, other strides are
            copied first.
        weight: (C,) scale of each channel, of x's dtype or wider.
        bias: (C,), likewise.
        eps: added to the variance.
        sizes: (B, 2) int32 or int64 on x's device, rows and columns of each sample's valid area, which begins at its
            top left: 1 .. H and 1 .. W (MIMDET_DEBUG_KERNELS=1 checks). Only positions in the area are normed.
            Padding may hold anything, NaN too; the result and the gradient of x are zero there. None: everything is
            valid.
        impl: see ``mimdet.kernels.dispatch``.

    Returns:
        (B, C, H, W) in x's dtype and memory format. Statistics and arithmetic are float32; backward needs only x and
        the statistics. Results repeat bitwise, whatever the number of threads.

    Raises:
        TypeError: an argument that is not of a floating point dtype, or sizes that are not int32 or int64.
        ValueError: an argument of another rank, size or device; while debugging, sizes outside of their range
            (RuntimeError from cpp, always).
        KernelUnavailableError: ``impl`` names what cannot run.
    """
    return image_norm.run(ops.NAME, reference.layer_norm_gelu, x, weight, bias, eps, sizes, impl)
