"""Channel-wise LayerNorm and exact GELU on a GPU through Triton.

NHWC: a program holds whole rows of channels. NCHW: it takes BLOCK_S positions and reads their channels three times, for
the mean, the variance and the result; the caches serve the second and third.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_common import gelu, norm_gelu_gradient, start, valid_mask

# Elements that a program's registers hold at once; the most programs whose partial gradients are summed (NHWC).
_TILE = 4096
_MOST_PARTS = 512
# NCHW tile: channels by positions.
_BLOCK_C = 32
_BLOCK_S = 64


@triton.jit(do_not_specialize=["M", "S", "W"])
def _layer_norm_gelu_fwd_nhwc_kernel(
    x, weight, bias, sizes, y, mean, rstd, M, C, S, W, eps, HAS_SIZES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x, y: (M, C); weight, bias: (C,); sizes: (M / S, 2); mean, rstd: (M,) float32."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    lane = tl.arange(0, BLOCK_M)[:, None]
    row = first + lane
    channel = tl.arange(0, BLOCK_C)[None, :]
    channel_mask = channel < C
    exists, use = _valid_rows(first, lane, M, sizes, S, W, HAS_SIZES)
    mask = use & channel_mask
    offs = row * C + channel
    value = tl.load(x + offs, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + channel, mask=channel_mask, other=0.0)
    b = tl.load(bias + channel, mask=channel_mask, other=0.0)
    x_mean = tl.sum(value, axis=1)[:, None] / C
    x_centered = tl.where(mask, value - x_mean, 0.0)
    # shift corrects both moments for the rounding of the mean.
    shift = tl.sum(x_centered, axis=1)[:, None] / C
    x_rstd = tl.rsqrt(tl.sum(x_centered * x_centered, axis=1)[:, None] / C - shift * shift + eps)
    x_mean += shift
    result = gelu((value - x_mean) * x_rstd * w + b)
    if HAS_SIZES:
        result = tl.where(use, result, 0.0)
        x_rstd = tl.where(use, x_rstd, 0.0)
    tl.store(y + offs, result.to(y.dtype.element_ty), mask=exists & channel_mask)
    # One address of 64 bits and offsets of 32: an address for each row would spill registers.
    tl.store(mean + first + lane, x_mean, mask=exists)
    tl.store(rstd + first + lane, x_rstd, mask=exists)


@triton.jit
def _valid_rows(first, lane, M, sizes, S, W, HAS_SIZES: tl.constexpr):
    """Which rows first + lane, S per sample, exist, and which of them are in the valid area."""
    exists = first + lane < M
    use = exists
    if HAS_SIZES:
        # int32 holds offsets from the first row's sample on.
        offset = (first % S).to(tl.int32) + lane
        size = sizes + 2 * (first // S + offset // S)
        position = offset % S
        row = position // W
        use = exists & (row < tl.load(size, mask=exists, other=0))
        use = use & (position - row * W < tl.load(size + 1, mask=exists, other=0))
    return exists, use


@triton.jit(do_not_specialize=["M", "S", "W", "steps"])
def _layer_norm_gelu_bwd_nhwc_kernel(
    dy, x, weight, bias, sizes, mean, rstd, dx, sums, M, C, S, W, steps, HAS_SIZES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dy, x, dx: (M, C); weight, bias: (C,); mean, rstd: (M,); sums: (programs, 2, C), of dz and dz * x_hat."""
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_M)[:, None]
    channel = tl.arange(0, BLOCK_C)[None, :]
    channel_mask = channel < C
    w = tl.load(weight + channel, mask=channel_mask, other=0.0)
    b = tl.load(bias + channel, mask=channel_mask, other=0.0)
    db = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    dw = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for step in range(steps):
        first = (program * steps + step) * BLOCK_M
        row = first + lane
        exists, use = _valid_rows(first, lane, M, sizes, S, W, HAS_SIZES)
        mask = use & channel_mask
        offs = row * C + channel
        # Padding rows: rstd, x_hat and dz are zero, so every gradient is.
        x_rstd = tl.load(rstd + row, mask=use, other=0.0)
        x_mean = tl.load(mean + row, mask=use, other=0.0)
        x_hat, dz = norm_gelu_gradient(dy, x, offs, mask, x_mean, x_rstd, w, b)
        db += dz
        dw += dz * x_hat
        g = dz * w
        a = tl.sum(g, axis=1)[:, None] / C
        k = tl.sum(g * x_hat, axis=1)[:, None] / C
        tl.store(dx + offs, (x_rstd * (g - a - x_hat * k)).to(dx.dtype.element_ty), mask=exists & channel_mask)
    out = sums + program * 2 * C + channel
    tl.store(out, tl.sum(db, axis=0)[None, :], mask=channel_mask)
    tl.store(out + C, tl.sum(dw, axis=0)[None, :], mask=channel_mask)


@triton.jit
def _columns(sizes, C, S, W, HAS_SIZES: tl.constexpr, BLOCK_S: tl.constexpr):
    """Positions of a program (NCHW): where their statistics and their first channels are, which exist, and which of
    them are in the valid area."""
    blocks = tl.cdiv(S, BLOCK_S)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    position = start(tl.program_id(0) % blocks, BLOCK_S) + tl.arange(0, BLOCK_S)[None, :]
    exists = position < S
    use = exists
    if HAS_SIZES:
        use = exists & valid_mask(position, sizes + 2 * sample, W)
    return sample * S + position, sample * C * S + position, exists, use


@triton.jit
def _channels(first, C, use, weight, bias, BLOCK_C: tl.constexpr):
    """A block of channels (NCHW): their numbers, where they are valid, their weights and biases."""
    channel = (first + tl.arange(0, BLOCK_C)[:, None]).to(tl.int64)
    w = tl.load(weight + channel, mask=channel < C, other=0.0)
    return channel, use & (channel < C), w, tl.load(bias + channel, mask=channel < C, other=0.0)


@triton.jit(do_not_specialize=["W"])
def _layer_norm_gelu_fwd_nchw_kernel(
    x, weight, bias, sizes, y, mean, rstd, C, S, W, eps, HAS_SIZES: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """x, y: (B, C, S); weight, bias: (C,); sizes: (B, 2); mean, rstd: (B, S) float32. BLOCK_S positions a program."""
    row, base, exists, use = _columns(sizes, C, S, W, HAS_SIZES, BLOCK_S)
    total = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    for first in range(0, C, BLOCK_C):
        channel = (first + tl.arange(0, BLOCK_C)[:, None]).to(tl.int64)
        total += tl.load(x + base + channel * S, mask=use & (channel < C), other=0.0).to(tl.float32)
    x_mean = tl.sum(total, axis=0)[None, :] / C
    total = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    rest = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    for first in range(0, C, BLOCK_C):
        channel = (first + tl.arange(0, BLOCK_C)[:, None]).to(tl.int64)
        mask = use & (channel < C)
        x_centered = tl.load(x + base + channel * S, mask=mask, other=0.0).to(tl.float32) - x_mean
        x_centered = tl.where(mask, x_centered, 0.0)
        total += x_centered * x_centered
        rest += x_centered
    # shift corrects both moments for the rounding of the mean.
    shift = tl.sum(rest, axis=0)[None, :] / C
    x_mean += shift
    x_rstd = tl.rsqrt(tl.sum(total, axis=0)[None, :] / C - shift * shift + eps)
    for first in range(0, C, BLOCK_C):
        channel, mask, w, b = _channels(first, C, use, weight, bias, BLOCK_C)
        x_hat = (tl.load(x + base + channel * S, mask=mask, other=0.0).to(tl.float32) - x_mean) * x_rstd
        result = gelu(x_hat * w + b)
        if HAS_SIZES:
            result = tl.where(use, result, 0.0)
        tl.store(y + base + channel * S, result.to(y.dtype.element_ty), mask=exists & (channel < C))
    if HAS_SIZES:
        x_rstd = tl.where(use, x_rstd, 0.0)
    tl.store(mean + row, x_mean, mask=exists)
    tl.store(rstd + row, x_rstd, mask=exists)


@triton.jit(do_not_specialize=["W"])
def _layer_norm_gelu_bwd_nchw_kernel(
    dy, x, weight, bias, sizes, mean, rstd, dx, sums, C, S, W, HAS_SIZES: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dy, x, dx: (B, C, S); weight, bias: (C,); mean, rstd: (B, S); sums: (programs, 2, C), of dz and dz * x_hat."""
    row, base, exists, use = _columns(sizes, C, S, W, HAS_SIZES, BLOCK_S)
    # Padding: rstd, x_hat and dz are zero, so every gradient is.
    x_mean = tl.load(mean + row, mask=use, other=0.0)
    x_rstd = tl.load(rstd + row, mask=use, other=0.0)
    a = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    k = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    for first in range(0, C, BLOCK_C):
        channel, mask, w, b = _channels(first, C, use, weight, bias, BLOCK_C)
        x_hat, dz = norm_gelu_gradient(dy, x, base + channel * S, mask, x_mean, x_rstd, w, b)
        out = sums + tl.program_id(0).to(tl.int64) * 2 * C + channel
        tl.store(out, tl.sum(dz, axis=1)[:, None], mask=channel < C)
        tl.store(out + C, tl.sum(dz * x_hat, axis=1)[:, None], mask=channel < C)
        a += dz * w
        k += dz * w * x_hat
    a_mean = tl.sum(a, axis=0)[None, :] / C
    k_mean = tl.sum(k, axis=0)[None, :] / C
    for first in range(0, C, BLOCK_C):
        channel, mask, w, b = _channels(first, C, use, weight, bias, BLOCK_C)
        x_hat, dz = norm_gelu_gradient(dy, x, base + channel * S, mask, x_mean, x_rstd, w, b)
        result = x_rstd * (dz * w - a_mean - x_hat * k_mean)
        tl.store(dx + base + channel * S, result.to(dx.dtype.element_ty), mask=exists & (channel < C))


def _row_blocks(channels: int, tile: int) -> dict[str, int]:
    width = triton.next_power_of_2(channels)
    return {"BLOCK_M": max(1, tile // width), "BLOCK_C": width, "num_warps": 8}


def launch_layer_norm_gelu_fwd(x, weight, bias, sizes, eps, nhwc, y, mean, rstd):
    """Fill y (as x), mean and rstd (B, H, W) float32 from dense x (B, C, H, W), weight and bias (C,) float32."""
    batch, channels, height, width = x.shape
    positions, has_sizes = height * width, sizes is not None
    tensors = (x, weight, bias, sizes, y, mean, rstd)
    # With sizes, positions take registers too: half the tile.
    if nhwc:
        rows, options = batch * positions, _row_blocks(channels, _TILE // 2 if has_sizes else _TILE)
        grid = (triton.cdiv(rows, options["BLOCK_M"]),)
        _layer_norm_gelu_fwd_nhwc_kernel[grid](
            *tensors, rows, channels, positions, width, eps, HAS_SIZES=has_sizes, **options
        )
    else:
        grid = (batch * triton.cdiv(positions, _BLOCK_S),)
        options = {"HAS_SIZES": has_sizes, "BLOCK_C": _BLOCK_C, "BLOCK_S": _BLOCK_S, "num_warps": 8 if has_sizes else 4}
        _layer_norm_gelu_fwd_nchw_kernel[grid](*tensors, channels, positions, width, eps, **options)


def launch_layer_norm_gelu_bwd(dy, x, weight, bias, sizes, mean, rstd, nhwc, dx, dparameters):
    """Fill dx (as x), dparameters (2, C) float32, of bias and of weight; dy and x dense with the same strides."""
    batch, channels, height, width = x.shape
    positions, has_sizes = height * width, sizes is not None
    if nhwc:
        rows, options = batch * positions, _row_blocks(channels, _TILE // 2) | {"HAS_SIZES": has_sizes}
        tiles = triton.cdiv(rows, options["BLOCK_M"])
        steps = triton.cdiv(tiles, _MOST_PARTS)
        programs = triton.cdiv(tiles, steps)
    else:
        options = {"HAS_SIZES": has_sizes, "BLOCK_C": _BLOCK_C, "BLOCK_S": _BLOCK_S, "num_warps": 8}
        programs = batch * triton.cdiv(positions, _BLOCK_S)
    sums = torch.empty((programs, 2, channels), dtype=torch.float32, device=x.device)
    tensors = (dy, x, weight, bias, sizes, mean, rstd, dx, sums)
    if nhwc:
        _layer_norm_gelu_bwd_nhwc_kernel[(programs,)](*tensors, rows, channels, positions, width, steps, **options)
    else:
        _layer_norm_gelu_bwd_nchw_kernel[(programs,)](*tensors, channels, positions, width, **options)
    torch.sum(sums, 0, out=dparameters)
