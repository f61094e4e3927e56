"""Assembly of the decoder's input on a GPU through Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_common import ROW_BLOCKS, row_grid


@triton.jit(do_not_specialize=["M", "K", "L"])
def _scatter_fill_fwd_kernel(
    kept, fill, ids_restore, pos, y, M, K, L, C, stride_kb, stride_kr, stride_fb, stride_fr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """kept: B x K rows and fill: B x F rows of C, at two strides each; ids_restore: (M,) = (B * L,), -1 for zeros;
    pos: (L, C); y: (M, C)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    source = tl.load(ids_restore + row, mask=row < M, other=0).to(tl.int64)
    in_rows = (row < M)[:, None] & (channel < C)[None, :]
    mask = in_rows & (source >= 0)[:, None]
    is_kept = (source < K)[:, None]
    batch = row // L
    kept_at = kept + (batch * stride_kb + source * stride_kr)[:, None] + channel[None, :]
    fill_at = fill + (batch * stride_fb + (source - K) * stride_fr)[:, None] + channel[None, :]
    a = tl.load(kept_at, mask=mask & is_kept, other=0.0).to(tl.float32)
    b = tl.load(fill_at, mask=mask & (source >= K)[:, None], other=0.0).to(tl.float32)
    shift = tl.load(pos + (row - batch * L)[:, None] * C + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    value = tl.where(is_kept, a, b) + shift
    tl.store(y + row[:, None] * C + channel[None, :], value.to(y.dtype.element_ty), mask=in_rows)


@triton.jit(do_not_specialize=["M", "K", "F", "L"])
def _scatter_fill_bwd_kernel(
    dy, ids_restore, dkept, dfill, M, K, F, L, C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """dy: (M, C); ids_restore: (M,) = (B * L,), rows or -1, none twice in an image; dkept: (B * K, C);
    dfill: (B * F, C)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    target = tl.load(ids_restore + row, mask=row < M, other=0).to(tl.int64)
    mask = (row < M)[:, None] & (channel < C)[None, :]
    batch = row // L
    value = tl.load(dy + row[:, None] * C + channel[None, :], mask=mask, other=0.0).to(dkept.dtype.element_ty)
    kept_at = dkept + (batch * K + target)[:, None] * C + channel[None, :]
    fill_at = dfill + (batch * F + target - K)[:, None] * C + channel[None, :]
    tl.store(kept_at, value, mask=mask & ((target >= 0) & (target < K))[:, None])
    tl.store(fill_at, value, mask=mask & (target >= K)[:, None])


def launch_scatter_fill_fwd(
    kept: torch.Tensor, fill: torch.Tensor, ids_restore: torch.Tensor, pos: torch.Tensor, y: torch.Tensor
) -> None:
    """kept (B, K, D) and fill (B, F, D) with contiguous rows, contiguous ids_restore (B, L), pos (L, D)
    -> y (B, L, D)."""
    batch, length, channels = y.shape
    _scatter_fill_fwd_kernel[row_grid(batch * length, channels)](
        kept, fill, ids_restore, pos, y, batch * length, kept.shape[1], length, channels,
        *kept.stride()[:2], *fill.stride()[:2], **ROW_BLOCKS,
    )  # fmt: skip


def launch_scatter_fill_bwd(
    dy: torch.Tensor, ids_restore: torch.Tensor, dkept: torch.Tensor, dfill: torch.Tensor
) -> None:  # fmt: skip
    """Contiguous dy (B, L, D) and ids_restore (B, L) -> dkept (B, K, D), dfill (B, F, D)."""
    batch, length, channels = dy.shape
    _scatter_fill_bwd_kernel[row_grid(batch * length, channels)](
        dy, ids_restore, dkept, dfill, batch * length, dkept.shape[1], dfill.shape[1], length, channels, **ROW_BLOCKS
    )
