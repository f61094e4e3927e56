"""Triton functions and tile sizes of several operations.

Triton compiles a kernel again for integers that are 1, or multiples of 16. Those that vary with the images are in
``do_not_specialize``. Channels and strides are not: from them the compiler knows that it may load 128 bits at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Tiles of kernels that copy rows. Rows are on the grid's first axis: CUDA limits the others to 65535.
ROW_BLOCKS = {"BLOCK_M": 4, "BLOCK_C": 256, "num_warps": 4}


def row_grid(rows: int, channels: int) -> tuple[int, int]:
    """Grid of kernels that copy rows in tiles of ``ROW_BLOCKS``."""
    return triton.cdiv(rows, ROW_BLOCKS["BLOCK_M"]), triton.cdiv(channels, ROW_BLOCKS["BLOCK_C"])


@triton.jit
def gelu(z, dtype: tl.constexpr):
    """z * Phi(z) in float32, the exact GELU; the result is stored in ``dtype``."""
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def gelu_derivative(z, dtype: tl.constexpr):
    """Phi(z) + z * phi(z) in float32; the result is stored in ``dtype``."""
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)


@triton.jit
def valid_mask(position, size, width):
    """Whether positions of a map of ``width`` columns are in its top left rows and columns, size: (2,) int32."""
    position = position.to(tl.int32)
    row = position // width
    return (row < tl.load(size)) & (position - row * width < tl.load(size + 1))


@triton.jit
def start(block, size):
    """``block * size``, a position of one map (or past its end by less than its length), in int32.

    Positions over a whole batch need int64.
    """
    return (block.to(tl.int64) * size).to(tl.int32)
