"""Feature maps cut into square windows, and put together again."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def window_partition(x: torch.Tensor, size: int) -> torch.Tensor:
    """Windows of a feature map as sequences; their cells, and they themselves in each sample, are in raster order.

    Args:
        x: (B, H, W, C). Sides that are no multiples of ``size`` are padded with zeros, at the bottom and right.
        size: side of a window, cells.

    Returns:
        (B * ceil(H / size) * ceil(W / size), size * size, C).

    Raises:
        ValueError: x is not four-dimensional, or size is below 1.
    """
    if x.dim() != 4 or size < 1:
        raise ValueError(f"window_partition: x must be (B, H, W, C) and size positive, got {tuple(x.shape)} and {size}")
    batch, height, width, channels = x.shape
    rows, columns = -(-height // size), -(-width // size)
    if height % size or width % size:
        x = F.pad(x, (0, 0, 0, columns * size - width, 0, rows * size - height))
    x = x.view(batch, rows, size, columns, size, channels).transpose(2, 3)
    return x.reshape(batch * rows * columns, size * size, channels)


def window_reverse(windows: torch.Tensor, size: int, height: int, width: int) -> torch.Tensor:
    """The feature map (B, height, width, C) whose ``window_partition`` is ``windows``; padding is cut off.

    Raises:
        ValueError: the windows do not fill maps of that height and width.
    """
    rows, columns = -(-height // size), -(-width // size)
    if windows.dim() != 3 or windows.shape[1] != size * size or windows.shape[0] % (rows * columns):
        raise ValueError(
            f"window_reverse: a {height}x{width} map has {rows * columns} windows of {size * size} cells, "
            f"got {tuple(windows.shape)}"
        )
    x = windows.reshape(-1, rows, columns, size, size, windows.shape[2]).transpose(2, 3)
    return x.reshape(-1, rows * size, columns * size, windows.shape[2])[:, :height, :width]
