"""The valid area of padded feature maps inside Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def valid(position, size, width):
    """Whether positions of a map of width columns lie in its top left rows and columns; size: (2,) int32."""
    position = position.to(tl.int32)
    row = position // width
    return (row < tl.load(size)) & (position - row * width < tl.load(size + 1))
