"""Batch norm and ReLU on a GPU through Triton.

The cells of a batch are counted through, map after map; a tile is some cells of some channels: of many channels where
memory is channels_last (NHWC), of one otherwise. Sums over cells are made of the sums of programs, in their order.

Of the kernels that sum, numbers tell whether there are a ReLU and sizes: one compilation serves all calls. Those that
write a map are compiled for each: there a number costs instructions for every element. So are NCHW maps with sizes:
behind a branch, Triton would not see that neighboring cells are valid together and may be loaded at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_common import merge_moments, split_tiles, start

# Elements that a program's registers hold at once, and the widest tile (NHWC).
_TILE = 4096
_WIDEST = 64
# The most programs that sum: four for each of the 132 multiprocessors of an H100 or H200, one wave.
_MOST_PARTS = 528

_VARYING = ["M", "S", "W"]


@triton.jit
def _tile(tile, sizes, has_sizes, M, C, S, W, NHWC: tl.constexpr, SHIFT: tl.constexpr, BLOCK_R: tl.constexpr,
          BLOCK_C: tl.constexpr):  # fmt: skip
    """Offsets (cells, channels) of a tile, which of its cells exist, and which are valid too."""
    # NCHW: the compiler loads neighboring cells together if it sees that 2**SHIFT divides where a channel starts.
    cells, positions = M >> SHIFT << SHIFT, S >> SHIFT << SHIFT
    cell = start(tile, BLOCK_R) + tl.arange(0, BLOCK_R)[:, None]
    here = cell < cells
    use = here
    if sizes is not None and has_sizes != 0:
        sample = cell // positions
        position = cell % positions
        row = position // W
        size = sizes + 2 * sample.to(tl.int64)
        use = here & (row < tl.load(size, mask=here, other=0))
        use = use & (position - row * W < tl.load(size + 1, mask=here, other=0))
    channel, _ = _channels(C, BLOCK_C)
    offs = cell.to(tl.int64) * C + channel
    if not NHWC:
        offs = ((cell // positions).to(tl.int64) * C + channel) * positions + cell % positions
    return offs, here, use


@triton.jit
def _channels(C, BLOCK_C: tl.constexpr):
    """Channels of a program, and which exist."""
    channel = start(tl.program_id(1), BLOCK_C) + tl.arange(0, BLOCK_C)[None, :]
    return channel, channel < C


@triton.jit(do_not_specialize=[*_VARYING, "has_sizes", "steps"])
def _batch_norm_moments_kernel(
    x, parts, sizes, has_sizes, M, C, S, W, steps, NHWC: tl.constexpr, SHIFT: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x: M cells of C channels; parts: (programs, 3 * C + 1) float32: means, sums of squared deviations, count, and
    what rounding left off the means.

    A program has `steps` tiles. Each number of a tile sums x - pivot, its first valid x, and the squares: these are
    at most steps + 1 times the squared deviations, so that little cancels.
    """
    channel, channel_mask = _channels(C, BLOCK_C)
    count = tl.zeros((BLOCK_R, 1), tl.float32)
    pivot = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for step in range(steps):
        tile = start(tl.program_id(0), steps) + step
        offs, _, use = _tile(tile, sizes, has_sizes, M, C, S, W, NHWC, SHIFT, BLOCK_R, BLOCK_C)
        value = tl.load(x + offs, mask=use & channel_mask, other=0.0).to(tl.float32)
        pivot = tl.where(count == 0, value, pivot)
        rest = tl.where(use, value - pivot, 0.0)
        total += rest
        squares += rest * rest
        count += use.to(tl.float32)
    shift = total / tl.maximum(count, 1.0)
    count_all, mean, rest, m2 = merge_moments(count, pivot, shift, squares - total * shift, 0)
    out = parts + tl.program_id(0).to(tl.int64) * (C.to(tl.int64) * 3 + 1) + channel
    tl.store(out, mean[None, :], mask=channel_mask)
    tl.store(out + C, m2[None, :], mask=channel_mask)
    tl.store(out + C + C, count_all[None, :], mask=channel == 0)
    tl.store(out + C + C + 1, rest[None, :], mask=channel_mask)


@triton.jit(do_not_specialize=["P", "of_programs", "unbiased"])
def _batch_norm_statistics_kernel(
    parts, out, P, C, eps, of_programs, unbiased, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Moments of parts -> of all, in float64.

    of_programs: parts (P, 3 * C + 1) of the moments' kernel -> out (2 * C + 1,): means, sums of squared deviations,
    count. Else parts (P, 2 * C + 1), each such a result -> out (3 * C + 1,): mean, rstd, variance to keep, 1 / total.
    """
    channel = start(tl.program_id(0), BLOCK_C) + tl.arange(0, BLOCK_C)[None, :]
    mask = channel < C
    stride = C.to(tl.int64) * tl.where(of_programs != 0, 3, 2) + 1
    # Means are counted from that of the first part: they differ by less than their size.
    center = tl.load(parts + channel, mask=mask, other=0.0).to(tl.float64)
    count = tl.zeros((BLOCK_P, 1), tl.float64)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
    for first in range(0, P, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)[:, None]
        at = parts + part.to(tl.int64) * stride
        n = tl.load(at + C + C, mask=part < P, other=0.0).to(tl.float64)
        here = (part < P) & mask
        off = tl.load(at + channel, mask=here, other=0.0).to(tl.float64) - center
        off += tl.load(at + C + C + 1 + channel, mask=mask & (part < P * of_programs), other=0.0).to(tl.float64)
        m2 = tl.load(at + C + channel, mask=here, other=0.0).to(tl.float64)
        count += n
        total += n * off
        squares += m2 + n * off * off
    n = tl.sum(count, axis=0)[None, :]
    inverse = tl.where(n > 0.0, 1.0 / tl.where(n > 0.0, n, 1.0), 0.0)
    shift = tl.sum(total, axis=0)[None, :] * inverse
    m2 = tl.sum(squares, axis=0)[None, :] - n * shift * shift
    variance = m2 * inverse
    kept = tl.where(unbiased != 0, m2 / tl.maximum(n - 1.0, 1.0), variance).to(tl.float32)
    rstd = tl.rsqrt(variance.to(tl.float32) + eps)
    tl.store(out + channel, (center + shift).to(tl.float32), mask=mask)
    tl.store(out + C + channel, tl.where(of_programs != 0, m2.to(tl.float32), rstd), mask=mask)
    third = tl.where(of_programs != 0, n.to(tl.float32), kept)
    tl.store(out + C + C + channel, third, mask=channel < tl.where(of_programs != 0, 1, C))
    tl.store(out + C + C + C + channel, inverse.to(tl.float32), mask=channel < 1 - of_programs)


@triton.jit
def _parameters(weight, bias, mean, rstd, channel, mask):
    """Weight * rstd, bias, mean and rstd of channels."""
    w = tl.load(weight + channel, mask=mask, other=0.0)
    b = tl.load(bias + channel, mask=mask, other=0.0)
    scale = tl.load(rstd + channel, mask=mask, other=0.0)
    return w * scale, b, tl.load(mean + channel, mask=mask, other=0.0), scale


@triton.jit(do_not_specialize=_VARYING)
def _batch_norm_fwd_kernel(
    x, weight, bias, mean, rstd, y, sizes, M, C, S, W, RELU: tl.constexpr, NHWC: tl.constexpr, SHIFT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x, y: M cells of C channels; weight, bias, mean, rstd: (C,). A program has one tile."""
    channel, channel_mask = _channels(C, BLOCK_C)
    offs, here, use = _tile(tl.program_id(0), sizes, 1, M, C, S, W, NHWC, SHIFT, BLOCK_R, BLOCK_C)
    value = tl.load(x + offs, mask=use & channel_mask, other=0.0).to(tl.float32)
    gain, b, center, _ = _parameters(weight, bias, mean, rstd, channel, channel_mask)
    result = (value - center) * gain + b
    if RELU:
        result = tl.where(result < 0.0, 0.0, result)
    if sizes is not None:
        result = tl.where(use, result, 0.0)
    tl.store(y + offs, result.to(y.dtype.element_ty), mask=here & channel_mask)


@triton.jit(do_not_specialize=[*_VARYING, "has_sizes", "relu", "steps"])
def _batch_norm_sums_kernel(
    dy, x, weight, bias, mean, rstd, parts, sizes, has_sizes, M, C, S, W, relu, steps, NHWC: tl.constexpr,
    SHIFT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dy, x: M cells of C channels; parts: (programs, 2, C) float32, sums of dz and of dz * x_hat over steps tiles."""
    channel, channel_mask = _channels(C, BLOCK_C)
    gain, b, center, scale = _parameters(weight, bias, mean, rstd, channel, channel_mask)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    product = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for step in range(steps):
        tile = start(tl.program_id(0), steps) + step
        offs, _, use = _tile(tile, sizes, has_sizes, M, C, S, W, NHWC, SHIFT, BLOCK_R, BLOCK_C)
        centered = tl.load(x + offs, mask=use & channel_mask, other=0.0).to(tl.float32) - center
        dz = tl.load(dy + offs, mask=use & channel_mask, other=0.0).to(tl.float32)
        dz = tl.where((relu != 0) & (centered * gain + b <= 0.0), 0.0, dz)
        total += dz
        product += dz * tl.where(use, centered * scale, 0.0)
    out = parts + tl.program_id(0).to(tl.int64) * 2 * C + channel
    tl.store(out, tl.sum(total, axis=0)[None, :], mask=channel_mask)
    tl.store(out + C, tl.sum(product, axis=0)[None, :], mask=channel_mask)


@triton.jit(do_not_specialize=_VARYING)
def _batch_norm_bwd_kernel(
    dy, x, weight, bias, mean, rstd, means, dx, sizes, M, C, S, W, RELU: tl.constexpr, NHWC: tl.constexpr,
    SHIFT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dy, x, dx: M cells of C channels; means: (2, C), of dz and of dz * x_hat. A program has one tile."""
    channel, channel_mask = _channels(C, BLOCK_C)
    offs, here, use = _tile(tl.program_id(0), sizes, 1, M, C, S, W, NHWC, SHIFT, BLOCK_R, BLOCK_C)
    dz = tl.load(dy + offs, mask=use & channel_mask, other=0.0).to(tl.float32)
    centered = tl.load(x + offs, mask=use & channel_mask, other=0.0).to(tl.float32)
    gain, b, center, scale = _parameters(weight, bias, mean, rstd, channel, channel_mask)
    a = tl.load(means + channel, mask=channel_mask, other=0.0)
    k = tl.load(means + C + channel, mask=channel_mask, other=0.0)
    centered -= center
    if RELU:
        dz = tl.where(centered * gain + b <= 0.0, 0.0, dz)
    result = gain * (dz - a - centered * scale * k)
    if sizes is not None:
        result = tl.where(use, result, 0.0)
    tl.store(dx + offs, result.to(dx.dtype.element_ty), mask=here & channel_mask)


def _layout(x, sizes, nhwc):
    """Numbers and constants of a kernel, its tiles of cells, and its tiles of channels."""
    batch, channels, height, width = x.shape
    positions = height * width
    block_c = min(triton.next_power_of_2(channels), _WIDEST) if nhwc else 1
    # Where cells or channels are loaded one by one, to know where each is takes registers too.
    block_r = (_TILE if (channels % 16 == 0 if nhwc else sizes is None) else _TILE // 2) // block_c
    numbers = batch * positions, channels, positions, width
    shift = 0 if nhwc or positions % 16 else 4
    options = {"NHWC": nhwc, "SHIFT": shift, "BLOCK_R": block_r, "BLOCK_C": block_c, "num_warps": 8}
    return numbers, options, triton.cdiv(batch * positions, block_r), triton.cdiv(channels, block_c)


def _sizes_of_sums(x, sizes, nhwc):
    """Sizes, or what takes their place, and whether they are there."""
    none = torch.empty(0, dtype=torch.int32, device=x.device) if nhwc and sizes is None else sizes
    return none, int(sizes is not None)


def _combine(parts, out, channels, eps=0.0, of_programs=False, unbiased=False):
    _batch_norm_statistics_kernel[(triton.cdiv(channels, 8),)](
        parts, out, len(parts), channels, eps, int(of_programs), int(unbiased), BLOCK_P=64, BLOCK_C=8
    )


def launch_batch_norm_moments(x, sizes, nhwc, moments):
    """Fill moments (2 * C + 1,) float32 from dense x (N, C, H, W); sizes (N, 2) int32 or None."""
    numbers, options, tiles, across = _layout(x, sizes, nhwc)
    programs, steps = split_tiles(tiles, across, _MOST_PARTS)
    parts = torch.empty((programs, 3 * x.shape[1] + 1), dtype=torch.float32, device=x.device)
    _batch_norm_moments_kernel[(programs, across)](
        x, parts, *_sizes_of_sums(x, sizes, nhwc), *numbers, steps, **options
    )
    _combine(parts, moments, x.shape[1], of_programs=True)


def launch_batch_norm_statistics(parts, eps, unbiased, statistics):
    """Fill statistics (3 * C + 1,) from dense parts (P, 2 * C + 1), both float32."""
    _combine(parts, statistics, parts.shape[1] // 2, eps, unbiased=unbiased)


def launch_batch_norm_fwd(x, weight, bias, mean, rstd, sizes, relu, nhwc, y):
    """Fill y (as x) from dense x (N, C, H, W), float32 (C,) parameters, sizes (N, 2) int32 or None."""
    numbers, options, tiles, across = _layout(x, sizes, nhwc)
    _batch_norm_fwd_kernel[(tiles, across)](x, weight, bias, mean, rstd, y, sizes, *numbers, RELU=relu, **options)


def launch_batch_norm_sums(dy, x, weight, bias, mean, rstd, sizes, relu, nhwc, sums):
    """Fill sums (2, C) float32; dy and x dense with the same strides."""
    numbers, options, tiles, across = _layout(x, sizes, nhwc)
    programs, steps = split_tiles(tiles, across, _MOST_PARTS)
    parts = torch.empty((programs, 2, x.shape[1]), dtype=torch.float32, device=x.device)
    tensors = dy, x, weight, bias, mean, rstd, parts, *_sizes_of_sums(x, sizes, nhwc)
    _batch_norm_sums_kernel[(programs, across)](*tensors, *numbers, int(relu), steps, **options)
    torch.sum(parts, 0, out=sums)


def launch_batch_norm_bwd(dy, x, weight, bias, mean, rstd, means, sizes, relu, nhwc, dx):
    """Fill dx (as x) from means (2, C) float32; dy and x dense with the same strides."""
    numbers, options, tiles, across = _layout(x, sizes, nhwc)
    tensors = dy, x, weight, bias, mean, rstd, means, dx, sizes
    _batch_norm_bwd_kernel[(tiles, across)](*tensors, *numbers, RELU=relu, **options)
