"""GroupNorm with one group and exact GELU on a GPU through Triton.

Several programs share a sample: each writes count, mean and m2, the sum of squared x - mean, of its part. Every program
of the next kernel combines them (Chan, Golub, LeVeque 1979).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_common import gelu, gelu_derivative, start, valid_mask

# Elements that a program's registers hold at once, and the most programs that share a sample: a power of two.
_TILE = 4096
_MOST_PARTS = 256


@triton.jit
def _group_norm_gelu_moments_kernel(
    x, sizes, moments, rows, width, W, S, parts, per_part, HAS_SIZES: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x: (B, rows, width); sizes: (B, 2); moments: (B, parts, 3) float32: count, mean, m2.

    per_part counts rows; with sizes, row r is position r % S of a map of W columns.
    """
    program = tl.program_id(0)
    sample = (program // parts).to(tl.int64)
    x += sample * rows * width
    column = tl.arange(0, BLOCK_C)[None, :]
    lane = tl.arange(0, BLOCK_S)[:, None]
    count, mean, m2 = 0.0, 0.0, 0.0
    begin = (program % parts).to(tl.int64) * per_part
    for offset in range(0, per_part, BLOCK_S):
        first = begin + offset
        row = first + lane
        mask = (row < rows) & (column < width)
        if HAS_SIZES:
            mask &= valid_mask(((first % S).to(tl.int32) + lane) % S, sizes + 2 * sample, W)
            n = tl.sum(mask.to(tl.float32))
        else:
            # The last blocks of a part may have no rows.
            n = (tl.minimum(tl.maximum(rows - first, 0), BLOCK_S) * width).to(tl.float32)
        value = tl.load(x + row * width + column, mask=mask, other=0.0).to(tl.float32)
        block_mean = tl.sum(value) / tl.maximum(n, 1.0)
        x_centered = tl.where(mask, value - block_mean, 0.0)
        both = tl.maximum(count + n, 1.0)
        delta = block_mean - mean
        m2 += tl.sum(x_centered * x_centered) + delta * delta * (count * n / both)
        mean += delta * (n / both)
        count += n
    moments += 3 * program.to(tl.int64)
    tl.store(moments, count)
    tl.store(moments + 1, mean)
    tl.store(moments + 2, m2)


@triton.jit
def _combine(moments, parts, eps, PARTS: tl.constexpr):
    """Mean and rstd of a sample from moments (parts, 3)."""
    part = tl.arange(0, PARTS)
    mask = part < parts
    counts = tl.load(moments + 3 * part, mask=mask, other=0.0)
    means = tl.load(moments + 3 * part + 1, mask=mask, other=0.0)
    m2s = tl.load(moments + 3 * part + 2, mask=mask, other=0.0)
    count = tl.sum(counts)
    # Relative to the first part's mean: the sum of large means would round off their differences.
    first = tl.sum(tl.where(part == 0, means, 0.0))
    mean = first + tl.sum(counts * (means - first)) / count
    x_centered = means - mean
    m2 = tl.sum(m2s + counts * x_centered * x_centered)
    return mean, tl.rsqrt(m2 / count + eps)


@triton.jit
def _group_norm_gelu_fwd_kernel(
    x, weight, bias, sizes, moments, y, mean_out, rstd_out, C, S, W, tiles, parts, eps, NHWC: tl.constexpr,
    HAS_SIZES: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """x, y: (B, S, C) if NHWC else (B, C, S); weight, bias: (C,); moments: (B, parts, 3); mean, rstd: (B,).

    A program takes one tile of a sample: BLOCK_S positions, and all channels (NHWC) or one (BLOCK_C = 1).
    """
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    size = tl.cast(C, tl.int64) * S
    mean, rstd = _combine(moments + 3 * sample * parts, parts, eps, PARTS)
    if tile == 0:
        tl.store(mean_out + sample, mean)
        tl.store(rstd_out + sample, rstd)
    x += sample * size
    y += sample * size
    offs, mask, position, channel, channel_mask = _tile(tile, C, S, NHWC, BLOCK_S, BLOCK_C)
    use = mask
    if HAS_SIZES:
        use = mask & valid_mask(position, sizes + 2 * sample, W)
    w = tl.load(weight + channel, mask=channel_mask, other=0.0)
    b = tl.load(bias + channel, mask=channel_mask, other=0.0)
    x_hat = (tl.load(x + offs, mask=use, other=0.0).to(tl.float32) - mean) * rstd
    result = gelu(x_hat * w + b, y.dtype.element_ty)
    if HAS_SIZES:
        result = tl.where(use, result, 0.0)
    tl.store(y + offs, result.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _tile(tile, C, S, NHWC: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets and mask (positions, channels) of a tile in its sample, its positions, its channels and their mask."""
    channel = tl.arange(0, BLOCK_C)[None, :]
    if NHWC:
        position = start(tile, BLOCK_S) + tl.arange(0, BLOCK_S)[:, None]
        offs = position.to(tl.int64) * C + channel
    else:
        blocks = tl.cdiv(S, BLOCK_S)
        position = start(tile % blocks, BLOCK_S) + tl.arange(0, BLOCK_S)[:, None]
        channel = channel + tile // blocks
        offs = channel.to(tl.int64) * S + position
    return offs, (position < S) & (channel < C), position, channel, channel < C


@triton.jit
def _group_norm_gelu_bwd_sums_kernel(
    dy, x, weight, bias, sizes, mean, rstd, sums, C, S, W, tiles, steps, NHWC: tl.constexpr, HAS_SIZES: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dy, x: (B, S, C) if NHWC else (B, C, S); sums: (B, parts, 2, C) float32, of dz and of dz * x_hat.

    A program takes steps * BLOCK_S positions and all channels (NHWC) or one (BLOCK_C = 1); `tiles` make a sample.
    """
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    size = tl.cast(C, tl.int64) * S
    dy += sample * size
    x += sample * size
    x_mean = tl.load(mean + sample)
    x_rstd = tl.load(rstd + sample)
    column = tl.arange(0, BLOCK_C)[None, :]
    parts = tiles
    part = tile
    if not NHWC:
        parts = tiles // C
        part = tile % parts
        column = column + tile // parts
    channel_mask = column < C
    w = tl.load(weight + column, mask=channel_mask, other=0.0)
    b = tl.load(bias + column, mask=channel_mask, other=0.0)
    db = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    dw = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for step in range(steps):
        position = start(start(part, steps) + step, BLOCK_S) + tl.arange(0, BLOCK_S)[:, None]
        mask = (position < S) & channel_mask
        if HAS_SIZES:
            mask &= valid_mask(position, sizes + 2 * sample, W)
        offs = position.to(tl.int64) * C + column if NHWC else column.to(tl.int64) * S + position
        x_hat = (tl.load(x + offs, mask=mask, other=0.0).to(tl.float32) - x_mean) * x_rstd
        dz = tl.load(dy + offs, mask=mask, other=0.0).to(tl.float32) * gelu_derivative(
            x_hat * w + b, dy.dtype.element_ty
        )
        dz = tl.where(mask, dz, 0.0)
        db += dz
        dw += dz * tl.where(mask, x_hat, 0.0)
    out = sums + (sample * parts + part) * 2 * C + column
    row = tl.sum(db, axis=0)[None, :]
    tl.store(out, row, mask=channel_mask)
    row = tl.sum(dw, axis=0)[None, :]
    tl.store(out + C, row, mask=channel_mask)


@triton.jit
def _group_norm_gelu_bwd_combine_kernel(
    sums, weight, sizes, totals, means, C, S, parts, HAS_SIZES: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sums: (B, parts, 2, C) -> totals: (B, 2, C); means: (B, 2), of weight * dz and of weight * dz * x_hat."""
    sample = tl.program_id(0).to(tl.int64)
    sums += sample * parts * 2 * C
    totals += sample * 2 * C
    a, k = 0.0, 0.0
    for first in range(0, C, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)[None, :]
        mask = channel < C
        dz = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        dw = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for begin in range(0, parts, BLOCK_P):
            part = begin + tl.arange(0, BLOCK_P)[:, None]
            offs = part.to(tl.int64) * 2 * C + channel
            dz += tl.load(sums + offs, mask=mask & (part < parts), other=0.0)
            dw += tl.load(sums + offs + C, mask=mask & (part < parts), other=0.0)
        db_row = tl.sum(dz, axis=0)[None, :]
        dw_row = tl.sum(dw, axis=0)[None, :]
        w = tl.load(weight + channel, mask=mask, other=0.0)
        tl.store(totals + channel, db_row, mask=mask)
        tl.store(totals + C + channel, dw_row, mask=mask)
        a += tl.sum(db_row * w)
        k += tl.sum(dw_row * w)
    size = tl.cast(C, tl.float32) * S
    if HAS_SIZES:
        size = tl.cast(C, tl.float32) * tl.load(sizes + 2 * sample) * tl.load(sizes + 2 * sample + 1)
    tl.store(means + 2 * sample, a / size)
    tl.store(means + 2 * sample + 1, k / size)


@triton.jit
def _group_norm_gelu_bwd_dx_kernel(
    dy, x, weight, bias, sizes, mean, rstd, means, dx, C, S, W, tiles, NHWC: tl.constexpr, HAS_SIZES: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dy, x, dx: (B, S, C) if NHWC else (B, C, S); weight, bias: (C,); mean, rstd: (B,); means: (B, 2)."""
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    size = tl.cast(C, tl.int64) * S
    dy += sample * size
    x += sample * size
    dx += sample * size
    x_rstd = tl.load(rstd + sample)
    a = tl.load(means + 2 * sample)
    k = tl.load(means + 2 * sample + 1)
    offs, mask, position, channel, channel_mask = _tile(tile, C, S, NHWC, BLOCK_S, BLOCK_C)
    use = mask
    if HAS_SIZES:
        use = mask & valid_mask(position, sizes + 2 * sample, W)
    w = tl.load(weight + channel, mask=channel_mask, other=0.0)
    b = tl.load(bias + channel, mask=channel_mask, other=0.0)
    x_hat = (tl.load(x + offs, mask=use, other=0.0).to(tl.float32) - tl.load(mean + sample)) * x_rstd
    dz = tl.load(dy + offs, mask=use, other=0.0).to(tl.float32) * gelu_derivative(x_hat * w + b, dy.dtype.element_ty)
    result = x_rstd * (dz * w - a - x_hat * k)
    if HAS_SIZES:
        result = tl.where(use, result, 0.0)
    tl.store(dx + offs, result.to(dx.dtype.element_ty), mask=mask)


def _blocks(channels: int, nhwc: bool, tile: int = _TILE) -> tuple[int, int]:
    """Positions and channels of a tile."""
    if not nhwc:
        return tile // 2, 1
    width = triton.next_power_of_2(channels)
    return max(1, tile // width), width


def launch_group_norm_gelu_fwd(x, weight, bias, sizes, eps, nhwc, y, mean, rstd):
    """Fill y (as x), mean and rstd (B,) float32 from dense x (B, C, H, W), weight and bias (C,) float32."""
    batch, channels, height, width = x.shape
    positions, has_sizes = height * width, sizes is not None
    # Only NHWC with sizes needs (S, C) tiles: else a sample is one long row of numbers.
    by_position = has_sizes and nhwc
    # With sizes, the positions of a tile's numbers take registers too: half the tile.
    block_s, block_c = _blocks(channels, True) if by_position else (_TILE // 2 if has_sizes else _TILE, 1)
    rows, row_width = (positions, channels) if by_position else (positions * channels, 1)
    parts = min(_MOST_PARTS, triton.cdiv(rows, block_s))
    per_part = triton.cdiv(triton.cdiv(rows, parts), block_s) * block_s
    parts = triton.cdiv(rows, per_part)
    moments = torch.empty((batch, parts, 3), dtype=torch.float32, device=x.device)
    _group_norm_gelu_moments_kernel[(batch * parts,)](
        x, sizes, moments, rows, row_width, width, positions, parts, per_part, HAS_SIZES=has_sizes, BLOCK_S=block_s,
        BLOCK_C=block_c, num_warps=8,
    )  # fmt: skip
    block_s, block_c = _blocks(channels, nhwc)
    tiles = triton.cdiv(positions, block_s) * (1 if nhwc else channels)
    _group_norm_gelu_fwd_kernel[(batch * tiles,)](
        x, weight, bias, sizes, moments, y, mean, rstd, channels, positions, width, tiles, parts, eps, NHWC=nhwc,
        HAS_SIZES=has_sizes, BLOCK_S=block_s, BLOCK_C=block_c, PARTS=triton.next_power_of_2(parts),
        num_warps=8 if nhwc else 4,
    )  # fmt: skip


def launch_group_norm_gelu_bwd(dy, x, weight, bias, sizes, mean, rstd, nhwc, dx, dparameters):
    """Fill dx (as x), dparameters (2, C) float32, of bias and of weight; dy and x dense with the same strides."""
    batch, channels, height, width = x.shape
    positions, has_sizes = height * width, sizes is not None
    # The sums take registers too: half of forward's tile.
    block_s, block_c = _blocks(channels, nhwc, _TILE // 2)
    blocks = triton.cdiv(positions, block_s)
    steps = triton.cdiv(blocks, _MOST_PARTS if nhwc else 16)
    parts = triton.cdiv(blocks, steps)
    sums = torch.empty((batch, parts, 2, channels), dtype=torch.float32, device=x.device)
    totals = torch.empty((batch, 2, channels), dtype=torch.float32, device=x.device)
    means = torch.empty((batch, 2), dtype=torch.float32, device=x.device)
    tiles = parts * (1 if nhwc else channels)
    options = {"NHWC": nhwc, "HAS_SIZES": has_sizes, "BLOCK_S": block_s, "BLOCK_C": block_c}
    options["num_warps"] = 8 if nhwc else 4
    _group_norm_gelu_bwd_sums_kernel[(batch * tiles,)](
        dy, x, weight, bias, sizes, mean, rstd, sums, channels, positions, width, tiles, steps, **options
    )
    _group_norm_gelu_bwd_combine_kernel[(batch,)](
        sums, weight, sizes, totals, means, channels, positions, parts, HAS_SIZES=has_sizes, BLOCK_P=32, BLOCK_C=32,
        num_warps=4,
    )  # fmt: skip
    tiles = blocks * (1 if nhwc else channels)
    _group_norm_gelu_bwd_dx_kernel[(batch * tiles,)](
        dy, x, weight, bias, sizes, mean, rstd, means, dx, channels, positions, width, tiles, **options
    )
    torch.sum(totals, 0, out=dparameters)
