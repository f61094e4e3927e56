"""Relative position bias: what attention adds to its logits for the offset between two cells."""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd.function import once_differentiable


class RelativePositionBias(nn.Module):
    """A learned number for each head and each offset between two cells of a grid (Liu et al., "Swin", 2021).

    Attributes:
        relative_position_bias_table: ((2 * rows - 1) * (2 * columns - 1), num_heads), offsets of rows first, from
            1 - rows on; zero at first.
        relative_position_index: (N, N) int64, N = rows * columns: the table's row for each query and key. Only part
            of the checkpoints' format: looking 16 million rows up, and adding as many gradients, is slow.

    Args:
        window_size: rows and columns of the grid.
        num_heads: attention heads.
    """

    def __init__(self, window_size: tuple[int, int], num_heads: int):
        super().__init__()
        self.window_size = rows, columns = window_size
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * rows - 1) * (2 * columns - 1), num_heads))
        row, column = (x.flatten() for x in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
        down = row[:, None] - row + rows - 1
        right = column[:, None] - column + columns - 1
        self.register_buffer("relative_position_index", down * (2 * columns - 1) + right)

    def forward(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """(1, num_heads, N, N) in ``dtype`` (default: the table's), queries before keys. Gradients are of first order.

        Sums of gradients are in the table's dtype and in one order, so they repeat bitwise.
        """
        rows, columns = self.window_size
        table = self.relative_position_bias_table.view(2 * rows - 1, 2 * columns - 1, -1).permute(2, 0, 1)
        # Reversed, so that offsets fall where keys rise. Then columns: (heads, reversed offset of rows, query, key).
        lines = table.flip(1, 2).unfold(2, columns, 1).flip(2)
        bias = _AllRows.apply(lines.transpose(1, 2), rows, dtype or table.dtype)
        return bias.view(1, -1, rows * columns, rows * columns)


class _AllRows(torch.autograd.Function):
    """(heads, C, 2R - 1, C) -> (heads, R, C, R, C): for each query row, the R offsets that its keys have."""

    @staticmethod
    def forward(ctx, lines, rows, dtype):
        ctx.rows, ctx.shape, ctx.dtype = rows, lines.shape, lines.dtype
        lines = lines.to(dtype)
        return torch.stack([lines[:, :, last - rows + 1 : last + 1] for last in _last_offsets(rows)], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        total = grad.new_zeros(ctx.shape, dtype=ctx.dtype)
        for row, last in zip(grad.unbind(1), _last_offsets(ctx.rows), strict=True):
            total[:, :, last - ctx.rows + 1 : last + 1] += row
        return total, None, None


def _last_offsets(rows: int) -> range:
    """For each query row the reversed offset to the last key row."""
    return range(2 * rows - 2, rows - 2, -1)
