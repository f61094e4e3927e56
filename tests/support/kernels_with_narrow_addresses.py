"""Triton kernels with planted bugs in their addresses, and one without."""

import triton
import triton.language as tl


@triton.jit
def program_times_block(x, stride, block: tl.constexpr):
    """Wraps from 2**31 elements on."""
    tl.store(x + tl.program_id(0) * block + tl.arange(0, block), 0.0)


@triton.jit
def widened_too_late(x, stride, block: tl.constexpr):
    """Wraps before it becomes int64."""
    tl.store(x + (tl.program_id(0) * block + tl.arange(0, block)).to(tl.int64), 0.0)


@triton.jit
def row_times_stride(x, stride, block: tl.constexpr):
    """Wraps for a long stride."""
    tl.store(x + tl.arange(0, block) * stride, 0.0)


@triton.jit
def wide(x, stride, block: tl.constexpr):
    """Right: products in int64, or of a program along y, of which there are 65535 at most."""
    row = tl.program_id(0).to(tl.int64)
    tl.store(x + row * stride + tl.program_id(1) * block + tl.arange(0, block), 0.0)
