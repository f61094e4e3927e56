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
    """Cells of a grid in the order of its windows, and the number of cells of each window.

    Windows begin at the top left and are in raster order, as are the cells of each. Windows at the right and the
    bottom are smaller where the grid ends: nothing is padded.

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
        sizes: (rows, columns) of each image's tokens without padding.
        grid: (rows, columns) of the padded tokens.
        window: side of a window, tokens.
        packed: windows of each image alone; otherwise of the padded grid.
        device: of the result.
    """
    batch, length = len(sizes), grid[0] * grid[1]
    image_grids = list(sizes) if packed else [grid] * batch
    ids_keep, ids_restore, valid_index, lengths = [], [], [], []
    begin = 0
    for b, (rows, columns) in enumerate(image_grids):
        order, window_lengths = window_order(rows, columns, window)
        # Packed tokens are numbered through the batch; else each image's from 0.
        cells = (np.arange(rows)[:, None] * grid[1] + np.arange(columns)).ravel() + (b * length if packed else 0)
        ids_keep.append(cells[order])
        ids_restore.append(np.argsort(order) + (begin if packed else 0))
        valid_index.append(cells)
        lengths.append(window_lengths)
        begin += len(order)
    longest, starts = max(n.max() for n in lengths), np.concatenate([[0], *lengths]).cumsum()
    groups = 1 if packed else batch

    def indices(arrays: Sequence[np.ndarray]) -> torch.Tensor:
        return to_device(np.concatenate(arrays), device, torch.int64)

    cu_seqlens = to_device(starts, device)
    ids_keep, ids_restore = (indices(part).view(groups, -1) for part in (ids_keep, ids_restore))
    ids_mask = ids_keep.new_empty((groups, 0))
    if not packed:
        encoder = Sequences((batch, length), cu_seqlens, int(longest), num_images=batch)
        return TokenSplit(ids_keep, ids_mask, ids_restore, encoder, Sequences.equal(batch, length, device))
    counts = [rows * columns for rows, columns in image_grids]
    whole = Sequences.packed(to_device(np.cumsum([0, *counts]), device), begin, max(counts))
    encoder = Sequences((begin, 1), cu_seqlens, int(longest), whole.owner, batch)
    return TokenSplit(ids_keep, ids_mask, ids_restore, encoder, whole, indices(valid_index), image_grids)
