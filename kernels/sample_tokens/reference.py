"""Token sampling in plain PyTorch."""

from __future__ import annotations

import torch


def sample_tokens(noise: torch.Tensor, valid_mask: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """Split each row's L tokens into the ``count`` of smallest noise and the others, both in raster order.

    Padding ranks as infinite noise; equal noise ranks in raster order; NaN ranks last of all.

    Args:
        noise: (B, L) floating point.
        valid_mask: (B, L) bool, False for padding.
        count: tokens to keep, 0 to L.

    Returns:
        ids_keep (B, count), ids_mask (B, L - count), ids_restore (B, L), all int64; ``cat([ids_keep, ids_mask], 1)``
        holds token i at ``ids_restore[:, i]``.
    """
    rank = _inverse(noise.masked_fill(~valid_mask, torch.inf).argsort(dim=1, stable=True))
    split = (rank >= count).to(torch.uint8).argsort(dim=1, stable=True)
    return split[:, :count].contiguous(), split[:, count:].contiguous(), _inverse(split)


def sample_packed_tokens(
    noise: torch.Tensor, valid_mask: torch.Tensor, offsets: torch.Tensor, kept: int, masked: int
) -> tuple[torch.Tensor, ...]:
    """``sample_tokens`` of the valid tokens alone, with a count for each row; results are concatenated.

    Args:
        noise: (B, L) floating point.
        valid_mask: (B, L) bool, False for padding.
        offsets: (2, B + 1) int32, cumulative counts of the rows' kept and masked tokens.
        kept, masked: totals, the last column of ``offsets``.

    Returns:
        ids_keep (kept,) and ids_mask (masked,), numbers of tokens among all B * L; ids_restore (B, L), -1 for padding,
        else where ``cat([ids_keep, ids_mask])`` holds the token; all int64.
    """
    order = noise.argsort(dim=1, stable=True)
    order = order.gather(1, (~valid_mask).to(torch.uint8).gather(1, order).argsort(dim=1, stable=True))
    take = _inverse(order) < offsets[0].diff()[:, None]
    group = torch.where(take, 0, torch.where(valid_mask, 1, 2))
    split = group.flatten().argsort(stable=True)
    ids_restore = _inverse(split[None]).view_as(group).masked_fill(~valid_mask, -1)
    return split[:kept].clone(), split[kept : kept + masked].clone(), ids_restore


def _inverse(order: torch.Tensor) -> torch.Tensor:
    """The permutation that undoes each row of ``order``."""
    index = torch.arange(order.shape[1], device=order.device).expand(order.shape)
    return torch.empty_like(order).scatter_(1, order, index)
