"""Triton functions of several operations.

Triton compiles a kernel again for integers that are 1, or multiples of 16. Those that vary with the images are in
``do_not_specialize``. Channels and strides are not: from them the compiler knows that it may load 128 bits at once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gelu(z):
    """z * Phi(z) in float32, the exact GELU."""
    return z * _normal_cdf(z)


@triton.jit
def gelu_derivative(z):
    """Phi(z) + z * phi(z) in float32."""
    # phi(z) = 2 ** (-z * z * log2(e) / 2 - log2(sqrt(2 * pi))): one multiply-add and the GPU's own exponential.
    return _normal_cdf(z) + z * tl.exp2(tl.fma(z * -0.72134752, z, -1.3257481))


@triton.jit
def norm_gelu_gradient(dy, x, offs, mask, mean, rstd, weight, bias):
    """x_hat, the normalized x; dz, the gradient of weight * x_hat + bias, which GELU takes. Behind the mask dz is 0."""
    gradient = tl.load(dy + offs, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(x + offs, mask=mask, other=0.0).to(tl.float32)
    x_hat = (value - mean) * rstd
    return x_hat, gradient * gelu_derivative(x_hat * weight + bias)


@triton.jit
def _normal_cdf(z):
    """Phi(z), the cumulative function of the normal distribution, in float32.

    Phi(-u) = 2 ** p(u) for u >= 0. p is a minimax fit (Remez exchange, for these kernels) of
    log2(erfc(u / sqrt(2)) / 2) over 0 .. 13.5; beyond, p falls on. Its error, with float32's rounding, is at most 5e-8,
    because gradients are summed in float32, and relative to Phi(-u) 2e-5 below u = 4, 2e-4 below 6 and 8e-4 below 13.2,
    where Phi(-u) leaves float32. Both signs take Phi(-u): 1 + erf(z) would cancel.
    """
    u = tl.abs(z)
    p = tl.fma(u, -2.0721232e-11, 1.50845303e-09)
    p = tl.fma(u, p, -4.73877719e-08)
    p = tl.fma(u, p, 8.39686436e-07)
    p = tl.fma(u, p, -9.16266254e-06)
    p = tl.fma(u, p, 6.19296188e-05)
    p = tl.fma(u, p, -0.000223863128)
    p = tl.fma(u, p, -0.000118027914)
    p = tl.fma(u, p, 0.00708670029)
    p = tl.fma(u, p, -0.0525301583)
    p = tl.fma(u, p, -0.459193707)
    p = tl.fma(u, p, -1.15110719)
    p = tl.fma(u, p, -0.99999994)
    tail = tl.exp2(p)
    return tl.where(z < 0, tail, 1.0 - tail)


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


@triton.jit
def merge_moments(count, mean, rest, m2, AXIS: tl.constexpr):
    """Moments of parts along an axis, or along all of them (None), -> those of all: count, mean, its rest, and m2, the
    sum of squared x - mean.

    A mean is mean + rest: rounding a large mean loses as much as small values of x - mean. Means are finite, also of
    parts without an x. Source: Chan, Golub and LeVeque, 1979.
    """
    total = tl.sum(count, axis=AXIS)
    center = tl.sum(count * mean, axis=AXIS) / tl.maximum(total, 1.0)
    off = mean - center + rest
    # shift corrects both moments for the rounding of the mean.
    shift = tl.sum(count * off, axis=AXIS) / tl.maximum(total, 1.0)
    return total, center, shift, tl.sum(m2 + count * off * off, axis=AXIS) - total * shift * shift


def split_tiles(tiles: int, blocks: int, most: int) -> tuple[int, int]:
    """Programs that share the tiles of each of ``blocks`` where they sum, ``most`` in all, and tiles of each."""
    steps = triton.cdiv(tiles, max(1, most // blocks))
    return triton.cdiv(tiles, steps), steps
