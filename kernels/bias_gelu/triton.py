"""Bias and exact GELU on a GPU through Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Rows a backward program sums before it writes its partial gradient of the bias.
_ROWS = 64


@triton.jit
def _bias_gelu_fwd_kernel(x, bias, y, count, C, BLOCK: tl.constexpr):
    """x, y: (count,) flat rows of C channels; bias: (C,)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    h = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    h += tl.load(bias + at % C, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, (0.5 * h * (1.0 + tl.math.erf(h * 0.7071067811865476))).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _bias_gelu_bwd_kernel(grad_y, x, bias, grad_x, partial, M, C, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """grad_y, x, grad_x: (M, C); bias: (C,); partial: (programs along rows, C) float32."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < C
    b = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for row in range(first, tl.minimum(first + ROWS, M)):
        at = row * C + column
        h = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + b
        g = tl.load(grad_y + at, mask=inside, other=0.0).to(tl.float32)
        cdf = 0.5 * (1.0 + tl.math.erf(h * 0.7071067811865476))
        g *= cdf + h * tl.exp(-0.5 * h * h) * 0.3989422804014327
        tl.store(grad_x + at, g.to(grad_x.dtype.element_ty), mask=inside)
        total += g
    tl.store(partial + tl.program_id(0).to(tl.int64) * C + column, total, mask=inside)


def launch_bias_gelu_fwd(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Contiguous x (M, C) and bias (C,) -> GELU(x + bias), like x."""
    y = torch.empty_like(x)
    if x.numel():
        block = 1024
        _bias_gelu_fwd_kernel[(triton.cdiv(x.numel(), block),)](
            x, bias, y, x.numel(), x.shape[1], BLOCK=block, num_warps=4
        )
    return y


def launch_bias_gelu_bwd(
    grad_y: torch.Tensor, x: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Contiguous grad_y, x (M, C) and bias (C,) -> gradients of x, like x, and of the bias, (C,) float32."""
    rows, channels = x.shape
    grad_x = torch.empty_like(x)
    programs, block = triton.cdiv(rows, _ROWS), min(512, triton.next_power_of_2(channels))
    partial = torch.empty((programs, channels), dtype=torch.float32, device=x.device)
    if x.numel():
        _bias_gelu_bwd_kernel[(programs, triton.cdiv(channels, block))](
            grad_y, x, bias, grad_x, partial, rows, channels, ROWS=_ROWS, BLOCK_C=block, num_warps=4
        )
    return grad_x, partial.sum(0)
