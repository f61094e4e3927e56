"""Bias and exact GELU in plain PyTorch: what every implementation is measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def bias_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``0.5 * z * (1 + erf(z / sqrt(2)))`` with ``z = x + bias``, in x's dtype."""
    return F.gelu(x + bias).to(x.dtype)
