"""Channel-wise LayerNorm and exact GELU in plain PyTorch: what every implementation is measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..tensors import zero_padding


def layer_norm_gelu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, sizes: torch.Tensor | None = None
) -> torch.Tensor:
    """``gelu((x - mean) / sqrt(var + eps) * weight + bias)``, mean and variance over the channels of each position.

    With ``sizes`` (B, 2), zero outside of the top left rows and columns of each sample.
    """
    if sizes is not None:
        return zero_padding(layer_norm_gelu(zero_padding(x, sizes), weight, bias, eps), sizes)
    normed = F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, eps)
    return F.gelu(normed).permute(0, 3, 1, 2)
