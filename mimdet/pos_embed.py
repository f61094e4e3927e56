"""Two-dimensional sin-cos position embeddings and their interpolation to other grids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F


def sincos_pos_embed_2d(embed_dim: int, grid_size: int) -> torch.Tensor:
    """Frozen position table of MAE (He et al. 2021), cls row first.

    The first half of the channels encodes the column, the second half the row; each half is
    [sin, cos] of position / 10000^(i / (embed_dim / 4)).

    Args:
        embed_dim: channels, a multiple of 4.
        grid_size: rows and columns of the square grid.

    Returns:
        (1, 1 + grid_size^2, embed_dim) float32; row 0, the cls token's, is zero.

    Raises:
        ValueError: embed_dim is not a multiple of 4.
    """
    if embed_dim % 4:
        raise ValueError(f"sin-cos position embedding: embed_dim must be a multiple of 4, got {embed_dim}")
    frequency = 10000.0 ** (-np.arange(embed_dim // 4, dtype=np.float64) / (embed_dim / 4))
    angle = np.arange(grid_size, dtype=np.float64)[:, None] * frequency
    line = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    column = np.broadcast_to(line[None, :], (grid_size, grid_size, embed_dim // 2))
    row = np.broadcast_to(line[:, None], (grid_size, grid_size, embed_dim // 2))
    table = np.concatenate([column, row], axis=2).reshape(-1, embed_dim)
    return torch.from_numpy(np.concatenate([np.zeros((1, embed_dim)), table])).float().unsqueeze(0)


def interpolate_pos_embed(pos_embed: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bicubic (align_corners False) interpolation of a square table to a grid of (rows, columns).

    Args:
        pos_embed: (1, 1 + n^2, D) with a cls row first.
        size: rows and columns of the result.

    Returns:
        (1, rows * columns, D) without the cls row, in float32 (float64 from a float64 table), whatever autocast says.

    Raises:
        ValueError: the table without its cls row is not square.
    """
    side = round((pos_embed.shape[1] - 1) ** 0.5)
    if side * side != pos_embed.shape[1] - 1:
        raise ValueError(f"position embedding of {pos_embed.shape[1]} rows is not a cls row plus a square grid")
    table = pos_embed.to(torch.promote_types(pos_embed.dtype, torch.float32))
    grid = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if size != (side, side):
        grid = F.interpolate(grid, size=size, mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).flatten(1, 2)


class PosEmbedCache:
    """Least recently used cache of interpolations of a frozen table, cleared when the table changes or moves.

    Args:
        capacity: most bytes; the last interpolation is cached in any case.
    """

    def __init__(self, capacity: int = 2**27):
        self.capacity = capacity
        self._state: tuple = ()
        self._grids: dict[tuple[int, int], torch.Tensor] = {}

    def __call__(self, pos_embed: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """``interpolate_pos_embed``, cached."""
        state = (pos_embed.data_ptr(), pos_embed._version, pos_embed.device, pos_embed.dtype)
        if state != self._state:
            self._state, self._grids = state, {}
        table = self._grids.pop(size, None)
        if table is None:
            # inference_mode: a grid first computed there must serve training too.
            with torch.inference_mode(False), torch.no_grad():
                table = interpolate_pos_embed(pos_embed, size).contiguous()
            size_in_bytes = table.nbytes + sum(t.nbytes for t in self._grids.values())
            while self._grids and size_in_bytes > self.capacity:
                size_in_bytes -= self._grids.pop(next(iter(self._grids))).nbytes
        self._grids[size] = table
        return table

    def packed(self, pos_embed: torch.Tensor, sizes: Sequence[tuple[int, int]]) -> torch.Tensor:
        """(V, D): the table of each image's grid, one after the other."""
        return torch.cat([self(pos_embed, size)[0] for size in sizes])

    def padded(self, pos_embed: torch.Tensor, sizes: Sequence[tuple[int, int]], grid: tuple[int, int]) -> torch.Tensor:
        """(B * rows * columns of ``grid``, D): the table of each image at its top left; the rest is uninitialized."""
        out = None
        for b, (rows, columns) in enumerate(sizes):
            table = self(pos_embed, (rows, columns))
            if out is None:
                out = table.new_empty((len(sizes), *grid, table.shape[2]))
            out[b, :rows, :columns] = table.view(rows, columns, -1)
        return out.flatten(0, 2)

    def __deepcopy__(self, memo: dict) -> PosEmbedCache:
        return PosEmbedCache(self.capacity)
