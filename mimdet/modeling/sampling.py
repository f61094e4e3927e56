"""Which tokens the encoder sees (paper, section 2.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..kernels.sample_tokens.api import TokenSample, sample_tokens, valid_tokens

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
    sizes = [(-(-int(height) // patch_size), -(-int(width) // patch_size)) for height, width in image_sizes]
    return valid_tokens(sizes, grid, device)
