"""Triton kernels of nothing but GELU."""

import triton
import triton.language as tl

from mimdet.kernels.triton_common import gelu, gelu_derivative


@triton.jit
def forward(x, y, count, block: tl.constexpr):
    """x, y: (count,)."""
    offs = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    mask = offs < count
    z = tl.load(x + offs, mask=mask).to(tl.float32)
    tl.store(y + offs, gelu(z).to(y.dtype.element_ty), mask=mask)


@triton.jit
def backward(dy, x, dx, count, block: tl.constexpr):
    """dy, x, dx: (count,)."""
    offs = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    mask = offs < count
    z = tl.load(x + offs, mask=mask).to(tl.float32)
    dz = tl.load(dy + offs, mask=mask).to(tl.float32) * gelu_derivative(z)
    tl.store(dx + offs, dz.to(dx.dtype.element_ty), mask=mask)
