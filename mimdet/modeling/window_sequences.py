"""Attention inside windows: the encoder's tokens in the order of windows, each a sequence (paper, Table 8)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from ..kernels.tensors import to_device
from .sampling import TokenSplit
from .sequences import Sequences


@lru_cache(maxsize=256)
def window_order(rows: int, columns: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Cells of a grid in the order of its windows, and how many each has.

    Windows begin at the top left and are in raster order, as are the cells of each. Those at the right and the bottom
    have what the grid has left: nothing is padded.

    Returns:
        (rows * columns,) int64 raster numbers of cells, (windows,) int64.
    """
    row, column = np.divmod(np.arange(rows * columns), columns)
    number = row // window * -(-columns // window) + column // window
    return np.argsort(number, kind="stable"), np.bincount(number)


def split_windows(
    sizes: Sequence[tuple[int, int]], grid: tuple[int, int], window: int, packed: bool, device: torch.device
) -> TokenSplit:
    """Every token goes to the encoder, window after window; there is nothing to fill in.

    Args:
        sizes: (rows, columns) of each picture's own tokens.
        grid: (rows, columns) of the canvas.
        window: side of a window, tokens.
        packed: windows are those of each picture's own grid; else those of the canvas, padding included.
        device: of the result.
    """
    batch, canvas = len(sizes), grid[0] * grid[1]
    own = list(sizes) if packed else [grid] * batch
    keep, restore, valid, lengths = [], [], [], []
    begin = 0
    for b, (rows, columns) in enumerate(own):
        order, of_window = window_order(rows, columns, window)
        # Packed tokens are numbered through the batch; else each picture's from 0.
        cells = (np.arange(rows)[:, None] * grid[1] + np.arange(columns)).ravel() + (b * canvas if packed else 0)
        keep.append(cells[order])
        restore.append(np.argsort(order) + (begin if packed else 0))
        valid.append(cells)
        lengths.append(of_window)
        begin += len(order)
    longest, starts = max(n.max() for n in lengths), np.concatenate([[0], *lengths]).cumsum()
    groups = 1 if packed else batch

    def indices(arrays: Sequence[np.ndarray]) -> torch.Tensor:
        return to_device(np.concatenate(arrays), device, torch.int64)

    cu_seqlens = to_device(starts, device)
    keep, restore = (indices(part).view(groups, -1) for part in (keep, restore))
    none = keep.new_empty((groups, 0))
    if not packed:
        encoder = Sequences((batch, canvas), cu_seqlens, int(longest), pictures=batch)
        return TokenSplit(keep, none, restore, encoder, Sequences.equal(batch, canvas, device))
    counts = [rows * columns for rows, columns in own]
    whole = Sequences.packed(to_device(np.cumsum([0, *counts]), device), begin, max(counts))
    encoder = Sequences((begin, 1), cu_seqlens, int(longest), whole.owner, batch)
    return TokenSplit(keep, none, restore, encoder, whole, indices(valid), own)
