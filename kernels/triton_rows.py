"""Triton kernels that gather and scatter rows: those of ``gather_add_pos`` and ``scatter_fill``.

Rows are numbered within the concatenation of two tensors (B, K, C) and (B, F, C); one tensor comes as both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCKS = {"BLOCK_M": 4, "BLOCK_C": 256, "num_warps": 4}


def _grid(rows: int, channels: int) -> tuple[int, int]:
    """Rows are on the grid's first axis: CUDA limits the others to 65535."""
    return triton.cdiv(rows, _BLOCKS["BLOCK_M"]), triton.cdiv(channels, _BLOCKS["BLOCK_C"])


@triton.jit(do_not_specialize=["M", "K", "L", "at_source"])
def _gather_rows_kernel(
    first, second, index, pos, y, M, K, L, C, stride_fb, stride_fr, stride_sb, stride_sr, at_source,
    HAS_POS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """first: B x K rows and second: B x F rows of C, at two strides each; index: (M,) = (B * L,), -1 for zeros;
    pos: rows of C, one for each place in index, or each number in it; y: (M, C)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    source = tl.load(index + row, mask=row < M, other=0).to(tl.int64)
    in_rows = (row < M)[:, None] & (channel < C)[None, :]
    mask = in_rows & (source >= 0)[:, None]
    in_first = (source < K)[:, None]
    batch = row // L
    first_at = first + (batch * stride_fb + source * stride_fr)[:, None] + channel[None, :]
    second_at = second + (batch * stride_sb + (source - K) * stride_sr)[:, None] + channel[None, :]
    a = tl.load(first_at, mask=mask & in_first, other=0.0).to(tl.float32)
    b = tl.load(second_at, mask=mask & (source >= K)[:, None], other=0.0).to(tl.float32)
    value = tl.where(in_first, a, b)
    if HAS_POS:
        place = tl.where(at_source != 0, source, row - batch * L)
        value += tl.load(pos + place[:, None] * C + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row[:, None] * C + channel[None, :], value.to(y.dtype.element_ty), mask=in_rows)


@triton.jit(do_not_specialize=["M", "K", "F", "L"])
def _scatter_rows_kernel(dy, index, first, second, M, K, F, L, C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """dy: (M, C); index: (M,) = (B * L,), rows or -1, none twice in an image; first: (B * K, C); second: (B * F, C)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    target = tl.load(index + row, mask=row < M, other=0).to(tl.int64)
    mask = (row < M)[:, None] & (channel < C)[None, :]
    batch = row // L
    value = tl.load(dy + row[:, None] * C + channel[None, :], mask=mask, other=0.0).to(first.dtype.element_ty)
    first_at = first + (batch * K + target)[:, None] * C + channel[None, :]
    second_at = second + (batch * F + target - K)[:, None] * C + channel[None, :]
    tl.store(first_at, value, mask=mask & ((target >= 0) & (target < K))[:, None])
    tl.store(second_at, value, mask=mask & (target >= K)[:, None])


def gather_rows(
    first: torch.Tensor, second: torch.Tensor, index: torch.Tensor, pos: torch.Tensor | None, y: torch.Tensor,
    pos_at_source: bool,
) -> None:  # fmt: skip
    """``y[b, i] = cat([first, second], 1)[b, index[b, i]] + pos[index[b, i] if pos_at_source else i]``.

    Args:
        first, second: (B, K, C) and (B, F, C), C dense.
        index: (B, L) contiguous; y is zero where it is -1.
        pos: rows of C, contiguous, or None.
        y: (B, L, C) contiguous.
    """
    batch, length, channels = y.shape
    _gather_rows_kernel[_grid(batch * length, channels)](
        first, second, index, pos, y, batch * length, first.shape[1], length, channels, *first.stride()[:2],
        *second.stride()[:2], int(pos_at_source), HAS_POS=pos is not None, **_BLOCKS,
    )  # fmt: skip


def scatter_rows(dy: torch.Tensor, index: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> None:
    """``cat([first, second], 1)[b, index[b, i]] = dy[b, i]``, all contiguous; nothing where the index is -1."""
    batch, length, channels = dy.shape
    _scatter_rows_kernel[_grid(batch * length, channels)](
        dy, index, first, second, batch * length, first.shape[1], second.shape[1], length, channels, **_BLOCKS
    )
