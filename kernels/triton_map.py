"""Positions of feature maps inside Triton kernels: an int32 is enough for one, their sum over a batch is not."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def valid(position, size, width):
    """Whether positions of a map of width columns lie in its top left rows and columns; size: (2,) int32."""
    position = position.to(tl.int32)
    row = position // width
    return (row < tl.load(size)) & (position - row * width < tl.load(size + 1))


@triton.jit
def start(block, size):
    """``block * size``, a position of one map (or one past its end by less than its length) and so within int32."""
    return (block.to(tl.int64) * size).to(tl.int32)
