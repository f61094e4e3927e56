"""Assembly of the decoder's input, in plain PyTorch."""

from __future__ import annotations

import torch


def scatter_fill(kept: torch.Tensor, fill: torch.Tensor, restore: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
    """``cat([kept, fill], 1)[b, restore[b, i]] + pos[i]``.

    Args:
        kept: (B, K, D) encoded rows.
        fill: (B, L - K, D) rows of the other positions.
        restore: (B, L) int32 or int64, a permutation of 0 .. L - 1 in each row.
        pos: (L, D) position embedding.

    Returns:
        (B, L, D) in the dtype of ``kept + pos``.
    """
    batch, length, channels = *restore.shape, kept.shape[2]
    rows = torch.cat([kept, fill], dim=1).view(batch * length, channels)
    flat = (restore + length * torch.arange(batch, device=kept.device)[:, None]).flatten()
    return rows.index_select(0, flat).view(batch, length, channels) + pos


def scatter_fill_backward(
    grad: torch.Tensor, restore: torch.Tensor, kept_rows: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of both sources: row ``restore[b, i]`` of ``cat([kept, fill], 1)`` receives ``grad[b, i]``.

    Args:
        grad: (B, L, D).
        restore: (B, L) int32 or int64, a permutation of 0 .. L - 1 in each row.
        kept_rows: K.
        dtype: the results'.

    Returns:
        (B, K, D) and (B, L - K, D) in ``dtype``.
    """
    batch, length, channels = grad.shape
    rows = grad.new_empty(batch * length, channels, dtype=dtype)
    flat = (restore + length * torch.arange(batch, device=grad.device)[:, None]).flatten()
    rows.index_copy_(0, flat, grad.reshape(batch * length, channels).to(dtype))
    rows = rows.view(batch, length, channels)
    return rows[:, :kept_rows].contiguous(), rows[:, kept_rows:].contiguous()
