"""Small tensors from numbers of the host, and the mask of the valid area of padded maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def to_device(numbers: Sequence, device: torch.device, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """Nested lists, or an array, as a tensor, without waiting for the GPU."""
    pinned = device.type == "cuda"  # a copy from pageable memory would wait for all work that the GPU has queued
    return torch.tensor(numbers, dtype=dtype, device="cpu", pin_memory=pinned).to(device, non_blocking=pinned)


def valid_mask(
    sizes: torch.Tensor | Sequence[tuple[int, int]], grid: tuple[int, int], device: torch.device | str = "cpu"
) -> torch.Tensor:
    """(B, *grid) bool: True in the top left (rows, columns) of each map; does not wait for the GPU.

    Args:
        sizes: (rows, columns) of each map, or a (B, 2) tensor of them.
        grid: (rows, columns) of the padded maps.
        device: of the mask; that of ``sizes`` if it is a tensor.

    Raises:
        ValueError: listed sizes that are not within the grid.
    """
    if not isinstance(sizes, torch.Tensor):
        check_sizes("valid_mask", sizes, grid)
        sizes = to_device(list(sizes), torch.device(device)).view(-1, 2)
    rows, columns = (
        torch.arange(length, device=sides.device) < sides[:, None]
        for length, sides in zip(grid, sizes.unbind(1), strict=True)
    )
    return rows[:, :, None] & columns[:, None, :]


def zero_padding(x: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Maps (B, C, H, W), zero outside of the top left (rows, columns) of each; sizes: (B, 2)."""
    return x.masked_fill(~valid_mask(sizes, x.shape[2:])[:, None], 0)


def check_sizes(op: str, sizes: Sequence[tuple[int, int]], grid: tuple[int, int]) -> None:
    """Raise ValueError unless every (rows, columns) is within ``grid``."""
    for b, (rows, columns) in enumerate(sizes):
        if not (1 <= rows <= grid[0] and 1 <= columns <= grid[1]):
            raise ValueError(f"{op}: sizes[{b}] is {(rows, columns)}, not within 1 .. {tuple(grid)}")
