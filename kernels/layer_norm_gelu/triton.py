"""Channel-wise LayerNorm and exact GELU on a GPU through Triton.

Position-major memory: a program holds whole rows of channels. Channel-major: it holds a run of positions and goes over
the channels in steps, again for each of the moments and for the result; what it reads again is in the caches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_gelu import gelu, gelu_derivative

# Elements that a program's registers hold at once; the most programs whose partial gradients are summed (NHWC).
_TILE = 4096
_MOST_PARTS = 512
# Channel-major tile: channels by positions.
_STEP_C = 32
_BLOCK_P = 64


@triton.jit
def _layer_norm_gelu_fwd_nhwc_kernel(
    x, weight, bias, y, mean, rstd, rows, C, eps, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """x, y: (rows, C); weight, bias: (C,); mean, rstd: (rows,) float32."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    channel = tl.arange(0, BLOCK_C)[None, :]
    channel_inside = channel < C
    inside = (row < rows) & channel_inside
    at = row * C + channel
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + channel, mask=channel_inside, other=0.0)
    b = tl.load(bias + channel, mask=channel_inside, other=0.0)
    center = tl.sum(value, axis=1)[:, None] / C
    deviation = tl.where(inside, value - center, 0.0)
    scale = tl.rsqrt(tl.sum(deviation * deviation, axis=1)[:, None] / C + eps)
    tl.store(y + at, gelu(deviation * scale * w + b).to(y.dtype.element_ty), mask=inside)
    tl.store(mean + row, center, mask=row < rows)
    tl.store(rstd + row, scale, mask=row < rows)


@triton.jit
def _layer_norm_gelu_bwd_nhwc_kernel(
    dy, x, weight, bias, mean, rstd, dx, sums, rows, C, steps, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """dy, x, dx: (rows, C); weight, bias: (C,); mean, rstd: (rows,); sums: (programs, 2, C), of dz and dz * xhat."""
    program = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)[None, :]
    channel_inside = channel < C
    w = tl.load(weight + channel, mask=channel_inside, other=0.0)
    b = tl.load(bias + channel, mask=channel_inside, other=0.0)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    product = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for step in range(steps):
        row = (program * steps + step) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        inside = (row < rows) & channel_inside
        at = row * C + channel
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)
        center = tl.load(mean + row, mask=row < rows, other=0.0)
        xhat = tl.where(inside, (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - center) * scale, 0.0)
        dz = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32) * gelu_derivative(xhat * w + b)
        total += dz
        product += dz * xhat
        g = dz * w
        a = tl.sum(g, axis=1)[:, None] / C
        k = tl.sum(g * xhat, axis=1)[:, None] / C
        tl.store(dx + at, (scale * (g - a - xhat * k)).to(dx.dtype.element_ty), mask=inside)
    out = sums + program * 2 * C + channel
    tl.store(out, tl.sum(total, axis=0)[None, :], mask=channel_inside)
    tl.store(out + C, tl.sum(product, axis=0)[None, :], mask=channel_inside)


@triton.jit
def _layer_norm_gelu_fwd_nchw_kernel(
    x, weight, bias, y, mean, rstd, C, S, eps, STEP_C: tl.constexpr, BLOCK_P: tl.constexpr
):
    """x, y: (B, C, S); weight, bias: (C,); mean, rstd: (B, S) float32. A program has BLOCK_P positions."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(S, BLOCK_P)
    sample = program // blocks
    position = (program % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    here = position < S
    base = sample * C * S + position
    total = tl.zeros((STEP_C, BLOCK_P), tl.float32)
    for first in range(0, C, STEP_C):
        channel = (first + tl.arange(0, STEP_C)[:, None]).to(tl.int64)
        total += tl.load(x + base + channel * S, mask=here & (channel < C), other=0.0).to(tl.float32)
    center = tl.sum(total, axis=0)[None, :] / C
    total = tl.zeros((STEP_C, BLOCK_P), tl.float32)
    rest = tl.zeros((STEP_C, BLOCK_P), tl.float32)
    for first in range(0, C, STEP_C):
        channel = (first + tl.arange(0, STEP_C)[:, None]).to(tl.int64)
        inside = here & (channel < C)
        deviation = tl.load(x + base + channel * S, mask=inside, other=0.0).to(tl.float32) - center
        deviation = tl.where(inside, deviation, 0.0)
        total += deviation * deviation
        rest += deviation
    # What rounding left in the mean corrects both moments.
    shift = tl.sum(rest, axis=0)[None, :] / C
    center += shift
    scale = tl.rsqrt(tl.sum(total, axis=0)[None, :] / C - shift * shift + eps)
    for first in range(0, C, STEP_C):
        channel = (first + tl.arange(0, STEP_C)[:, None]).to(tl.int64)
        inside = here & (channel < C)
        w = tl.load(weight + channel, mask=channel < C, other=0.0)
        b = tl.load(bias + channel, mask=channel < C, other=0.0)
        xhat = (tl.load(x + base + channel * S, mask=inside, other=0.0).to(tl.float32) - center) * scale
        tl.store(y + base + channel * S, gelu(xhat * w + b).to(y.dtype.element_ty), mask=inside)
    tl.store(mean + sample * S + position, center, mask=here)
    tl.store(rstd + sample * S + position, scale, mask=here)


@triton.jit
def _layer_norm_gelu_bwd_nchw_kernel(
    dy, x, weight, bias, mean, rstd, dx, sums, C, S, STEP_C: tl.constexpr, BLOCK_P: tl.constexpr
):
    """dy, x, dx: (B, C, S); weight, bias: (C,); mean, rstd: (B, S); sums: (programs, 2, C), of dz and dz * xhat."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(S, BLOCK_P)
    sample = program // blocks
    position = (program % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    here = position < S
    base = sample * C * S + position
    center = tl.load(mean + sample * S + position, mask=here, other=0.0)
    scale = tl.load(rstd + sample * S + position, mask=here, other=0.0)
    a = tl.zeros((STEP_C, BLOCK_P), tl.float32)
    k = tl.zeros((STEP_C, BLOCK_P), tl.float32)
    for first in range(0, C, STEP_C):
        channel = (first + tl.arange(0, STEP_C)[:, None]).to(tl.int64)
        inside = here & (channel < C)
        w = tl.load(weight + channel, mask=channel < C, other=0.0)
        b = tl.load(bias + channel, mask=channel < C, other=0.0)
        xhat = (tl.load(x + base + channel * S, mask=inside, other=0.0).to(tl.float32) - center) * scale
        xhat = tl.where(inside, xhat, 0.0)
        dz = tl.load(dy + base + channel * S, mask=inside, other=0.0).to(tl.float32) * gelu_derivative(xhat * w + b)
        out = sums + program * 2 * C + channel
        tl.store(out, tl.sum(dz, axis=1)[:, None], mask=channel < C)
        tl.store(out + C, tl.sum(dz * xhat, axis=1)[:, None], mask=channel < C)
        a += dz * w
        k += dz * w * xhat
    a_mean = tl.sum(a, axis=0)[None, :] / C
    k_mean = tl.sum(k, axis=0)[None, :] / C
    for first in range(0, C, STEP_C):
        channel = (first + tl.arange(0, STEP_C)[:, None]).to(tl.int64)
        inside = here & (channel < C)
        w = tl.load(weight + channel, mask=channel < C, other=0.0)
        b = tl.load(bias + channel, mask=channel < C, other=0.0)
        xhat = (tl.load(x + base + channel * S, mask=inside, other=0.0).to(tl.float32) - center) * scale
        dz = tl.load(dy + base + channel * S, mask=inside, other=0.0).to(tl.float32) * gelu_derivative(xhat * w + b)
        result = scale * (dz * w - a_mean - xhat * k_mean)
        tl.store(dx + base + channel * S, result.to(dx.dtype.element_ty), mask=inside)


def _row_blocks(channels: int, tile: int = _TILE) -> dict[str, int]:
    width = triton.next_power_of_2(channels)
    return {"BLOCK_R": max(1, tile // width), "BLOCK_C": width, "num_warps": 8}


def launch_layer_norm_gelu_fwd(x, weight, bias, eps, nhwc, y, mean, rstd):
    """Fill y (as x), mean and rstd (B, H, W) float32 from dense x (B, C, H, W), weight and bias (C,) float32."""
    batch, channels, positions = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    if nhwc:
        rows, blocks = batch * positions, _row_blocks(channels)
        grid = (triton.cdiv(rows, blocks["BLOCK_R"]),)
        _layer_norm_gelu_fwd_nhwc_kernel[grid](x, weight, bias, y, mean, rstd, rows, channels, eps, **blocks)
    else:
        grid = (batch * triton.cdiv(positions, _BLOCK_P),)
        _layer_norm_gelu_fwd_nchw_kernel[grid](
            x, weight, bias, y, mean, rstd, channels, positions, eps, STEP_C=_STEP_C, BLOCK_P=_BLOCK_P, num_warps=4
        )


def launch_layer_norm_gelu_bwd(dy, x, weight, bias, mean, rstd, nhwc, dx, dweight, dbias):
    """Fill dx (as x), dweight and dbias (C,) float32; dy and x dense with the same strides."""
    batch, channels, positions = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    if nhwc:
        rows, blocks = batch * positions, _row_blocks(channels, _TILE // 2)
        tiles = triton.cdiv(rows, blocks["BLOCK_R"])
        steps = triton.cdiv(tiles, _MOST_PARTS)
        programs = triton.cdiv(tiles, steps)
        sums = torch.empty((programs, 2, channels), dtype=torch.float32, device=x.device)
        _layer_norm_gelu_bwd_nhwc_kernel[(programs,)](
            dy, x, weight, bias, mean, rstd, dx, sums, rows, channels, steps, **blocks
        )
    else:
        programs = batch * triton.cdiv(positions, _BLOCK_P)
        sums = torch.empty((programs, 2, channels), dtype=torch.float32, device=x.device)
        _layer_norm_gelu_bwd_nchw_kernel[(programs,)](
            dy,
            x,
            weight,
            bias,
            mean,
            rstd,
            dx,
            sums,
            channels,
            positions,
            STEP_C=_STEP_C,
            BLOCK_P=_BLOCK_P,
            num_warps=8,
        )
    torch.sum(sums[:, 0], 0, out=dbias)
    torch.sum(sums[:, 1], 0, out=dweight)
