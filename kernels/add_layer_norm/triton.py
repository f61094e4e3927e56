"""Residual addition and LayerNorm on a GPU through Triton: a row stays in registers between the passes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# The most partial sums of a parameter's gradient: enough programs to fill any GPU, few enough to add up fast.
_PARTIALS = 1024


@triton.jit
def _add_layer_norm_fwd_kernel(
    r, branch, scale, weight, bias, r_new, y, mean, rstd, N, C, eps,
    HAS_BRANCH: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """r, branch, r_new, y: (M, C); scale: (M // N,); weight, bias: (C,); mean, rstd: (M,) float32."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_C)
    mask = column < C
    x = tl.load(r + row * C + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        added = tl.load(branch + row * C + column, mask=mask, other=0.0).to(tl.float32)
        if HAS_SCALE:
            added *= tl.load(scale + row // N).to(tl.float32)
        stored = (x + added).to(r_new.dtype.element_ty)
        tl.store(r_new + row * C + column, stored, mask=mask)
        # Backward knows only the rounded sum, so the statistics are those of the rounded sum.
        x = stored.to(tl.float32)
    mu = tl.sum(x, axis=0) / C
    centred = tl.where(mask, x - mu, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / C + eps)
    w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * C + column, (centred * inverse * w + b).to(y.dtype.element_ty), mask=mask)
    tl.store(mean + row, mu)
    tl.store(rstd + row, inverse)


@triton.jit
def _add_layer_norm_bwd_kernel(
    grad_r_new, grad_y, r_new, mean, rstd, scale, weight, grad_r, grad_branch, partial_w, partial_b, M, N, C, ROWS,
    HAS_GRAD_R: tl.constexpr, HAS_BRANCH: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_*, r_new: (M, C); mean, rstd: (M,); scale: (M // N,); weight: (C,); partial_*: (programs, C) float32."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_C)
    mask = column < C
    w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    total_w = tl.zeros((BLOCK_C,), tl.float32)
    total_b = tl.zeros((BLOCK_C,), tl.float32)
    first = program * ROWS
    for row in range(first, tl.minimum(first + ROWS, M)):
        at = row * C + column
        x = tl.load(r_new + at, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(grad_y + at, mask=mask, other=0.0).to(tl.float32)
        inverse = tl.load(rstd + row)
        hat = tl.where(mask, (x - tl.load(mean + row)) * inverse, 0.0)
        total_w += dy * hat
        total_b += dy
        g = dy * w
        dx = inverse * (g - tl.sum(g, axis=0) / C - hat * (tl.sum(g * hat, axis=0) / C))
        if HAS_GRAD_R:
            dx += tl.load(grad_r_new + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_r + at, dx.to(grad_r.dtype.element_ty), mask=mask)
        if HAS_BRANCH:
            if HAS_SCALE:
                dx *= tl.load(scale + row // N).to(tl.float32)
            tl.store(grad_branch + at, dx.to(grad_branch.dtype.element_ty), mask=mask)
    tl.store(partial_w + program * C + column, total_w, mask=mask)
    tl.store(partial_b + program * C + column, total_b, mask=mask)


def _warps(block: int) -> int:
    return min(16, max(1, block // 256))


def launch_add_layer_norm_fwd(
    r: torch.Tensor,
    branch: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contiguous r, branch (B, N, C), scale (B,), weight, bias (C,) -> r_new (empty without branch), y, mean, rstd."""
    batch, length, channels = r.shape
    r_new = r.new_empty(0) if branch is None else torch.empty_like(r)
    y = torch.empty_like(r, dtype=dtype)
    mean, rstd = (torch.empty((batch, length), dtype=torch.float32, device=r.device) for _ in range(2))
    if r.numel():
        block = triton.next_power_of_2(channels)
        _add_layer_norm_fwd_kernel[(batch * length,)](
            r, branch, scale, weight, bias, r_new, y, mean, rstd, length, channels, eps,
            HAS_BRANCH=branch is not None, HAS_SCALE=scale is not None, BLOCK_C=block, num_warps=_warps(block),
        )  # fmt: skip
    return r_new, y, mean, rstd


def launch_add_layer_norm_bwd(
    grad_r_new: torch.Tensor | None,
    grad_y: torch.Tensor,
    r_new: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    scale: torch.Tensor | None,
    weight: torch.Tensor,
    branch_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contiguous gradients -> those of r, branch (empty unless ``branch_dtype``), weight and bias ((C,) float32)."""
    batch, length, channels = r_new.shape
    grad_r = torch.empty_like(r_new)
    grad_branch = r_new.new_empty(0) if branch_dtype is None else torch.empty_like(r_new, dtype=branch_dtype)
    rows = max(1, triton.cdiv(batch * length, _PARTIALS))
    programs = triton.cdiv(batch * length, rows)
    partial_w, partial_b = (
        torch.empty((programs, channels), dtype=torch.float32, device=r_new.device) for _ in range(2)
    )
    if r_new.numel():
        block = triton.next_power_of_2(channels)
        _add_layer_norm_bwd_kernel[(programs,)](
            grad_r_new, grad_y, r_new, mean, rstd, scale, weight, grad_r, grad_branch, partial_w, partial_b,
            batch * length, length, channels, rows,
            HAS_GRAD_R=grad_r_new is not None, HAS_BRANCH=branch_dtype is not None, HAS_SCALE=scale is not None,
            BLOCK_C=block, num_warps=_warps(block),
        )  # fmt: skip
    return grad_r, grad_branch, partial_w.sum(0), partial_b.sum(0)
