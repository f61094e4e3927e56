"""Bias and exact GELU on a GPU through Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_common import gelu, gelu_derivative


@triton.jit
def _bias_gelu_fwd_kernel(x, bias, y, count, C, BLOCK: tl.constexpr):
    """x, y: (count,) flat rows of C channels; bias: (C,)."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    z = tl.load(x + offs, mask=mask, other=0.0).to(tl.float32)
    z += tl.load(bias + offs % C, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + offs, gelu(z, y.dtype.element_ty).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _bias_gelu_bwd_kernel(dy, x, bias, dx, db_partial, M, C, step, BLOCK_C: tl.constexpr):
    """dy, x, dx: (M, C); bias: (C,); db_partial: (programs along rows, C) float32."""
    first = tl.program_id(0).to(tl.int64) * step
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = channel < C
    b = tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32)
    db = tl.zeros((BLOCK_C,), tl.float32)
    for row in range(first, tl.minimum(first + step, M)):
        offs = row * C + channel
        z = tl.load(x + offs, mask=mask, other=0.0).to(tl.float32) + b
        dz = tl.load(dy + offs, mask=mask, other=0.0).to(tl.float32) * gelu_derivative(z, dx.dtype.element_ty)
        tl.store(dx + offs, dz.to(dx.dtype.element_ty), mask=mask)
        db += dz
    tl.store(db_partial + tl.program_id(0).to(tl.int64) * C + channel, db, mask=mask)


def launch_bias_gelu_fwd(x: torch.Tensor, bias: torch.Tensor, y: torch.Tensor) -> None:
    """Contiguous x (..., C) and bias (C,) -> y (..., C)."""
    block, count = 1024, x.numel()
    _bias_gelu_fwd_kernel[(triton.cdiv(count, block),)](x, bias, y, count, len(bias), BLOCK=block, num_warps=4)


def launch_bias_gelu_bwd(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, step: int, dx: torch.Tensor, db_partial: torch.Tensor
) -> None:
    """Contiguous dy, x (..., C), bias (C,) -> dx (..., C), and a row of db_partial (programs, C) per ``step`` rows."""
    channels = len(bias)
    block = min(512, triton.next_power_of_2(channels))
    _bias_gelu_bwd_kernel[(len(db_partial), triton.cdiv(channels, block))](
        dy, x, bias, dx, db_partial, x.numel() // channels, channels, step, BLOCK_C=block, num_warps=4
    )
