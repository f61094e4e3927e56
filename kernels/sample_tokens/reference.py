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
    rank = _inverse(noise.masked_fill(~valid, torch.inf).argsort(dim=1, stable=True))
    split = (rank >= count).to(torch.uint8).argsort(dim=1, stable=True)
    return split[:, :count].contiguous(), split[:, count:].contiguous(), _inverse(split)


def sample_packed_tokens(
    noise: torch.Tensor, valid: torch.Tensor, offsets: torch.Tensor, kept: int, dropped: int
) -> tuple[torch.Tensor, ...]:
    """The same of valid tokens alone, with a count for each row; the rows' results follow each other.

    Args:
        noise: (B, L) floating point.
        valid: (B, L) bool, False for padding.
        offsets: (2, B + 1) int32, where each row's kept and dropped tokens begin, and end.
        kept, dropped: totals, the last column of ``offsets``.

    Returns:
        keep (kept,) and drop (dropped,), numbers of tokens among all B * L; restore (B, L), -1 for padding, else
        where ``cat([keep, drop])`` holds the token; all int64.
    """
    order = noise.argsort(dim=1, stable=True)
    order = order.gather(1, (~valid).to(torch.uint8).gather(1, order).argsort(dim=1, stable=True))
    take = _inverse(order) < offsets[0].diff()[:, None]
    group = torch.where(take, 0, torch.where(valid, 1, 2))
    split = group.flatten().argsort(stable=True)
    restore = _inverse(split[None]).view_as(group).masked_fill(~valid, -1)
    return split[:kept].clone(), split[kept : kept + dropped].clone(), restore


def _inverse(order: torch.Tensor) -> torch.Tensor:
    """The permutation that undoes each row of ``order``."""
    index = torch.arange(order.shape[1], device=order.device).expand(order.shape)
    return torch.empty_like(order).scatter_(1, order, index)
