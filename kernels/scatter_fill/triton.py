"""Assembly of the decoder's input on a GPU through Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ROWS = 4
_COLUMNS = 256


@triton.jit
def _scatter_fill_fwd_kernel(
    kept, fill, restore, pos, out, M, K, L, C, kept_batch_stride, kept_row_stride, fill_batch_stride, fill_row_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """kept: B x K rows and fill: B x F rows of C, at two strides each; restore: (M,) = (B * L,), -1 for zeros;
    pos: (L, C); out: (M, C)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    source = tl.load(restore + row, mask=row < M, other=0).to(tl.int64)
    inside = (row < M)[:, None] & (column < C)[None, :]
    mask = inside & (source >= 0)[:, None]
    is_kept = (source < K)[:, None]
    batch = row // L
    kept_at = kept + (batch * kept_batch_stride + source * kept_row_stride)[:, None] + column[None, :]
    fill_at = fill + (batch * fill_batch_stride + (source - K) * fill_row_stride)[:, None] + column[None, :]
    a = tl.load(kept_at, mask=mask & is_kept, other=0.0).to(tl.float32)
    b = tl.load(fill_at, mask=mask & (source >= K)[:, None], other=0.0).to(tl.float32)
    shift = tl.load(pos + (row - batch * L)[:, None] * C + column[None, :], mask=mask, other=0.0).to(tl.float32)
    value = tl.where(is_kept, a, b) + shift
    tl.store(out + row[:, None] * C + column[None, :], value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _scatter_fill_bwd_kernel(
    grad, restore, kept, fill, M, K, F, L, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """grad: (M, C); restore: (M,) = (B * L,), rows or -1, none twice in a picture; kept: (B * K, C);
    fill: (B * F, C)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    target = tl.load(restore + row, mask=row < M, other=0).to(tl.int64)
    mask = (row < M)[:, None] & (column < C)[None, :]
    batch = row // L
    value = tl.load(grad + row[:, None] * C + column[None, :], mask=mask, other=0.0).to(kept.dtype.element_ty)
    kept_at = kept + (batch * K + target)[:, None] * C + column[None, :]
    fill_at = fill + (batch * F + target - K)[:, None] * C + column[None, :]
    tl.store(kept_at, value, mask=mask & ((target >= 0) & (target < K))[:, None])
    tl.store(fill_at, value, mask=mask & (target >= K)[:, None])


def _grid(rows: int, channels: int) -> tuple[int, int]:
    return triton.cdiv(rows, _ROWS), triton.cdiv(channels, _COLUMNS)


def launch_scatter_fill_fwd(
    kept: torch.Tensor, fill: torch.Tensor, restore: torch.Tensor, pos: torch.Tensor, out: torch.Tensor
) -> None:
    """kept (B, K, D) and fill (B, F, D) with contiguous rows, contiguous restore (B, L), pos (L, D)
    -> out (B, L, D)."""
    batch, length, channels = out.shape
    _scatter_fill_fwd_kernel[_grid(batch * length, channels)](
        kept, fill, restore, pos, out, batch * length, kept.shape[1], length, channels,
        kept.stride(0), kept.stride(1), fill.stride(0), fill.stride(1),
        ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4,
    )  # fmt: skip


def launch_scatter_fill_bwd(grad: torch.Tensor, restore: torch.Tensor, kept: torch.Tensor, fill: torch.Tensor) -> None:
    """Contiguous grad (B, L, D) and restore (B, L) -> kept (B, K, D), fill (B, F, D)."""
    batch, length, channels = grad.shape
    _scatter_fill_bwd_kernel[_grid(batch * length, channels)](
        grad, restore, kept, fill, batch * length, kept.shape[1], fill.shape[1], length, channels,
        ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4,
    )  # fmt: skip
