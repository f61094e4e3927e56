"""Gather of tokens with their position embedding, in plain PyTorch."""

from __future__ import annotations

import torch


def gather_add_pos(x: torch.Tensor, pos: torch.Tensor | None, index: torch.Tensor) -> torch.Tensor:
    """``x[b, index[b, k]] + pos[index[b, k]]``.

    Args:
        x: (B, L, C) tokens.
        pos: (L, C) position embedding, or None for the tokens alone.
        index: (B, K) int32 or int64, rows of ``x``.

    Returns:
        (B, K, C) in the dtype of ``x + pos``.
    """
    batch, length, channels = x.shape
    flat = (index + length * torch.arange(batch, device=x.device)[:, None]).flatten()
    out = x.reshape(batch * length, channels).index_select(0, flat)
    if pos is not None:
        out = out + pos.index_select(0, index.flatten())
    return out.view(*index.shape, channels)
