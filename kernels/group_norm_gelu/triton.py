"""GroupNorm with one group and exact GELU on a GPU through Triton.

A sample is too large for one program, so several share it: each writes the mean and the sum of squared deviations of
its part, and whoever needs the sample's statistics combines the parts (Chan, Golub, LeVeque 1979).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_gelu import gelu, gelu_derivative

# Elements that a program's registers hold at once, and the most programs that share a sample: a power of two.
_TILE = 4096
_MOST_PARTS = 256


@triton.jit
def _group_norm_gelu_moments_kernel(x, moments, N, parts, per_part, BLOCK: tl.constexpr):
    """x: (B, N); moments: (B, parts, 2) float32, mean and sum of squared deviations of per_part elements."""
    program = tl.program_id(0).to(tl.int64)
    part = program % parts
    x += (program // parts) * N
    count, mean, m2 = 0.0, 0.0, 0.0
    begin = part * per_part
    for offset in range(0, per_part, BLOCK):
        at = begin + offset + tl.arange(0, BLOCK)
        inside = at < N
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        # A part has at least one element, but its last blocks may have none.
        n = tl.minimum(tl.maximum(N - begin - offset, 0), BLOCK).to(tl.float32)
        block_mean = tl.sum(value) / tl.maximum(n, 1.0)
        deviation = tl.where(inside, value - block_mean, 0.0)
        both = tl.maximum(count + n, 1.0)
        delta = block_mean - mean
        m2 += tl.sum(deviation * deviation) + delta * delta * (count * n / both)
        mean += delta * (n / both)
        count += n
    tl.store(moments + 2 * program, mean)
    tl.store(moments + 2 * program + 1, m2)


@triton.jit
def _combine(moments, N, parts, per_part, eps, PARTS: tl.constexpr):
    """Mean and rstd of a sample from moments (parts, 2)."""
    part = tl.arange(0, PARTS)
    inside = part < parts
    means = tl.load(moments + 2 * part, mask=inside, other=0.0)
    m2s = tl.load(moments + 2 * part + 1, mask=inside, other=0.0)
    left = N - part.to(tl.int64) * per_part
    counts = tl.where(inside, tl.minimum(left, per_part), 0).to(tl.float32)
    # Deviations from the first part's mean: adding up large means would lose what they differ in.
    first = tl.sum(tl.where(part == 0, means, 0.0))
    mean = first + tl.sum(counts * tl.where(inside, means - first, 0.0)) / N
    deviation = tl.where(inside, means - mean, 0.0)
    m2 = tl.sum(m2s + counts * deviation * deviation)
    return mean, tl.rsqrt(m2 / N + eps)


@triton.jit
def _group_norm_gelu_fwd_kernel(
    x,
    weight,
    bias,
    moments,
    y,
    mean_out,
    rstd_out,
    C,
    S,
    tiles,
    parts,
    per_part,
    eps,
    NHWC: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PARTS: tl.constexpr,
):
    """x, y: (B, S, C) if NHWC else (B, C, S); weight, bias: (C,); moments: (B, parts, 2); mean, rstd: (B,).

    A program has one tile of a sample: BLOCK_S positions, and all channels (NHWC) or one (BLOCK_C = 1).
    """
    program = tl.program_id(0).to(tl.int64)
    sample = program // tiles
    tile = program % tiles
    size = tl.cast(C, tl.int64) * S
    mean, rstd = _combine(moments + 2 * sample * parts, size, parts, per_part, eps, PARTS)
    if tile == 0:
        tl.store(mean_out + sample, mean)
        tl.store(rstd_out + sample, rstd)
    x += sample * size
    y += sample * size
    at, inside, channel, channel_inside = _tile(tile, C, S, NHWC, BLOCK_S, BLOCK_C)
    w = tl.load(weight + channel, mask=channel_inside, other=0.0)
    b = tl.load(bias + channel, mask=channel_inside, other=0.0)
    xhat = (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
    tl.store(y + at, gelu(xhat * w + b).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _tile(tile, C, S, NHWC: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets and mask (positions, channels) of a tile within its sample, and its channels with their mask."""
    channel = tl.arange(0, BLOCK_C)[None, :]
    if NHWC:
        position = tile * BLOCK_S + tl.arange(0, BLOCK_S)[:, None]
        at = position * C + channel
    else:
        blocks = tl.cdiv(S, BLOCK_S)
        position = (tile % blocks) * BLOCK_S + tl.arange(0, BLOCK_S)[:, None]
        channel = channel + tile // blocks
        at = channel.to(tl.int64) * S + position
    return at, (position < S) & (channel < C), channel, channel < C


@triton.jit
def _group_norm_gelu_bwd_sums_kernel(
    dy,
    x,
    weight,
    bias,
    mean,
    rstd,
    sums,
    C,
    S,
    tiles,
    steps,
    NHWC: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dy, x: (B, S, C) if NHWC else (B, C, S); sums: (B, parts, 2, C) float32, of dz and of dz * xhat.

    A program has steps * BLOCK_S positions and all channels (NHWC) or one (BLOCK_C = 1); tiles such make a sample.
    """
    program = tl.program_id(0).to(tl.int64)
    sample = program // tiles
    tile = program % tiles
    size = tl.cast(C, tl.int64) * S
    dy += sample * size
    x += sample * size
    center = tl.load(mean + sample)
    scale = tl.load(rstd + sample)
    column = tl.arange(0, BLOCK_C)[None, :]
    parts = tiles
    part = tile
    if not NHWC:
        parts = tiles // C
        part = tile % parts
        column = column + tile // parts
    channel_inside = column < C
    w = tl.load(weight + column, mask=channel_inside, other=0.0)
    b = tl.load(bias + column, mask=channel_inside, other=0.0)
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    product = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for step in range(steps):
        position = (part * steps + step) * BLOCK_S + tl.arange(0, BLOCK_S)[:, None]
        inside = (position < S) & channel_inside
        at = position * C + column if NHWC else column.to(tl.int64) * S + position
        xhat = (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - center) * scale
        dz = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32) * gelu_derivative(xhat * w + b)
        dz = tl.where(inside, dz, 0.0)
        total += dz
        product += dz * tl.where(inside, xhat, 0.0)
    out = sums + (sample * parts + part) * 2 * C + column
    row = tl.sum(total, axis=0)[None, :]
    tl.store(out, row, mask=channel_inside)
    row = tl.sum(product, axis=0)[None, :]
    tl.store(out + C, row, mask=channel_inside)


@triton.jit
def _group_norm_gelu_bwd_combine_kernel(
    sums, weight, totals, means, C, S, parts, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """sums: (B, parts, 2, C) -> totals: (B, 2, C); means: (B, 2), of weight * dz and of weight * dz * xhat."""
    sample = tl.program_id(0).to(tl.int64)
    sums += sample * parts * 2 * C
    totals += sample * 2 * C
    a, k = 0.0, 0.0
    for first in range(0, C, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)[None, :]
        inside = channel < C
        dz = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        product = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for begin in range(0, parts, BLOCK_P):
            part = begin + tl.arange(0, BLOCK_P)[:, None]
            at = part.to(tl.int64) * 2 * C + channel
            dz += tl.load(sums + at, mask=inside & (part < parts), other=0.0)
            product += tl.load(sums + at + C, mask=inside & (part < parts), other=0.0)
        dz_row = tl.sum(dz, axis=0)[None, :]
        product_row = tl.sum(product, axis=0)[None, :]
        w = tl.load(weight + channel, mask=inside, other=0.0)
        tl.store(totals + channel, dz_row, mask=inside)
        tl.store(totals + C + channel, product_row, mask=inside)
        a += tl.sum(dz_row * w)
        k += tl.sum(product_row * w)
    size = tl.cast(C, tl.float32) * S
    tl.store(means + 2 * sample, a / size)
    tl.store(means + 2 * sample + 1, k / size)


@triton.jit
def _group_norm_gelu_bwd_dx_kernel(
    dy,
    x,
    weight,
    bias,
    mean,
    rstd,
    means,
    dx,
    C,
    S,
    tiles,
    NHWC: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dy, x, dx: (B, S, C) if NHWC else (B, C, S); weight, bias: (C,); mean, rstd: (B,); means: (B, 2)."""
    program = tl.program_id(0).to(tl.int64)
    sample = program // tiles
    size = tl.cast(C, tl.int64) * S
    dy += sample * size
    x += sample * size
    dx += sample * size
    scale = tl.load(rstd + sample)
    a = tl.load(means + 2 * sample)
    k = tl.load(means + 2 * sample + 1)
    at, inside, channel, channel_inside = _tile(program % tiles, C, S, NHWC, BLOCK_S, BLOCK_C)
    w = tl.load(weight + channel, mask=channel_inside, other=0.0)
    b = tl.load(bias + channel, mask=channel_inside, other=0.0)
    xhat = (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - tl.load(mean + sample)) * scale
    dz = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32) * gelu_derivative(xhat * w + b)
    tl.store(dx + at, (scale * (dz * w - a - xhat * k)).to(dx.dtype.element_ty), mask=inside)


def _blocks(channels: int, nhwc: bool, tile: int = _TILE) -> tuple[int, int]:
    """Positions and channels of a tile."""
    if not nhwc:
        return tile // 2, 1
    width = triton.next_power_of_2(channels)
    return max(1, tile // width), width


def _sizes(x: torch.Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], x.shape[2] * x.shape[3]


def launch_group_norm_gelu_fwd(x, weight, bias, eps, nhwc, y, mean, rstd):
    """Fill y (as x), mean and rstd (B,) float32 from dense x (B, C, H, W), weight and bias (C,) float32."""
    batch, channels, positions = _sizes(x)
    size = channels * positions
    parts = min(_MOST_PARTS, triton.cdiv(size, _TILE))
    per_part = triton.cdiv(triton.cdiv(size, parts), _TILE) * _TILE
    parts = triton.cdiv(size, per_part)
    moments = torch.empty((batch, parts, 2), dtype=torch.float32, device=x.device)
    _group_norm_gelu_moments_kernel[(batch * parts,)](x, moments, size, parts, per_part, BLOCK=_TILE, num_warps=8)
    block_s, block_c = _blocks(channels, nhwc)
    tiles = triton.cdiv(positions, block_s) * (1 if nhwc else channels)
    _group_norm_gelu_fwd_kernel[(batch * tiles,)](
        x,
        weight,
        bias,
        moments,
        y,
        mean,
        rstd,
        channels,
        positions,
        tiles,
        parts,
        per_part,
        eps,
        NHWC=nhwc,
        BLOCK_S=block_s,
        BLOCK_C=block_c,
        PARTS=triton.next_power_of_2(parts),
        num_warps=8 if nhwc else 4,
    )


def launch_group_norm_gelu_bwd(dy, x, weight, bias, mean, rstd, nhwc, dx, dweight, dbias):
    """Fill dx (as x), dweight and dbias (C,) float32; dy and x dense with the same strides."""
    batch, channels, positions = _sizes(x)
    # Half as much at once as forward: the sums take registers too.
    block_s, block_c = _blocks(channels, nhwc, _TILE // 2)
    blocks = triton.cdiv(positions, block_s)
    steps = triton.cdiv(blocks, _MOST_PARTS if nhwc else 16)
    parts = triton.cdiv(blocks, steps)
    sums = torch.empty((batch, parts, 2, channels), dtype=torch.float32, device=x.device)
    totals = torch.empty((batch, 2, channels), dtype=torch.float32, device=x.device)
    means = torch.empty((batch, 2), dtype=torch.float32, device=x.device)
    tiles = parts * (1 if nhwc else channels)
    blocks_of = {"NHWC": nhwc, "BLOCK_S": block_s, "BLOCK_C": block_c, "num_warps": 8 if nhwc else 4}
    _group_norm_gelu_bwd_sums_kernel[(batch * tiles,)](
        dy, x, weight, bias, mean, rstd, sums, channels, positions, tiles, steps, **blocks_of
    )
    _group_norm_gelu_bwd_combine_kernel[(batch,)](
        sums, weight, totals, means, channels, positions, parts, BLOCK_P=32, BLOCK_C=64, num_warps=4
    )
    tiles = blocks * (1 if nhwc else channels)
    _group_norm_gelu_bwd_dx_kernel[(batch * tiles,)](
        dy, x, weight, bias, mean, rstd, means, dx, channels, positions, tiles, **blocks_of
    )
    torch.sum(totals[:, 0], 0, out=dbias)
    torch.sum(totals[:, 1], 0, out=dweight)
