"""Channel-wise LayerNorm and exact GELU in one operation."""

from __future__ import annotations

from torch import Tensor

from .. import image_norm
from . import ops, reference


def layer_norm_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, sizes: Tensor | None = None, impl: str | None = None
) -> Tensor:
    """LayerNorm over the channels of each position, then the exact (erf) GELU.

    Sources: Ba, Kiros and Hinton, "Layer Normalization", 2016; Hendrycks and Gimpel, "Gaussian Error Linear Units",
    2016.

    Arguments, result and errors are those of ``group_norm_gelu``; statistics are those of each position, so that with
    ``sizes`` only positions in the valid areas are normed.
    """
    return image_norm.run(ops.NAME, reference.layer_norm_gelu, x, weight, bias, eps, sizes, impl)
