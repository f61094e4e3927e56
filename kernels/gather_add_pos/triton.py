"""Gather of tokens with their position embedding on a GPU through Triton."""

from __future__ import annotations

import torch

from ..triton_rows import gather_rows, scatter_rows


def launch_gather_add_pos_fwd(x: torch.Tensor, pos: torch.Tensor | None, index: torch.Tensor, y: torch.Tensor) -> None:
    """x (B, L, C) with contiguous rows, contiguous pos (L, C) and index (B, K) -> y (B, K, C)."""
    gather_rows(x, x, index, pos, y, pos_at_source=True)


def launch_gather_add_pos_bwd(dy: torch.Tensor, index: torch.Tensor, dx: torch.Tensor) -> None:
    """Contiguous dy (B, K, C) and index (B, K) -> into zeros dx (B, L, C)."""
    scatter_rows(dy, index, dx, dx)
