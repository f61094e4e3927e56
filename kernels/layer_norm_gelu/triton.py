"""Channel-wise LayerNorm and exact GELU on a GPU through Triton.

Position-major memory: a program holds whole rows of channels. Channel-major: it holds a run of positions and goes over
the channels in steps, again for each of the moments and for the result; what it reads again is in the caches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_common import gelu, gelu_derivative, start, valid

# Elements that a program's registers hold at once; the most programs whose partial gradients are summed (NHWC).
_TILE = 4096
_MOST_PARTS = 512
# Channel-major tile: channels by positions.
_STEP_C = 32
_BLOCK_P = 64


@triton.jit
def _layer_norm_gelu_fwd_nhwc_kernel(
    x, weight, bias, sizes, y, mean, rstd, rows, C, S, W, eps, HAS_SIZES: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x, y: (rows, C); weight, bias: (C,); sizes: (rows / S, 2); mean, rstd: (rows,) float32."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_R
    lane = tl.arange(0, BLOCK_R)[:, None]
    row = first + lane
    channel = tl.arange(0, BLOCK_C)[None, :]
    channel_mask = channel < C
    here, use = _valid_rows(first, lane, rows, sizes, S, W, HAS_SIZES)
    mask = use & channel_mask
    offs = row * C + channel
    value = tl.load(x + offs, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + channel, mask=channel_mask, other=0.0)
    b = tl.load(bias + channel, mask=channel_mask, other=0.0)
    x_mean = tl.sum(value, axis=1)[:, None] / C
    x_centered = tl.where(mask, value - x_mean, 0.0)
    # What rounding left in the mean corrects both moments.
    shift = tl.sum(x_centered, axis=1)[:, None] / C
    x_rstd = tl.rsqrt(tl.sum(x_centered * x_centered, axis=1)[:, None] / C - shift * shift + eps)
    x_mean += shift
    result = gelu((value - x_mean) * x_rstd * w + b)
    if HAS_SIZES:
        result = tl.where(use, result, 0.0)
        x_rstd = tl.where(use, x_rstd, 0.0)
    tl.store(y + offs, result.to(y.dtype.element_ty), mask=here & channel_mask)
    tl.store(mean + row, x_mean, mask=here)
    tl.store(rstd + row, x_rstd, mask=here)


@triton.jit
def _valid_rows(first, lane, rows, sizes, S, W, HAS_SIZES: tl.constexpr):
    """Which rows first + lane, S to a sample, exist, and which of them are in the valid area."""
    here = first + lane < rows
    use = here
    if HAS_SIZES:
        # From the sample of the first row on, 32 bits hold every offset.
        offset = (first % S).to(tl.int32) + lane
        size = sizes + 2 * (first // S + offset // S)
        position = offset % S
        row = position // W
        use = here & (row < tl.load(size, mask=here, other=0))
        use = use & (position - row * W < tl.load(size + 1, mask=here, other=0))
    return here, use


@triton.jit
def _layer_norm_gelu_bwd_nhwc_kernel(
    dy, x, weight, bias, sizes, mean, rstd, dx, sums, rows, C, S, W, steps, HAS_SIZES: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dy, x, dx: (rows, C); weight, bias: (C,); mean, rstd: (rows,); sums: (programs, 2, C), of dz and dz * x_hat."""
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_R)[:, None]
    channel = tl.arange(0, BLOCK_C)[None, :]
    channel_mask = channel < C
    w = tl.load(weight + channel, mask=channel_mask, other=0.0)
    b = tl.load(bias + channel, mask=channel_mask, other=0.0)
    db = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    dw = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for step in range(steps):
        first = (program * steps + step) * BLOCK_R
        row = first + lane
        here, use = _valid_rows(first, lane, rows, sizes, S, W, HAS_SIZES)
        mask = use & channel_mask
        offs = row * C + channel
        # Zero where the row is not valid: so are x_hat's rstd and dz, and with them every gradient.
        x_rstd = tl.load(rstd + row, mask=use, other=0.0)
        x_mean = tl.load(mean + row, mask=use, other=0.0)
        x_hat = tl.where(mask, (tl.load(x + offs, mask=mask, other=0.0).to(tl.float32) - x_mean) * x_rstd, 0.0)
        dz = tl.load(dy + offs, mask=mask, other=0.0).to(tl.float32) * gelu_derivative(x_hat * w + b)
        db += dz
        dw += dz * x_hat
        g = dz * w
        a = tl.sum(g, axis=1)[:, None] / C
        k = tl.sum(g * x_hat, axis=1)[:, None] / C
        tl.store(dx + offs, (x_rstd * (g - a - x_hat * k)).to(dx.dtype.element_ty), mask=here & channel_mask)
    out = sums + program * 2 * C + channel
    tl.store(out, tl.sum(db, axis=0)[None, :], mask=channel_mask)
    tl.store(out + C, tl.sum(dw, axis=0)[None, :], mask=channel_mask)


@triton.jit
def _layer_norm_gelu_fwd_nchw_kernel(
    x, weight, bias, sizes, y, mean, rstd, C, S, W, eps, HAS_SIZES: tl.constexpr, STEP_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """x, y: (B, C, S); weight, bias: (C,); sizes: (B, 2); mean, rstd: (B, S) float32. BLOCK_P positions a program."""
    blocks = tl.cdiv(S, BLOCK_P)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    position = start(tl.program_id(0) % blocks, BLOCK_P) + tl.arange(0, BLOCK_P)[None, :]
    here = position < S
    use = here
    if HAS_SIZES:
        use = here & valid(position, sizes + 2 * sample, W)
    base = sample * C * S + position
    total = tl.zeros((STEP_C, BLOCK_P), tl.float32)
    for first in range(0, C, STEP_C):
        channel = (first + tl.arange(0, STEP_C)[:, None]).to(tl.int64)
        total += tl.load(x + base + channel * S, mask=use & (channel < C), other=0.0).to(tl.float32)
    x_mean = tl.sum(total, axis=0)[None, :] / C
    total = tl.zeros((STEP_C, BLOCK_P), tl.float32)
    rest = tl.zeros((STEP_C, BLOCK_P), tl.float32)
    for first in range(0, C, STEP_C):
        channel = (first + tl.arange(0, STEP_C)[:, None]).to(tl.int64)
        mask = use & (channel < C)
        x_centered = tl.load(x + base + channel * S, mask=mask, other=0.0).to(tl.float32) - x_mean
        x_centered = tl.where(mask, x_centered, 0.0)
        total += x_centered * x_centered
        rest += x_centered
    # What rounding left in the mean corrects both moments.
    shift = tl.sum(rest, axis=0)[None, :] / C
    x_mean += shift
    x_rstd = tl.rsqrt(tl.sum(total, axis=0)[None, :] / C - shift * shift + eps)
    for first in range(0, C, STEP_C):
        channel = (first + tl.arange(0, STEP_C)[:, None]).to(tl.int64)
        mask = here & (channel < C)
        w = tl.load(weight + channel, mask=channel < C, other=0.0)
        b = tl.load(bias + channel, mask=channel < C, other=0.0)
        x_hat = (tl.load(x + base + channel * S, mask=use & (channel < C), other=0.0).to(tl.float32) - x_mean) * x_rstd
        result = gelu(x_hat * w + b)
        if HAS_SIZES:
            result = tl.where(use, result, 0.0)
        tl.store(y + base + channel * S, result.to(y.dtype.element_ty), mask=mask)
    if HAS_SIZES:
        x_rstd = tl.where(use, x_rstd, 0.0)
    tl.store(mean + sample * S + position, x_mean, mask=here)
    tl.store(rstd + sample * S + position, x_rstd, mask=here)


@triton.jit
def _layer_norm_gelu_bwd_nchw_kernel(
    dy, x, weight, bias, sizes, mean, rstd, dx, sums, C, S, W, HAS_SIZES: tl.constexpr, STEP_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dy, x, dx: (B, C, S); weight, bias: (C,); mean, rstd: (B, S); sums: (programs, 2, C), of dz and dz * x_hat."""
    blocks = tl.cdiv(S, BLOCK_P)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    position = start(tl.program_id(0) % blocks, BLOCK_P) + tl.arange(0, BLOCK_P)[None, :]
    here = position < S
    use = here
    if HAS_SIZES:
        use = here & valid(position, sizes + 2 * sample, W)
    base = sample * C * S + position
    # Zero where the position is not valid: so are x_hat's rstd and dz, and with them every gradient.
    x_mean = tl.load(mean + sample * S + position, mask=use, other=0.0)
    x_rstd = tl.load(rstd + sample * S + position, mask=use, other=0.0)
    a = tl.zeros((STEP_C, BLOCK_P), tl.float32)
    k = tl.zeros((STEP_C, BLOCK_P), tl.float32)
    for first in range(0, C, STEP_C):
        channel = (first + tl.arange(0, STEP_C)[:, None]).to(tl.int64)
        mask = use & (channel < C)
        w = tl.load(weight + channel, mask=channel < C, other=0.0)
        b = tl.load(bias + channel, mask=channel < C, other=0.0)
        x_hat = (tl.load(x + base + channel * S, mask=mask, other=0.0).to(tl.float32) - x_mean) * x_rstd
        x_hat = tl.where(mask, x_hat, 0.0)
        dz = tl.load(dy + base + channel * S, mask=mask, other=0.0).to(tl.float32) * gelu_derivative(x_hat * w + b)
        out = sums + tl.program_id(0).to(tl.int64) * 2 * C + channel
        tl.store(out, tl.sum(dz, axis=1)[:, None], mask=channel < C)
        tl.store(out + C, tl.sum(dz * x_hat, axis=1)[:, None], mask=channel < C)
        a += dz * w
        k += dz * w * x_hat
    a_mean = tl.sum(a, axis=0)[None, :] / C
    k_mean = tl.sum(k, axis=0)[None, :] / C
    for first in range(0, C, STEP_C):
        channel = (first + tl.arange(0, STEP_C)[:, None]).to(tl.int64)
        mask = use & (channel < C)
        w = tl.load(weight + channel, mask=channel < C, other=0.0)
        b = tl.load(bias + channel, mask=channel < C, other=0.0)
        x_hat = (tl.load(x + base + channel * S, mask=mask, other=0.0).to(tl.float32) - x_mean) * x_rstd
        dz = tl.load(dy + base + channel * S, mask=mask, other=0.0).to(tl.float32) * gelu_derivative(x_hat * w + b)
        result = x_rstd * (dz * w - a_mean - x_hat * k_mean)
        tl.store(dx + base + channel * S, result.to(dx.dtype.element_ty), mask=here & (channel < C))


def _row_blocks(channels: int, tile: int) -> dict[str, int]:
    width = triton.next_power_of_2(channels)
    return {"BLOCK_R": max(1, tile // width), "BLOCK_C": width, "num_warps": 8}


def launch_layer_norm_gelu_fwd(x, weight, bias, sizes, eps, nhwc, y, mean, rstd):
    """Fill y (as x), mean and rstd (B, H, W) float32 from dense x (B, C, H, W), weight and bias (C,) float32."""
    batch, channels, height, width = x.shape
    positions, has_sizes = height * width, sizes is not None
    tensors = (x, weight, bias, sizes, y, mean, rstd)
    # With sizes a thread takes half as much at once: to know where it is takes registers too.
    if nhwc:
        rows, options = batch * positions, _row_blocks(channels, _TILE // 2 if has_sizes else _TILE)
        grid = (triton.cdiv(rows, options["BLOCK_R"]),)
        _layer_norm_gelu_fwd_nhwc_kernel[grid](
            *tensors, rows, channels, positions, width, eps, HAS_SIZES=has_sizes, **options
        )
    else:
        grid = (batch * triton.cdiv(positions, _BLOCK_P),)
        options = {"HAS_SIZES": has_sizes, "STEP_C": _STEP_C, "BLOCK_P": _BLOCK_P, "num_warps": 8 if has_sizes else 4}
        _layer_norm_gelu_fwd_nchw_kernel[grid](*tensors, channels, positions, width, eps, **options)


def launch_layer_norm_gelu_bwd(dy, x, weight, bias, sizes, mean, rstd, nhwc, dx, dweight, dbias):
    """Fill dx (as x), dweight and dbias (C,) float32; dy and x dense with the same strides."""
    batch, channels, height, width = x.shape
    positions, has_sizes = height * width, sizes is not None
    if nhwc:
        rows, options = batch * positions, _row_blocks(channels, _TILE // 2) | {"HAS_SIZES": has_sizes}
        tiles = triton.cdiv(rows, options["BLOCK_R"])
        steps = triton.cdiv(tiles, _MOST_PARTS)
        programs = triton.cdiv(tiles, steps)
    else:
        options = {"HAS_SIZES": has_sizes, "STEP_C": _STEP_C, "BLOCK_P": _BLOCK_P, "num_warps": 8}
        programs = batch * triton.cdiv(positions, _BLOCK_P)
    sums = torch.empty((programs, 2, channels), dtype=torch.float32, device=x.device)
    tensors = (dy, x, weight, bias, sizes, mean, rstd, dx, sums)
    if nhwc:
        _layer_norm_gelu_bwd_nhwc_kernel[(programs,)](*tensors, rows, channels, positions, width, steps, **options)
    else:
        _layer_norm_gelu_bwd_nchw_kernel[(programs,)](*tensors, channels, positions, width, **options)
    torch.sum(sums[:, 0], 0, out=dbias)
    torch.sum(sums[:, 1], 0, out=dweight)
