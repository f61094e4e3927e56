"""Bias and exact GELU on a GPU through Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_common import gelu, gelu_derivative

# Rows that a program of the backward computes at once; a loop of one row is a tenth slower to issue.
_ROWS = 2


@triton.jit
def _bias_gelu_fwd_kernel(x, bias, y, C, BLOCK_C: tl.constexpr):
    """x, y: (programs along rows, C); bias: (C,)."""
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = channel < C
    offs = tl.program_id(0).to(tl.int64) * C + channel
    z = tl.load(x + offs, mask=mask, other=0.0).to(tl.float32)
    z += tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + offs, gelu(z).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "step"])
def _bias_gelu_bwd_kernel(dy, x, bias, dx, db_partial, M, C, step, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """dy, x, dx: (M, C); bias: (C,); db_partial: (programs along rows, C) float32."""
    first = tl.program_id(0).to(tl.int64) * step
    last = tl.minimum(first + step, M)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    channel_mask = channel < C
    b = tl.load(bias + channel, mask=channel_mask, other=0.0).to(tl.float32)
    db = tl.zeros((1, BLOCK_C), tl.float32)
    # Loads run two iterations ahead, into shared memory.
    for begin in tl.range(first, last, BLOCK_M, num_stages=3):
        row = begin + tl.arange(0, BLOCK_M)[:, None]
        mask = (row < last) & channel_mask
        offs = row * C + channel
        z = tl.load(x + offs, mask=mask, other=0.0).to(tl.float32) + b
        dz = tl.load(dy + offs, mask=mask, other=0.0).to(tl.float32) * gelu_derivative(z)
        tl.store(dx + offs, dz.to(dx.dtype.element_ty), mask=mask)
        db += tl.sum(dz, axis=0)[None, :]
    tl.store(db_partial + tl.program_id(0).to(tl.int64) * C + channel, db, mask=channel_mask)


def _channel_blocks(channels: int) -> dict[str, int]:
    """8 channels a thread: 16 bytes of a 16-bit dtype. No thread is idle where a large power of two divides C."""
    block = min(1024, triton.next_power_of_2(channels), max(256, channels & -channels))
    return {"BLOCK_C": block, "num_warps": max(1, block // 256)}


def launch_bias_gelu_fwd(x: torch.Tensor, bias: torch.Tensor, y: torch.Tensor) -> None:
    """Contiguous x (..., C) and bias (C,) -> y (..., C)."""
    channels, blocks = len(bias), _channel_blocks(len(bias))
    grid = (x.numel() // channels, triton.cdiv(channels, blocks["BLOCK_C"]))
    _bias_gelu_fwd_kernel[grid](x, bias, y, channels, **blocks)


def launch_bias_gelu_bwd(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, step: int, dx: torch.Tensor, db_partial: torch.Tensor
) -> None:
    """Contiguous dy, x (..., C), bias (C,) -> dx (..., C), and a row of db_partial (programs, C) per ``step`` rows."""
    channels, blocks = len(bias), _channel_blocks(len(bias))
    grid = (len(db_partial), triton.cdiv(channels, blocks["BLOCK_C"]))
    _bias_gelu_bwd_kernel[grid](
        dy, x, bias, dx, db_partial, x.numel() // channels, channels, step, BLOCK_M=_ROWS, **blocks
    )
