"""GroupNorm with one group and exact GELU in plain PyTorch: what every implementation is measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..tensors import valid_mask


def group_norm_gelu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, sizes: torch.Tensor | None = None
) -> torch.Tensor:
    """``gelu((x - mean) / sqrt(var + eps) * weight + bias)``, mean and variance over (C, H, W) of each sample.

    With ``sizes`` (B, 2), over each sample's top left rows and columns; zero elsewhere.
    """
    if sizes is None:
        return F.gelu(F.group_norm(x, 1, weight, bias, eps))
    padding = ~valid_mask(sizes, x.shape[2:])[:, None]
    count = x.shape[1] * sizes.prod(1).view(-1, 1, 1, 1)
    inner = x.masked_fill(padding, 0).to(torch.promote_types(x.dtype, torch.float32))
    x_centered = (inner - inner.sum((1, 2, 3), keepdim=True) / count).masked_fill(padding, 0)
    rstd = (x_centered.square().sum((1, 2, 3), keepdim=True) / count + eps).rsqrt()
    normed = x_centered * rstd * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)
    return F.gelu(normed.to(x.dtype)).masked_fill(padding, 0)
