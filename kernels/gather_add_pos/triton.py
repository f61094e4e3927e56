"""Gather of tokens with their position embedding on a GPU through Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ROWS = 4
_COLUMNS = 256


@triton.jit
def _gather_add_pos_fwd_kernel(
    x, pos, index, out, M, K, C, batch_stride, row_stride,
    HAS_POS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x: B x L rows of C at two strides; pos: (L, C); index: (M,) = (B * K,); out: (M, C)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    source = tl.load(index + row, mask=row < M, other=0).to(tl.int64)
    mask = (row < M)[:, None] & (column < C)[None, :]
    start = row // K * batch_stride + source * row_stride
    value = tl.load(x + start[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_POS:
        value += tl.load(pos + source[:, None] * C + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row[:, None] * C + column[None, :], value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _gather_add_pos_bwd_kernel(
    grad, index, out, M, K, L, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """grad: (M, C); index: (M,) = (B * K,), unique within a picture; out: (B * L, C), zeros."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    target = row // K * L + tl.load(index + row, mask=row < M, other=0).to(tl.int64)
    mask = (row < M)[:, None] & (column < C)[None, :]
    value = tl.load(grad + row[:, None] * C + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + target[:, None] * C + column[None, :], value.to(out.dtype.element_ty), mask=mask)


def _grid(rows: int, channels: int) -> tuple[int, int]:
    return triton.cdiv(rows, _ROWS), triton.cdiv(channels, _COLUMNS)


def launch_gather_add_pos_fwd(
    x: torch.Tensor, pos: torch.Tensor | None, index: torch.Tensor, out: torch.Tensor
) -> None:
    """x (B, L, C) with contiguous rows, contiguous pos (L, C) and index (B, K) -> out (B, K, C)."""
    batch, count, channels = out.shape
    _gather_add_pos_fwd_kernel[_grid(batch * count, channels)](
        x, pos, index, out, batch * count, count, channels, x.stride(0), x.stride(1),
        HAS_POS=pos is not None, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4,
    )  # fmt: skip


def launch_gather_add_pos_bwd(grad: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    """Contiguous grad (B, K, C) and index (B, K) -> into zeros out (B, L, C)."""
    batch, count, channels = grad.shape
    _gather_add_pos_bwd_kernel[_grid(batch * count, channels)](
        grad, index, out, batch * count, count, out.shape[1], channels, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4
    )
