"""Bias and exact GELU in plain PyTorch: what every implementation is measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def bias_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``0.5 * h * (1 + erf(h / sqrt(2)))`` with ``h = x + bias``, in x's dtype."""
    return F.gelu(x + bias).to(x.dtype)
