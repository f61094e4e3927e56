"""Gather of tokens with their position embedding on a GPU through Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_common import ROW_BLOCKS, row_grid


@triton.jit(do_not_specialize=["M", "K"])
def _gather_add_pos_fwd_kernel(
    x, pos, index, y, M, K, C, stride_b, stride_l, HAS_POS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """x: B x L rows of C at two strides; pos: (L, C); index: (M,) = (B * K,); y: (M, C)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    source = tl.load(index + row, mask=row < M, other=0).to(tl.int64)
    mask = (row < M)[:, None] & (channel < C)[None, :]
    start = row // K * stride_b + source * stride_l
    value = tl.load(x + start[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_POS:
        value += tl.load(pos + source[:, None] * C + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row[:, None] * C + channel[None, :], value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "K", "L"])
def _gather_add_pos_bwd_kernel(
    dy, index, dx, M, K, L, C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """dy: (M, C); index: (M,) = (B * K,), unique within an image; dx: (B * L, C), zeros."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    target = row // K * L + tl.load(index + row, mask=row < M, other=0).to(tl.int64)
    mask = (row < M)[:, None] & (channel < C)[None, :]
    value = tl.load(dy + row[:, None] * C + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(dx + target[:, None] * C + channel[None, :], value.to(dx.dtype.element_ty), mask=mask)


def launch_gather_add_pos_fwd(
    x: torch.Tensor, pos: torch.Tensor | None, index: torch.Tensor, y: torch.Tensor
) -> None:  # fmt: skip
    """x (B, L, C) with contiguous rows, contiguous pos (L, C) and index (B, K) -> y (B, K, C)."""
    batch, count, channels = y.shape
    _gather_add_pos_fwd_kernel[row_grid(batch * count, channels)](
        x, pos, index, y, batch * count, count, channels, *x.stride()[:2], HAS_POS=pos is not None, **ROW_BLOCKS
    )


def launch_gather_add_pos_bwd(dy: torch.Tensor, index: torch.Tensor, dx: torch.Tensor) -> None:
    """Contiguous dy (B, K, C) and index (B, K) -> into zeros dx (B, L, C)."""
    batch, count, channels = dy.shape
    _gather_add_pos_bwd_kernel[row_grid(batch * count, channels)](
        dy, index, dx, batch * count, count, dx.shape[1], channels, **ROW_BLOCKS
    )
