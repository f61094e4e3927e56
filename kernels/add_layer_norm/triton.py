"""Residual addition and LayerNorm on a GPU through Triton: a row stays in registers between the passes.

Numbers tell which tensors are there, so that one compilation serves all calls. In place of one that is not, the
launchers pass another of its dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _scale_of(scale, row, N, has_scale):
    """Scale of a row's image, in float32."""
    factor = tl.full((), 1.0, tl.float32)
    if has_scale != 0:
        factor = tl.load(scale + row // N).to(tl.float32)
    return factor


@triton.jit(do_not_specialize=["N", "has_x", "has_scale"], do_not_specialize_on_alignment=["scale"])
def _add_layer_norm_fwd_kernel(
    residual, x, scale, weight, bias, residual_out, y, mean, rstd, N, C, eps, has_x, has_scale, BLOCK_C: tl.constexpr
):  # fmt: skip
    """residual, x, residual_out, y: (M, C); scale: (M // N,); weight, bias: (C,); mean, rstd: (M,) float32.

    Without x, residual_out is not there either.
    """
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    offs, mask = row * C + channel, channel < C
    total = tl.load(residual + offs, mask=mask, other=0.0).to(tl.float32)
    with_x = channel < C * has_x
    added = tl.load(x + offs, mask=with_x, other=0.0).to(tl.float32)
    added *= _scale_of(scale, tl.program_id(0), N, has_scale)
    rounded = (total + added).to(residual_out.dtype.element_ty)
    tl.store(residual_out + offs, rounded, mask=with_x)
    # Backward sees only the rounded sum, so the statistics are those of the rounded sum.
    total = rounded.to(tl.float32)
    row_mean = tl.sum(total, axis=0) / C
    x_centered = tl.where(mask, total - row_mean, 0.0)
    row_rstd = 1.0 / tl.sqrt(tl.sum(x_centered * x_centered, axis=0) / C + eps)
    w = tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + offs, (x_centered * row_rstd * w + b).to(y.dtype.element_ty), mask=mask)
    tl.store(mean + row, row_mean)
    tl.store(rstd + row, row_rstd)


@triton.jit(
    do_not_specialize=["M", "N", "step", "has_dresidual", "has_x", "has_scale"],
    do_not_specialize_on_alignment=["scale"],
)
def _add_layer_norm_bwd_kernel(
    dresidual_out, dy, residual_out, mean, rstd, scale, weight, dresidual, dx, partials, M, N, C, step,
    has_dresidual, has_x, has_scale, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """d*, residual_out: (M, C); mean, rstd: (M,); scale: (M // N,); weight: (C,); partials: (2, programs, C) float32,
    sums of the gradients of bias and of weight. Without x, dx is not there; residual_out takes the place of a missing
    dresidual_out."""
    program = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    mask = channel < C
    w = tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK_C,), tl.float32)
    db = tl.zeros((BLOCK_C,), tl.float32)
    first = program * step
    # Loads run two rows ahead, into shared memory, or the sums' barriers would hold them back. Wide rows do not fit.
    for row in tl.range(first, tl.minimum(first + step, M), num_stages=3 if BLOCK_C <= 2048 else 1):
        offs = row * C + channel
        total = tl.load(residual_out + offs, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(dy + offs, mask=mask, other=0.0).to(tl.float32)
        # What is not there is loaded and counts nothing: another mask would take a register for each element.
        passed_on = tl.load(dresidual_out + offs, mask=mask, other=0.0).to(tl.float32) * has_dresidual
        row_mean = tl.load(mean + row)
        row_rstd = tl.load(rstd + row)
        row_scale = _scale_of(scale, tl.cast(row, tl.int32), N, has_scale)
        x_hat = tl.where(mask, (total - row_mean) * row_rstd, 0.0)
        dw += g * x_hat
        db += g
        g *= w
        g_sum, gx_sum = tl.split(tl.sum(tl.join(g, g * x_hat), axis=0))
        dtotal = row_rstd * (g - g_sum / C - x_hat * (gx_sum / C)) + passed_on
        tl.store(dresidual + offs, dtotal.to(dresidual.dtype.element_ty), mask=mask)
        tl.store(dx + offs, (dtotal * row_scale).to(dx.dtype.element_ty), mask=channel < C * has_x)
    tl.store(partials + program * C + channel, db, mask=mask)
    tl.store(partials + (tl.num_programs(0) + program) * C + channel, dw, mask=mask)


def _blocks(channels: int) -> dict[str, int]:
    block = triton.next_power_of_2(channels)
    return {"BLOCK_C": block, "num_warps": min(16, max(1, block // 256))}


def launch_add_layer_norm_fwd(
    residual: torch.Tensor, x: torch.Tensor | None, scale: torch.Tensor | None, weight: torch.Tensor,
    bias: torch.Tensor, eps: float, residual_out: torch.Tensor, y: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor,
) -> None:  # fmt: skip
    """Contiguous residual, x (B, N, C), scale (B,), weight, bias (C,) -> residual_out (if x), y, mean, rstd."""
    batch, length, channels = residual.shape
    _add_layer_norm_fwd_kernel[(batch * length,)](
        residual, y if x is None else x, mean if scale is None else scale, weight, bias, residual_out, y, mean, rstd,
        length, channels, eps, int(x is not None), int(scale is not None), **_blocks(channels),
    )  # fmt: skip


def launch_add_layer_norm_bwd(
    dresidual_out: torch.Tensor | None, dy: torch.Tensor, residual_out: torch.Tensor, mean: torch.Tensor,
    rstd: torch.Tensor, scale: torch.Tensor | None, weight: torch.Tensor, step: int, dresidual: torch.Tensor,
    dx: torch.Tensor | None, partials: torch.Tensor,
) -> None:  # fmt: skip
    """Contiguous gradients of the outputs -> dresidual, dx, and partials (2, programs, C), one per ``step`` rows."""
    batch, length, channels = residual_out.shape
    _add_layer_norm_bwd_kernel[(partials.shape[1],)](
        residual_out if dresidual_out is None else dresidual_out, dy, residual_out, mean, rstd,
        mean if scale is None else scale, weight, dresidual, dy if dx is None else dx, partials,
        batch * length, length, channels, step, int(dresidual_out is not None), int(dx is not None),
        int(scale is not None), **_blocks(channels),
    )  # fmt: skip
