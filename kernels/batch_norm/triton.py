"""Batch norm and ReLU on a GPU through Triton.

The cells of a batch are counted through, map after map; a tile is some cells of some channels: of many channels where
memory is channels_last (NHWC), of one otherwise. Sums over cells are made of the sums of programs, in their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_common import start

# Elements that a program's registers hold at once, the widest tile (NHWC), and the most programs that share a channel.
_TILE = 4096
_WIDEST = 64
_MOST_PARTS = 512


@triton.jit
def _tile(tile, M, C, S, W, sizes, NHWC: tl.constexpr, SHIFT: tl.constexpr, HAS_SIZES: tl.constexpr,
          BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Offsets (cells, channels) of a tile, which of them exist, which are valid too, its channels and their mask."""
    # NCHW: the compiler loads neighboring cells together if it sees that 2**SHIFT divides where a channel starts.
    cells, positions = M >> SHIFT << SHIFT, S >> SHIFT << SHIFT
    cell = start(tile, BLOCK_R) + tl.arange(0, BLOCK_R)[:, None]
    channel = start(tl.program_id(1), BLOCK_C) + tl.arange(0, BLOCK_C)[None, :]
    here = cell < cells
    use = here
    if HAS_SIZES:
        sample = cell // positions
        position = cell % positions
        row = position // W
        size = sizes + 2 * sample.to(tl.int64)
        use = here & (row < tl.load(size, mask=here, other=0))
        use = use & (position - row * W < tl.load(size + 1, mask=here, other=0))
    offs = cell.to(tl.int64) * C + channel
    if not NHWC:
        offs = ((cell // positions).to(tl.int64) * C + channel) * positions + cell % positions
    return offs, here & (channel < C), use & (channel < C), channel, channel < C


@triton.jit
def _merge(count, mean, rest, m2, n, part_mean, part_rest, part_m2):
    """Moments of two sets of numbers -> those of both (Chan, Golub, LeVeque 1979).

    A mean is mean + rest: rounding a large mean loses as much as small values of x_centered.
    """
    both = tl.maximum(count + n, 1.0)
    share = n / both
    delta = part_mean - mean + (part_rest - rest)
    step = delta * share
    # Knuth's sum: total + lost is mean + step exactly.
    total = mean + step
    part = total - mean
    lost = mean - (total - part) + (step - part)
    first = count == 0
    mean, rest = tl.where(first, part_mean, total), tl.where(first, part_rest, rest + lost)
    return count + n, mean, rest, m2 + part_m2 + delta * delta * (count * share)


@triton.jit(do_not_specialize=["M", "S", "W", "steps"])
def _batch_norm_moments_kernel(
    x, sizes, parts, M, C, S, W, steps, NHWC: tl.constexpr, SHIFT: tl.constexpr,
    HAS_SIZES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x: M cells of C channels; parts: (programs, 4, C) float32: count, mean and its rest, sum of squared deviations.

    A program has steps tiles.
    """
    count = tl.zeros((1, BLOCK_C), tl.float32)
    mean = tl.zeros((1, BLOCK_C), tl.float32)
    rest = tl.zeros((1, BLOCK_C), tl.float32)
    m2 = tl.zeros((1, BLOCK_C), tl.float32)
    for step in range(steps):
        tile = start(tl.program_id(0), steps) + step
        offs, _, mask, _, _ = _tile(tile, M, C, S, W, sizes, NHWC, SHIFT, HAS_SIZES, BLOCK_R, BLOCK_C)
        value = tl.load(x + offs, mask=mask, other=0.0).to(tl.float32)
        n = tl.sum(mask.to(tl.float32), axis=0)[None, :]
        divisor = tl.maximum(n, 1.0)
        tile_mean = tl.sum(value, axis=0)[None, :] / divisor
        centered = tl.where(mask, value - tile_mean, 0.0)
        tile_rest = tl.sum(centered, axis=0)[None, :] / divisor
        tile_m2 = tl.sum(centered * centered, axis=0)[None, :] - n * tile_rest * tile_rest
        count, mean, rest, m2 = _merge(count, mean, rest, m2, n, tile_mean, tile_rest, tile_m2)
    channel = start(tl.program_id(1), BLOCK_C) + tl.arange(0, BLOCK_C)[None, :]
    out = parts + tl.program_id(0).to(tl.int64) * 4 * C + channel
    tl.store(out, count, mask=channel < C)
    tl.store(out + C, mean, mask=channel < C)
    tl.store(out + C + C, rest, mask=channel < C)
    tl.store(out + C + C + C, m2, mask=channel < C)


@triton.jit(do_not_specialize=["P"])
def _batch_norm_moments_combine_kernel(parts, moments, P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """parts (P, 4, C) -> moments (2 * C + 1,): means, sums of squared deviations, count."""
    channel = start(tl.program_id(0), BLOCK_C) + tl.arange(0, BLOCK_C)[None, :]
    channel_mask = channel < C
    count = tl.zeros((1, BLOCK_C), tl.float32)
    mean = tl.zeros((1, BLOCK_C), tl.float32)
    rest = tl.zeros((1, BLOCK_C), tl.float32)
    m2 = tl.zeros((1, BLOCK_C), tl.float32)
    for first in range(0, P, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)[:, None]
        mask = (part < P) & channel_mask
        at = parts + part.to(tl.int64) * 4 * C + channel
        counts = tl.load(at, mask=mask, other=0.0)
        means = tl.load(at + C, mask=mask, other=0.0)
        rests = tl.load(at + C + C, mask=mask, other=0.0)
        m2s = tl.load(at + C + C + C, mask=mask, other=0.0)
        filled = counts > 0
        n = tl.sum(counts, axis=0)[None, :]
        # Differences from one part's mean: adding up large means would lose what they differ in.
        near = tl.where(n > 0, tl.max(tl.where(filled, means, float("-inf")), axis=0)[None, :], 0.0)
        off = tl.where(filled, means - near + rests, 0.0)
        near_rest = tl.sum(counts * off, axis=0)[None, :] / tl.maximum(n, 1.0)
        centered = tl.where(filled, off - near_rest, 0.0)
        near_m2 = tl.sum(m2s + counts * centered * centered, axis=0)[None, :]
        count, mean, rest, m2 = _merge(count, mean, rest, m2, n, near, near_rest, near_m2)
    tl.store(moments + channel, mean + rest, mask=channel_mask)
    tl.store(moments + C + channel, m2, mask=channel_mask)
    tl.store(moments + C + C + channel, count, mask=channel == 0)


@triton.jit
def _batch_norm_statistics_kernel(parts, out, P, C, eps, UNBIASED: tl.constexpr, BLOCK_C: tl.constexpr):
    """parts (P, 2 * C + 1) -> out (3 * C + 1,): mean, rstd, variance to keep, 1 / total; in float64, part by part."""
    channel = start(tl.program_id(0), BLOCK_C) + tl.arange(0, BLOCK_C)
    mask = channel < C
    row = C.to(tl.int64) * 2 + 1
    total = tl.zeros((1,), tl.float64)
    mean = tl.zeros((BLOCK_C,), tl.float64)
    for part in range(P):
        at = parts + part * row
        weight = tl.load(at + row - 1 + tl.arange(0, 1)).to(tl.float64)
        total += weight
        mean += weight * tl.load(at + channel, mask=mask, other=0.0).to(tl.float64)
    inverse = tl.where(total > 0.0, 1.0 / tl.where(total > 0.0, total, 1.0), 0.0)
    mean *= inverse
    m2 = tl.zeros((BLOCK_C,), tl.float64)
    for part in range(P):
        at = parts + part * row
        weight = tl.load(at + row - 1 + tl.arange(0, 1)).to(tl.float64)
        off = tl.load(at + channel, mask=mask, other=0.0).to(tl.float64) - mean
        m2 += tl.load(at + C + channel, mask=mask, other=0.0).to(tl.float64) + weight * off * off
    variance = m2 * inverse
    kept = variance
    if UNBIASED:
        kept = m2 / tl.maximum(total - 1.0, 1.0)
    tl.store(out + channel, mean.to(tl.float32), mask=mask)
    tl.store(out + C + channel, tl.rsqrt(variance.to(tl.float32) + eps), mask=mask)
    tl.store(out + C + C + channel, kept.to(tl.float32), mask=mask)
    first = tl.arange(0, 1) + tl.program_id(0) == 0
    tl.store(out + C + C + C + tl.arange(0, 1), inverse.to(tl.float32), mask=first)


@triton.jit
def _parameters(weight, bias, mean, rstd, channel, mask):
    """Weight, bias, mean and rstd of channels."""
    w = tl.load(weight + channel, mask=mask, other=0.0)
    b = tl.load(bias + channel, mask=mask, other=0.0)
    return w, b, tl.load(mean + channel, mask=mask, other=0.0), tl.load(rstd + channel, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["M", "S", "W"])
def _batch_norm_fwd_kernel(
    x, weight, bias, mean, rstd, sizes, y, M, C, S, W, RELU: tl.constexpr, NHWC: tl.constexpr,
    SHIFT: tl.constexpr, HAS_SIZES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x, y: M cells of C channels; weight, bias, mean, rstd: (C,). A program has one tile."""
    offs, here, use, channel, channel_mask = _tile(
        tl.program_id(0), M, C, S, W, sizes, NHWC, SHIFT, HAS_SIZES, BLOCK_R, BLOCK_C
    )
    value = tl.load(x + offs, mask=use, other=0.0).to(tl.float32)
    w, b, center, scale = _parameters(weight, bias, mean, rstd, channel, channel_mask)
    result = (value - center) * (w * scale) + b
    if RELU:
        result = tl.where(result < 0.0, 0.0, result)
    if HAS_SIZES:
        result = tl.where(use, result, 0.0)
    tl.store(y + offs, result.to(y.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["M", "S", "W", "steps"])
def _batch_norm_sums_kernel(
    dy, x, weight, bias, mean, rstd, sizes, parts, M, C, S, W, steps, RELU: tl.constexpr, NHWC: tl.constexpr,
    SHIFT: tl.constexpr, HAS_SIZES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dy, x: M cells of C channels; parts: (programs, 2, C) float32, sums of dz and of dz * x_hat over steps tiles."""
    channel = start(tl.program_id(1), BLOCK_C) + tl.arange(0, BLOCK_C)[None, :]
    w, b, center, scale = _parameters(weight, bias, mean, rstd, channel, channel < C)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    product = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for step in range(steps):
        tile = start(tl.program_id(0), steps) + step
        offs, _, use, _, _ = _tile(tile, M, C, S, W, sizes, NHWC, SHIFT, HAS_SIZES, BLOCK_R, BLOCK_C)
        centered = tl.load(x + offs, mask=use, other=0.0).to(tl.float32) - center
        dz = tl.load(dy + offs, mask=use, other=0.0).to(tl.float32)
        if RELU:
            dz = tl.where(centered * (w * scale) + b <= 0.0, 0.0, dz)
        total += dz
        product += dz * tl.where(use, centered * scale, 0.0)
    out = parts + tl.program_id(0).to(tl.int64) * 2 * C + channel
    tl.store(out, tl.sum(total, axis=0)[None, :], mask=channel < C)
    tl.store(out + C, tl.sum(product, axis=0)[None, :], mask=channel < C)


@triton.jit(do_not_specialize=["M", "S", "W"])
def _batch_norm_bwd_kernel(
    dy, x, weight, bias, mean, rstd, means, sizes, dx, M, C, S, W, RELU: tl.constexpr, NHWC: tl.constexpr,
    SHIFT: tl.constexpr, HAS_SIZES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dy, x, dx: M cells of C channels; means: (2, C), of dz and of dz * x_hat. A program has one tile."""
    offs, here, use, channel, channel_mask = _tile(
        tl.program_id(0), M, C, S, W, sizes, NHWC, SHIFT, HAS_SIZES, BLOCK_R, BLOCK_C
    )
    dz = tl.load(dy + offs, mask=use, other=0.0).to(tl.float32)
    value = tl.load(x + offs, mask=use, other=0.0).to(tl.float32)
    w, b, center, scale = _parameters(weight, bias, mean, rstd, channel, channel_mask)
    a = tl.load(means + channel, mask=channel_mask, other=0.0)
    k = tl.load(means + C + channel, mask=channel_mask, other=0.0)
    centered = value - center
    if RELU:
        dz = tl.where(centered * (w * scale) + b <= 0.0, 0.0, dz)
    result = w * scale * (dz - a - centered * scale * k)
    if HAS_SIZES:
        result = tl.where(use, result, 0.0)
    tl.store(dx + offs, result.to(dx.dtype.element_ty), mask=here)


def _layout(x, sizes, nhwc):
    """Numbers and constants of a kernel, its tiles of cells, and its tiles of channels."""
    batch, channels, height, width = x.shape
    positions = height * width
    block_c = min(triton.next_power_of_2(channels), _WIDEST) if nhwc else 1
    # With sizes a thread takes half as much at once: to know where it is takes registers too.
    block_r = (_TILE if sizes is None else _TILE // 2) // block_c
    numbers = batch * positions, channels, positions, width
    shift = 0 if nhwc or positions % 16 else 4
    options = {"NHWC": nhwc, "SHIFT": shift, "HAS_SIZES": sizes is not None, "BLOCK_R": block_r, "BLOCK_C": block_c}
    options["num_warps"] = 8
    return numbers, options, triton.cdiv(batch * positions, block_r), triton.cdiv(channels, block_c)


def launch_batch_norm_moments(x, sizes, nhwc, moments):
    """Fill moments (2 * C + 1,) float32 from dense x (N, C, H, W); sizes (N, 2) int32 or None."""
    numbers, options, tiles, across = _layout(x, sizes, nhwc)
    steps = triton.cdiv(tiles, _MOST_PARTS)
    programs, channels = triton.cdiv(tiles, steps), x.shape[1]
    parts = torch.empty((programs, 4, channels), dtype=torch.float32, device=x.device)
    _batch_norm_moments_kernel[(programs, across)](x, sizes, parts, *numbers, steps, **options)
    grid, blocks = (triton.cdiv(channels, 8),), {"BLOCK_P": 64, "BLOCK_C": 8}
    _batch_norm_moments_combine_kernel[grid](parts, moments, programs, channels, **blocks)


def launch_batch_norm_statistics(parts, eps, unbiased, statistics):
    """Fill statistics (3 * C + 1,) from dense parts (P, 2 * C + 1), both float32."""
    channels = parts.shape[1] // 2
    grid, options = (triton.cdiv(channels, 128),), {"UNBIASED": unbiased, "BLOCK_C": 128, "num_warps": 4}
    _batch_norm_statistics_kernel[grid](parts, statistics, len(parts), channels, eps, **options)


def launch_batch_norm_fwd(x, weight, bias, mean, rstd, sizes, relu, nhwc, y):
    """Fill y (as x) from dense x (N, C, H, W), float32 (C,) parameters, sizes (N, 2) int32 or None."""
    numbers, options, tiles, across = _layout(x, sizes, nhwc)
    _batch_norm_fwd_kernel[(tiles, across)](x, weight, bias, mean, rstd, sizes, y, *numbers, RELU=relu, **options)


def launch_batch_norm_sums(dy, x, weight, bias, mean, rstd, sizes, relu, nhwc, sums):
    """Fill sums (2, C) float32; dy and x dense with the same strides."""
    numbers, options, tiles, across = _layout(x, sizes, nhwc)
    steps = triton.cdiv(tiles, _MOST_PARTS)
    programs = triton.cdiv(tiles, steps)
    parts = torch.empty((programs, 2, x.shape[1]), dtype=torch.float32, device=x.device)
    tensors = dy, x, weight, bias, mean, rstd, sizes, parts
    _batch_norm_sums_kernel[(programs, across)](*tensors, *numbers, steps, RELU=relu, **options)
    torch.sum(parts, 0, out=sums)


def launch_batch_norm_bwd(dy, x, weight, bias, mean, rstd, means, sizes, relu, nhwc, dx):
    """Fill dx (as x) from means (2, C) float32; dy and x dense with the same strides."""
    numbers, options, tiles, across = _layout(x, sizes, nhwc)
    tensors = dy, x, weight, bias, mean, rstd, means, sizes, dx
    _batch_norm_bwd_kernel[(tiles, across)](*tensors, *numbers, RELU=relu, **options)
