"""GroupNorm with one group and exact GELU on a GPU through Triton.

Several programs share a sample: each writes the moments of its part, and one program a sample combines them (Chan,
Golub, LeVeque 1979); so it is with the gradients' sums. Parts depend on a sample's size alone, so its result does not
depend on the rest of the batch.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..triton_common import gelu, merge_moments, norm_gelu_gradient, split_tiles, start, valid_mask

# Rows and columns of a tile, a number of the tile for each vector lane of 8 warps: see _tile.
_ROWS, _COLUMNS = tl.constexpr(8), tl.constexpr(256)
# The most numbers of a row of several positions (NHWC).
_LONGEST_ROW = 8192
# Tiles of a program that writes a map.
_STEPS = 4
# The most programs a sample that sum: four for each of the 132 multiprocessors of an H100 or H200, one wave.
_PROGRAMS = 528
# Rows and columns that a program of the second sum reads at once.
_SUM_ROWS, _SUM_COLUMNS = 64, 32

# Sizes that change with the images and the stages: one that is a multiple of 16 must not compile a kernel again.
_VARYING = ["S", "W", "C", "programs", "parts", "steps", "columns"]


@triton.jit
def _program(tiles, C, ROW: tl.constexpr, NHWC: tl.constexpr):
    """Sample, tile and block of a program: neighbors are of one row."""
    blocks = tl.cdiv(ROW, _COLUMNS) if NHWC else C
    row = tl.program_id(0) // blocks
    return (row // tiles).to(tl.int64), row % tiles, tl.program_id(0) % blocks


@triton.jit
def _tile(
    tile, block, sample, sizes, S, W, C, ROW: tl.constexpr, VECTOR: tl.constexpr, NHWC: tl.constexpr,
    HAS_SIZES: tl.constexpr,
):  # fmt: skip
    """A tile of a sample, (_ROWS, _COLUMNS / VECTOR, VECTOR): offsets, what exists and what is valid.

    NHWC: a row is ROW numbers, some positions of all channels, which whole blocks of _COLUMNS fill; VECTOR divides C.
    NCHW: a row is _COLUMNS positions of the channel ``block``; VECTOR divides S. So vectors exist or not as a whole.
    """
    row = tl.arange(0, _ROWS)[:, None, None]
    column = tl.arange(0, _COLUMNS // VECTOR)[None, :, None] * VECTOR
    lane = tl.arange(0, VECTOR)[None, None, :]
    if NHWC:
        column += block * _COLUMNS
        length = _multiple(C, VECTOR) * S
        number = tile.to(tl.int64) * (_ROWS * ROW) + (row * ROW + column)
        offs = sample * length + (number + lane)
        exists = number < length
        if ROW // _COLUMNS * _COLUMNS != ROW:
            exists &= column < ROW
    else:
        position = start(tile, _ROWS * _COLUMNS) + row * _COLUMNS + column
        exists = position < S
        position += lane
        length = _multiple(S, VECTOR)
        offs = (sample * C + block) * length + position
    valid = exists
    if HAS_SIZES:
        if NHWC:
            position = start(tile, _ROWS * (ROW // C)) + row * (ROW // C) + column // C
        valid = exists & valid_mask(position, sizes + 2 * sample, W)
    return offs, exists, valid


@triton.jit
def _multiple(number, VECTOR: tl.constexpr):
    """``number`` in int64; tells the compiler that VECTOR divides it."""
    return (number // VECTOR).to(tl.int64) * VECTOR


@triton.jit
def _affine(weight, bias, block, C, VECTOR: tl.constexpr, NHWC: tl.constexpr):
    """Weight and bias of a tile's channels, of its shape, so that every thread loads what it needs; NCHW: numbers."""
    channel = block
    if NHWC:
        column = block * _COLUMNS + tl.arange(0, _COLUMNS // VECTOR)[None, :, None] * VECTOR
        channel = tl.multiple_of(column % C, (1, 1, VECTOR)) + tl.arange(0, VECTOR)[None, None, :]
        channel += tl.zeros((_ROWS, 1, 1), tl.int32)
    return tl.load(weight + channel), tl.load(bias + channel)


@triton.jit(do_not_specialize=_VARYING)
def _group_norm_gelu_moments_kernel(
    x, sizes, moments, S, W, parts, steps, C, ROW: tl.constexpr, VECTOR: tl.constexpr,
    NHWC: tl.constexpr, HAS_SIZES: tl.constexpr,
):  # fmt: skip
    """x: (B, S, C) if NHWC else (B, C, S); sizes: (B, 2); moments: (programs, 3) float32: count, mean, m2.

    A program takes `steps` tiles. Each number of a tile sums x - pivot, its first valid x, and the squares: these are
    at most steps + 1 times m2, so that little cancels.
    """
    sample, part, block = _program(parts, C, ROW, NHWC)
    count = tl.zeros((_ROWS, _COLUMNS // VECTOR, VECTOR if HAS_SIZES and not NHWC else 1), tl.float32)
    pivot = tl.zeros((_ROWS, _COLUMNS // VECTOR, VECTOR), tl.float32)
    total = tl.zeros((_ROWS, _COLUMNS // VECTOR, VECTOR), tl.float32)
    squares = tl.zeros((_ROWS, _COLUMNS // VECTOR, VECTOR), tl.float32)
    for step in tl.range(0, steps, loop_unroll_factor=4):
        tile = start(part, steps) + step
        offs, _, valid = _tile(tile, block, sample, sizes, S, W, C, ROW, VECTOR, NHWC, HAS_SIZES)
        value = tl.load(x + offs, mask=valid, other=0.0).to(tl.float32)
        pivot = tl.where(count == 0, value, pivot)
        rest = tl.where(valid, value - pivot, 0.0)
        total += rest
        squares += rest * rest
        count += valid.to(tl.float32)
    count += tl.zeros_like(total)
    shift = total / tl.maximum(count, 1.0)
    count_all, mean, rest, m2 = merge_moments(count, pivot, shift, squares - total * shift, None)
    moments += 3 * tl.program_id(0).to(tl.int64)
    tl.store(moments, count_all)
    tl.store(moments + 1, mean + rest)
    tl.store(moments + 2, m2)


@triton.jit(do_not_specialize=_VARYING)
def _group_norm_gelu_statistics_kernel(moments, mean, rstd, parts, eps, PARTS: tl.constexpr):
    """moments: (B, parts, 3) -> mean, rstd: (B,)."""
    sample = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    moments += 3 * (sample * parts + part)
    mask = part < parts
    count = tl.load(moments, mask=mask, other=0.0)
    part_mean = tl.load(moments + 1, mask=mask, other=0.0)
    part_m2 = tl.load(moments + 2, mask=mask, other=0.0)
    total, x_mean, rest, m2 = merge_moments(count, part_mean, 0.0, part_m2, None)
    tl.store(mean + sample, x_mean + rest)
    tl.store(rstd + sample, tl.rsqrt(m2 / total + eps))


@triton.jit(do_not_specialize=_VARYING)
def _group_norm_gelu_fwd_kernel(
    x, weight, bias, sizes, mean, rstd, y, S, W, programs, steps, C, ROW: tl.constexpr,
    VECTOR: tl.constexpr, NHWC: tl.constexpr, HAS_SIZES: tl.constexpr,
):  # fmt: skip
    """x, y: (B, S, C) if NHWC else (B, C, S); weight, bias: (C,); mean, rstd: (B,). A program takes `steps` tiles."""
    sample, first, block = _program(programs, C, ROW, NHWC)
    w, b = _affine(weight, bias, block, C, VECTOR, NHWC)
    x_mean = tl.load(mean + sample)
    scale = tl.load(rstd + sample) * w
    for step in range(steps):
        tile = start(first, steps) + step
        offs, exists, valid = _tile(tile, block, sample, sizes, S, W, C, ROW, VECTOR, NHWC, HAS_SIZES)
        value = tl.load(x + offs, mask=valid, other=0.0).to(tl.float32)
        result = gelu((value - x_mean) * scale + b)
        if HAS_SIZES:
            result = tl.where(valid, result, 0.0)
        tl.store(y + offs, result.to(y.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=_VARYING)
def _group_norm_gelu_bwd_sums_kernel(
    dy, x, weight, bias, sizes, mean, rstd, sums, S, W, parts, steps, C, ROW: tl.constexpr,
    VECTOR: tl.constexpr, NHWC: tl.constexpr, HAS_SIZES: tl.constexpr,
):  # fmt: skip
    """dy, x: (B, S, C) if NHWC else (B, C, S); sums: (B, parts, 2, ROW), of dz and of dz * x_hat.

    A program takes `steps` tiles.
    """
    sample, part, block = _program(parts, C, ROW, NHWC)
    w, b = _affine(weight, bias, block, C, VECTOR, NHWC)
    x_mean = tl.load(mean + sample)
    x_rstd = tl.load(rstd + sample)
    db = tl.zeros((_ROWS, _COLUMNS // VECTOR, VECTOR), tl.float32)
    dw = tl.zeros((_ROWS, _COLUMNS // VECTOR, VECTOR), tl.float32)
    for step in range(steps):
        tile = start(part, steps) + step
        offs, _, valid = _tile(tile, block, sample, sizes, S, W, C, ROW, VECTOR, NHWC, HAS_SIZES)
        x_hat, dz = norm_gelu_gradient(dy, x, offs, valid, x_mean, x_rstd, w, b)
        db += dz
        dw += dz * x_hat
    sums += (sample * parts + part) * 2 * ROW
    if NHWC:
        column = tl.arange(0, _COLUMNS // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
        column += block * _COLUMNS
        tl.store(sums + column, tl.sum(db, axis=0), mask=column < ROW)
        tl.store(sums + ROW + column, tl.sum(dw, axis=0), mask=column < ROW)
    else:
        tl.store(sums + block, tl.sum(db))
        tl.store(sums + C + block, tl.sum(dw))


@triton.jit(do_not_specialize=_VARYING)
def _group_norm_gelu_bwd_parts_kernel(sums, totals, parts, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """sums: (B, parts, columns) -> totals: (B, columns)."""
    blocks = tl.cdiv(columns, COLUMNS)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    column = start(tl.program_id(0) % blocks, COLUMNS) + tl.arange(0, COLUMNS)[None, :]
    mask = column < columns
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, parts, ROWS):
        part = first + tl.arange(0, ROWS)[:, None]
        offs = (sample * parts + part) * columns + column
        total += tl.load(sums + offs, mask=mask & (part < parts), other=0.0)
    tl.store(totals + sample * columns + column, tl.sum(total, axis=0)[None, :], mask=mask)


@triton.jit(do_not_specialize=_VARYING)
def _group_norm_gelu_bwd_means_kernel(
    totals, weight, sizes, means, S, C, columns, HAS_SIZES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """totals: (B, 2, columns), column % C is the channel -> means: (B, 2), of weight * dz and weight * dz * x_hat."""
    sample = tl.program_id(0).to(tl.int64)
    totals += sample * 2 * columns
    a = tl.zeros((BLOCK,), tl.float32)
    k = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = column < columns
        w = tl.load(weight + column % C, mask=mask, other=0.0)
        a += w * tl.load(totals + column, mask=mask, other=0.0)
        k += w * tl.load(totals + columns + column, mask=mask, other=0.0)
    count = tl.cast(C, tl.float32) * S
    if HAS_SIZES:
        count = tl.cast(C, tl.float32) * tl.load(sizes + 2 * sample) * tl.load(sizes + 2 * sample + 1)
    tl.store(means + 2 * sample, tl.sum(a) / count)
    tl.store(means + 2 * sample + 1, tl.sum(k) / count)


@triton.jit(do_not_specialize=_VARYING)
def _group_norm_gelu_bwd_dx_kernel(
    dy, x, weight, bias, sizes, mean, rstd, means, dx, S, W, programs, steps, C, ROW: tl.constexpr,
    VECTOR: tl.constexpr, NHWC: tl.constexpr, HAS_SIZES: tl.constexpr,
):  # fmt: skip
    """dy, x, dx: (B, S, C) if NHWC else (B, C, S); mean, rstd: (B,); means: (B, 2). A program takes `steps` tiles."""
    sample, first, block = _program(programs, C, ROW, NHWC)
    w, b = _affine(weight, bias, block, C, VECTOR, NHWC)
    x_mean = tl.load(mean + sample)
    x_rstd = tl.load(rstd + sample)
    a = tl.load(means + 2 * sample)
    k = tl.load(means + 2 * sample + 1)
    for step in range(steps):
        tile = start(first, steps) + step
        offs, exists, valid = _tile(tile, block, sample, sizes, S, W, C, ROW, VECTOR, NHWC, HAS_SIZES)
        x_hat, dz = norm_gelu_gradient(dy, x, offs, valid, x_mean, x_rstd, w, b)
        result = x_rstd * (dz * w - a - x_hat * k)
        if HAS_SIZES:
            result = tl.where(valid, result, 0.0)
        tl.store(dx + offs, result.to(dx.dtype.element_ty), mask=exists)


def _layout(x, sizes, nhwc):
    """Tiles of a block, blocks of a sample, and what all kernels of maps take."""
    channels, positions, width = x.shape[1], x[0, 0].numel(), _COLUMNS.value
    repeat = 1
    if nhwc:
        # The least that blocks fill without a rest, if neither the map ends before nor the row is too long to sum.
        repeat = min(width // math.gcd(channels, width), triton.next_power_of_2(positions))
        while repeat > 1 and repeat * channels > _LONGEST_ROW:
            repeat //= 2
    options = {
        "C": channels, "ROW": repeat * channels, "VECTOR": math.gcd(channels if nhwc else positions, 8), "NHWC": nhwc,
        "HAS_SIZES": sizes is not None, "num_warps": 8,
    }  # fmt: skip
    tiles = triton.cdiv(positions, _ROWS.value * (repeat if nhwc else width))
    return tiles, triton.cdiv(repeat * channels, width) if nhwc else channels, options


def launch_group_norm_gelu_fwd(x, weight, bias, sizes, eps, nhwc, y, mean, rstd):
    """Fill y (as x), mean and rstd (B,) float32 from dense x (B, C, H, W), weight and bias (C,) float32."""
    batch, _, height, width = x.shape
    positions = height * width
    tiles, blocks, options = _layout(x, sizes, nhwc)
    parts, steps = split_tiles(tiles, blocks, _PROGRAMS)
    programs = parts * blocks
    moments = torch.empty((batch, programs, 3), dtype=torch.float32, device=x.device)
    _group_norm_gelu_moments_kernel[(batch * programs,)](x, sizes, moments, positions, width, parts, steps, **options)
    _group_norm_gelu_statistics_kernel[(batch,)](
        moments, mean, rstd, programs, eps, PARTS=max(1024, triton.next_power_of_2(programs)), num_warps=8
    )
    programs = triton.cdiv(tiles, _STEPS)
    _group_norm_gelu_fwd_kernel[(batch * programs * blocks,)](
        x, weight, bias, sizes, mean, rstd, y, positions, width, programs, min(tiles, _STEPS), **options
    )


def launch_group_norm_gelu_bwd(dy, x, weight, bias, sizes, mean, rstd, nhwc, dx, dparameters):
    """Fill dx (as x), dparameters (2, C) float32, of bias and of weight; dy and x dense with the same strides."""
    batch, channels, height, width = x.shape
    positions = height * width
    tiles, blocks, options = _layout(x, sizes, nhwc)
    parts, steps = split_tiles(tiles, blocks, _PROGRAMS)
    columns = options["ROW"]
    sums = torch.empty((batch, parts, 2, columns), dtype=torch.float32, device=x.device)
    means = torch.empty((batch, 2), dtype=torch.float32, device=x.device)
    _group_norm_gelu_bwd_sums_kernel[(batch * parts * blocks,)](
        dy, x, weight, bias, sizes, mean, rstd, sums, positions, width, parts, steps, **options
    )
    totals = sums
    if parts > 1:
        totals = torch.empty((batch, 2, columns), dtype=torch.float32, device=x.device)
        _group_norm_gelu_bwd_parts_kernel[(batch * triton.cdiv(2 * columns, _SUM_COLUMNS),)](
            sums, totals, parts, 2 * columns, ROWS=_SUM_ROWS, COLUMNS=_SUM_COLUMNS, num_warps=4
        )
    _group_norm_gelu_bwd_means_kernel[(batch,)](
        totals, weight, sizes, means, positions, channels, columns, HAS_SIZES=sizes is not None, BLOCK=1024
    )
    programs = triton.cdiv(tiles, _STEPS)
    _group_norm_gelu_bwd_dx_kernel[(batch * programs * blocks,)](
        dy, x, weight, bias, sizes, mean, rstd, means, dx, positions, width, programs, min(tiles, _STEPS), **options
    )
    torch.sum(totals.view(batch, 2, -1, channels), (0, 2), out=dparameters)
