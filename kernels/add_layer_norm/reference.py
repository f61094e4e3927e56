"""Residual addition and LayerNorm in plain PyTorch: what every implementation is measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def add_layer_norm(
    residual: torch.Tensor,
    x: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual_out = residual + scale * x in residual's dtype, and its LayerNorm in ``dtype``."""
    if x is not None:
        if scale is not None:
            x = x * scale.view(-1, 1, 1)
        residual = (residual + x).to(residual.dtype)
    wide = torch.promote_types(residual.dtype, weight.dtype)
    y = F.layer_norm(residual.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)
    return residual, y.to(dtype)
