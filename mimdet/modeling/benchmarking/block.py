"""The windows of Benchmarking-ViT, its relative position bias, and the block whose attention adds the bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..recompute import Recomputed, RecomputeLinear
from ..sequences import Sequences
from ..vit import Attention, TransformerBlock


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
    """Inverse of ``window_partition``: the feature map (B, height, width, C), without the padding.

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


class RelativePositionBias(nn.Module):
    """A learned number for each head and each offset between two cells of a grid (Liu et al., "Swin", 2021).

    Attributes:
        relative_position_bias_table: ((2 * rows - 1) * (2 * columns - 1), num_heads), offsets of rows first, from
            1 - rows on; zero at first.
        relative_position_index: (N, N) int64, N = rows * columns: the table's row for each query and key. It is here
            for checkpoints only: ``forward`` does without an index of up to 16 million rows, which is slow.

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
        """(1, num_heads, N, N) in ``dtype`` (default: the table's), queries before keys. No second-order gradient.

        Gradients are summed in the table's dtype and in one order, so they repeat bitwise.
        """
        rows, columns = self.window_size
        table = self.relative_position_bias_table.view(2 * rows - 1, 2 * columns - 1, -1).permute(2, 0, 1)
        # unfold over reversed offsets, as offsets fall where keys rise: (heads, reversed row offset, query, key).
        lines = table.flip(1, 2).unfold(2, columns, 1).flip(2)
        bias = _AllRows.apply(lines.transpose(1, 2), rows, dtype or table.dtype)
        return bias.view(1, -1, rows * columns, rows * columns)


class _AllRows(torch.autograd.Function):
    """(heads, C, 2R - 1, C) -> (heads, R, C, R, C): for each query row, the R row offsets of its keys."""

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


# cuDNN's attention, which PyTorch prefers on Hopper, has no gradient for the bias.
_BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


class BiasedAttention(Attention):
    """Multi-head self-attention over (B, N, C) with a bias added to the scaled logits.

    Args:
        dim: C.
        num_heads: attention heads.
        beit_qkv_bias: queries and values have a bias, keys have none, as in BEiT.
    """

    def __init__(self, dim: int, num_heads: int, beit_qkv_bias: bool = False):
        super().__init__(dim, num_heads)
        self.beit_qkv_bias = beit_qkv_bias
        if beit_qkv_bias:
            self.qkv = RecomputeLinear(dim, 3 * dim, bias=False)
            self.q_bias = nn.Parameter(torch.zeros(dim))
            self.v_bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: torch.Tensor | Recomputed, sequences: Sequences, bias: torch.Tensor) -> torch.Tensor:
        """``sequences`` are the rows of x; ``bias``: (1, heads, N, N) in the dtype that linear layers compute in."""
        qkv = self.qkv(x)
        if self.beit_qkv_bias:
            qkv = qkv + torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]).to(qkv.dtype)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        with sdpa_kernel(_BACKENDS):
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(y.transpose(1, 2).flatten(2))


class BiasedBlock(TransformerBlock):
    """``TransformerBlock`` with ``BiasedAttention``; ``forward`` takes its ``bias``.

    Args:
        dim, num_heads: of the tokens.
        beit_qkv_bias: see ``BiasedAttention``.
        options: of ``TransformerBlock``.
    """

    def __init__(self, dim: int, num_heads: int, beit_qkv_bias: bool = False, **options):
        super().__init__(dim, num_heads, **options)
        self.attn = BiasedAttention(dim, num_heads, beit_qkv_bias)
