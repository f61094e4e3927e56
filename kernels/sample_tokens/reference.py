"""Token sampling in plain PyTorch."""

from __future__ import annotations

import torch


def sample_tokens(noise: torch.Tensor, valid: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """Split each row's L tokens into the ``count`` of smallest noise and the others, both in raster order.

    Padding ranks as infinite noise; equal noise ranks in raster order; NaN ranks last of all.

    Args:
        noise: (B, L) floating point.
        valid: (B, L) bool, False for padding.
        count: tokens to keep, 0 to L.

    Returns:
        keep (B, count), drop (B, L - count), restore (B, L), all int64; ``cat([keep, drop], 1)`` holds token i at
        ``restore[:, i]``.
    """
    index = torch.arange(noise.shape[1], device=noise.device).expand(noise.shape)
    order = noise.masked_fill(~valid, torch.inf).argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, index)
    split = (rank >= count).to(torch.uint8).argsort(dim=1, stable=True)
    restore = torch.empty_like(split).scatter_(1, split, index)
    return split[:, :count].contiguous(), split[:, count:].contiguous(), restore
