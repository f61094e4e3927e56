"""Which tokens the encoder sees (paper, section 2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class TokenSample(NamedTuple):
    """A split of each picture's L tokens into kept and dropped ones, both in raster order.

    Attributes:
        keep: (B, K) int64, indices the encoder sees.
        drop: (B, L - K) int64, the others.
        restore: (B, L) int64, where token i stands in ``cat([keep, drop], 1)``.
    """

    keep: torch.Tensor
    drop: torch.Tensor
    restore: torch.Tensor


def check_ratio(ratio: float, name: str = "sample_ratio") -> float:
    """``ratio`` if it is in (0, 1]; otherwise ValueError."""
    if not 0.0 < ratio <= 1.0:
        raise ValueError(f"{name} must be in (0, 1], got {ratio}")
    return float(ratio)


def valid_cells(
    image_sizes: Sequence[tuple[int, int]], grid: tuple[int, int], patch_size: int, device: torch.device | str
) -> torch.Tensor:
    """(B, rows * columns) bool: True where a token holds at least one pixel of its picture, not only padding."""
    sides = torch.tensor([[-(-int(h) // patch_size), -(-int(w) // patch_size)] for h, w in image_sizes], device=device)
    rows = torch.arange(grid[0], device=device) < sides[:, :1]
    columns = torch.arange(grid[1], device=device) < sides[:, 1:]
    return (rows[:, :, None] & columns[:, None, :]).flatten(1)


def sample_tokens(noise: torch.Tensor, valid: torch.Tensor, ratio: float) -> TokenSample:
    """Keep the int(L * ratio) tokens of smallest noise, at least one; padding comes last.

    As in the original the count is that of the padded grid, so a picture with fewer valid tokens than that
    contributes padding. Padding tokens tie; they are taken in raster order.

    Args:
        noise: (B, L) uniform numbers in [0, 1).
        valid: (B, L) bool, False for padding.
        ratio: keep ratio in (0, 1].
    """
    batch, length = noise.shape
    count = max(1, int(length * ratio))
    # Every padding token is above all noise, whatever uniform numbers were given.
    order = noise.masked_fill(~valid, torch.inf).argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(length, device=noise.device).expand(batch, -1))
    split = (rank >= count).to(torch.uint8).argsort(dim=1, stable=True)
    restore = torch.empty_like(split)
    restore.scatter_(1, split, torch.arange(length, device=noise.device).expand(batch, -1))
    return TokenSample(split[:, :count], split[:, count:], restore)


def gather_tokens(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of (B, L, D) at (B, K) int64 indices -> (B, K, D)."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
