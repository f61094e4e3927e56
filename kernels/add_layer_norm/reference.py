"""Residual addition and LayerNorm in plain PyTorch: what every implementation is measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def add_layer_norm(
    r: torch.Tensor,
    branch: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``r_new = r + scale * branch`` in r's dtype, ``y = LayerNorm(r_new) * weight + bias`` in ``dtype``."""
    if branch is not None:
        if scale is not None:
            branch = branch * scale.view(-1, 1, 1)
        r = (r + branch).to(r.dtype)
    wide = torch.promote_types(r.dtype, weight.dtype)
    y = F.layer_norm(r.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)
    return r, y.to(dtype)
