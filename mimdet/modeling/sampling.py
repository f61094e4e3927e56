"""Which tokens the encoder sees (paper, section 2.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..kernels.sample_tokens.api import TokenSample, sample_tokens

__all__ = ["TokenSample", "check_ratio", "sample_tokens", "valid_cells"]


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
