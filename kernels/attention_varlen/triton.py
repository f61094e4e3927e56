"""Packed attention on a GPU through Triton: FlashAttention-2, backward in two kernels without atomics.

A program takes one tile of one head of one sequence, so its result depends on that sequence alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Tiles(NamedTuple):
    """Queries (M) and keys (N) of a tile, and Triton's launch options."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


# (bytes of an element, BLOCK_D) -> tiles of the three kernels. They are not tuned on a GPU but chosen to fit: no
# spilled registers, and shared memory below the 99 KiB of consumer GPUs.
_FWD = {
    (2, 32): Tiles(128, 64, 4, 3),
    (2, 64): Tiles(128, 64, 8, 3),
    (2, 128): Tiles(128, 64, 8, 2),
    (4, 32): Tiles(32, 32, 4, 2),
    (4, 64): Tiles(32, 32, 8, 2),
    (4, 128): Tiles(16, 32, 4, 1),
}
_BWD_KV = {
    (2, 32): Tiles(64, 64, 4, 2),
    (2, 64): Tiles(64, 128, 8, 2),
    (2, 128): Tiles(64, 64, 8, 2),
    (4, 32): Tiles(16, 32, 4, 1),
    (4, 64): Tiles(32, 32, 8, 1),
    (4, 128): Tiles(16, 16, 4, 1),
}
_BWD_Q = {
    (2, 32): Tiles(64, 64, 4, 2),
    (2, 64): Tiles(128, 64, 8, 2),
    (2, 128): Tiles(64, 64, 8, 2),
    (4, 32): Tiles(16, 32, 4, 1),
    (4, 64): Tiles(32, 32, 8, 1),
    (4, 128): Tiles(16, 32, 4, 1),
}


@triton.jit
def _locate(cu_seqlens, H, tiles, BLOCK: tl.constexpr):
    """Head, the sequence's first token and length; this tile's first token, and the tokens left from it on.

    cu_seqlens: (B + 1,) int32.
    """
    program = tl.program_id(0)
    sequence = program // tiles // H
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = (tl.load(cu_seqlens + sequence + 1) - start).to(tl.int32)
    # Tiles of a head are consecutive programs, which share its keys and values in the L2 cache.
    first = (program % tiles).to(tl.int64) * BLOCK
    return (program // tiles % H).to(tl.int64), start, length, start + first, (length - first).to(tl.int32)


@triton.jit
def _load(base, stride, first, length, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr):
    """(ROWS, BLOCK_D) from row ``first`` of a matrix (length, D); zeros beyond D, and with MASK beyond length."""
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    pointers = base + row.to(tl.int64)[:, None] * stride + column[None, :]
    if MASK:
        return tl.load(pointers, mask=(row < length)[:, None] & (column < D)[None, :], other=0.0)
    if D == BLOCK_D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(column < D)[None, :], other=0.0)


@triton.jit
def _store(base, stride, length, D, x, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """As many rows of x (ROWS, BLOCK_D) as a matrix (length, D) at ``base`` has."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    pointers = base + row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(pointers, x.to(base.dtype.element_ty), mask=(row < length)[:, None] & (column < D)[None, :])


@triton.jit
def _load_row(base, first, length, SIZE: tl.constexpr):
    """(SIZE,) from index ``first`` of a vector (length,); zeros beyond its end."""
    offs = first + tl.arange(0, SIZE)
    return tl.load(base + offs, mask=offs < length, other=0.0)


@triton.jit
def _dot(a, b, WIDEN: tl.constexpr):
    """a @ b in float32.

    bf16x6 splits float32 into three bfloat16 for NVIDIA's tensor cores and loses no bit; FMAs would spill thousands of
    registers, and tf32x3 has only 22 bits. AMD's matrix cores take float32. WIDEN is for Triton's interpreter, which
    lacks bf16x6 and multiplies bfloat16 wrongly.
    """
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    if a.dtype != tl.float32:
        return tl.dot(a, b)
    return tl.dot(a, b, input_precision="ieee" if tl.target_info.is_hip() else "bf16x6")


@triton.jit
def _fwd_step(
    q_tile, k, v, stride_k, stride_v, first, length, m_i, total, acc, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, WIDEN: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Online softmax over one tile of keys: the new maximum, sum of exponentials and sum of values (BLOCK_M, ...)."""
    keys = _load(k, stride_k, first, length, D, BLOCK_N, BLOCK_D, MASK)
    scores = _dot(q_tile, tl.trans(keys), WIDEN)
    if MASK:
        scores = tl.where((first + tl.arange(0, BLOCK_N) < length)[None, :], scores, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - m_new[:, None])
    alpha = tl.exp2(m_i - m_new)
    values = _load(v, stride_v, first, length, D, BLOCK_N, BLOCK_D, MASK)
    acc = acc * alpha[:, None] + _dot(p.to(values.dtype), values, WIDEN)
    return m_new, total * alpha + tl.sum(p, 1), acc


@triton.jit
def _attention_varlen_fwd_kernel(
    q, k, v, cu_seqlens, out, lse, stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_o, T, H, tiles,
    scale, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDEN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """q, k, v, out: (T, H, D), with strides of T and H (out's of H is D); lse: (H, T) float32; exponents in base 2."""
    head, start, length, first, left = _locate(cu_seqlens, H, tiles, BLOCK_M)
    if left <= 0:
        return
    k += start * stride_k + head * stride_kh
    v += start * stride_v + head * stride_vh
    q_tile = _load(q + first * stride_q + head * stride_qh, stride_q, 0, left, D, BLOCK_M, BLOCK_D, True)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    full = 0
    if SPLIT:
        # Full tiles need no mask, which for narrow heads costs a tenth of the exponentials' time.
        full = length // BLOCK_N * BLOCK_N
        for n in range(0, full, BLOCK_N):
            m_i, total, acc = _fwd_step(
                q_tile, k, v, stride_k, stride_v, n, length, m_i, total, acc, scale, D, BLOCK_D, BLOCK_N, WIDEN, False
            )
    for n in range(full, length, BLOCK_N):
        m_i, total, acc = _fwd_step(
            q_tile, k, v, stride_k, stride_v, n, length, m_i, total, acc, scale, D, BLOCK_D, BLOCK_N, WIDEN, True
        )
    _store(out + first * stride_o + head * D, stride_o, left, D, acc / total[:, None], BLOCK_M, BLOCK_D)
    row = tl.arange(0, BLOCK_M)
    tl.store(lse + head * T + first + row, m_i + tl.log2(total), mask=row < left)


@triton.jit
def _attention_varlen_delta_kernel(
    dout, out, delta, stride_g, stride_gh, stride_o, T, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta (H, T) float32 = the sum over D of dout * out, both (T, H, D), strides as in forward."""
    head = (tl.program_id(0) % H).to(tl.int64)
    first = (tl.program_id(0) // H).to(tl.int64) * BLOCK_M
    left = (T - first).to(tl.int32)
    dout += first * stride_g + head * stride_gh
    out += first * stride_o + head * D
    dy = _load(dout, stride_g, 0, left, D, BLOCK_M, BLOCK_D, True).to(tl.float32)
    y = _load(out, stride_o, 0, left, D, BLOCK_M, BLOCK_D, True).to(tl.float32)
    row = tl.arange(0, BLOCK_M)
    tl.store(delta + head * T + first + row, tl.sum(dy * y, 1), mask=row < left)


@triton.jit
def _attention_varlen_bwd_kv_kernel(
    dout, q, k, v, cu_seqlens, lse, delta, dk, dv, stride_g, stride_gh, stride_q, stride_qh, stride_k, stride_kh,
    stride_v, stride_vh, stride_d, T, H, tiles, scale, scale_out,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dout, q, k, v, dk, dv: (T, H, D), with strides of T and H (of H in dk, dv: D); lse, delta: (H, T) float32."""
    head, start, length, first, left = _locate(cu_seqlens, H, tiles, BLOCK_N)
    if left <= 0:
        return
    q += start * stride_q + head * stride_qh
    dout += start * stride_g + head * stride_gh
    lse += head * T + start
    delta += head * T + start
    k_tile = _load(k + first * stride_k + head * stride_kh, stride_k, 0, left, D, BLOCK_N, BLOCK_D, True)
    v_tile = _load(v + first * stride_v + head * stride_vh, stride_v, 0, left, D, BLOCK_N, BLOCK_D, True)
    dk_tile = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_tile = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for m in range(0, length, BLOCK_M):
        # Queries past the sequence's end load as zeros, so they add nothing.
        q_tile = _load(q, stride_q, m, length, D, BLOCK_M, BLOCK_D, True)
        dy = _load(dout, stride_g, m, length, D, BLOCK_M, BLOCK_D, True)
        p = tl.exp2(_dot(k_tile, tl.trans(q_tile), WIDEN) * scale - _load_row(lse, m, length, BLOCK_M)[None, :])
        dv_tile += _dot(p.to(dy.dtype), dy, WIDEN)
        ds = p * (_dot(v_tile, tl.trans(dy), WIDEN) - _load_row(delta, m, length, BLOCK_M)[None, :])
        dk_tile += _dot(ds.to(q_tile.dtype), q_tile, WIDEN)
    offs = first * stride_d + head * D
    _store(dk + offs, stride_d, left, D, dk_tile * scale_out, BLOCK_N, BLOCK_D)
    _store(dv + offs, stride_d, left, D, dv_tile, BLOCK_N, BLOCK_D)


@triton.jit
def _attention_varlen_bwd_q_kernel(
    dout, q, k, v, cu_seqlens, lse, delta, dq, stride_g, stride_gh, stride_q, stride_qh, stride_k, stride_kh,
    stride_v, stride_vh, stride_d, T, H, tiles, scale, scale_out,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dout, q, k, v, dq: (T, H, D), with strides of T and H (of H in dq: D); lse, delta: (H, T) float32."""
    head, start, length, first, left = _locate(cu_seqlens, H, tiles, BLOCK_M)
    if left <= 0:
        return
    k += start * stride_k + head * stride_kh
    v += start * stride_v + head * stride_vh
    q_tile = _load(q + first * stride_q + head * stride_qh, stride_q, 0, left, D, BLOCK_M, BLOCK_D, True)
    dy = _load(dout + first * stride_g + head * stride_gh, stride_g, 0, left, D, BLOCK_M, BLOCK_D, True)
    lse_row = _load_row(lse + head * T + first, 0, left, BLOCK_M)
    delta_row = _load_row(delta + head * T + first, 0, left, BLOCK_M)
    dq_tile = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for n in range(0, length, BLOCK_N):
        keys = _load(k, stride_k, n, length, D, BLOCK_N, BLOCK_D, True)
        values = _load(v, stride_v, n, length, D, BLOCK_N, BLOCK_D, True)
        p = tl.exp2(_dot(q_tile, tl.trans(keys), WIDEN) * scale - lse_row[:, None])
        # p of keys past the end may be infinite, and infinity times zero is NaN.
        p = tl.where((n + tl.arange(0, BLOCK_N) < length)[None, :], p, 0.0)
        ds = p * (_dot(dy, tl.trans(values), WIDEN) - delta_row[:, None])
        dq_tile += _dot(ds.to(keys.dtype), keys, WIDEN)
    _store(dq + first * stride_d + head * D, stride_d, left, D, dq_tile * scale_out, BLOCK_M, BLOCK_D)


def _options(tiles: dict[tuple[int, int], Tiles], dtype: torch.dtype, head_dim: int) -> dict:
    block = max(32, triton.next_power_of_2(head_dim))
    return {
        "D": head_dim,
        "BLOCK_D": block,
        "WIDEN": triton.knobs.runtime.interpret,
        **tiles[dtype.itemsize, block]._asdict(),
    }


def _grid(cu_seqlens: torch.Tensor, max_seqlen: int, heads: int, block: int) -> tuple[int, tuple[int]]:
    """Tiles of the longest sequence, and programs for those of every head of every sequence."""
    tiles = triton.cdiv(max_seqlen, block)
    return tiles, (tiles * heads * (len(cu_seqlens) - 1),)


def launch_attention_varlen_fwd(
    qkv: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, scale: float, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """qkv (T, 3, heads, head_dim), the last dimension dense -> out (T, heads, head_dim), lse (heads, T) in base 2."""
    total, _, heads, head_dim = qkv.shape
    options = _options(_FWD, qkv.dtype, head_dim)
    tiles, grid = _grid(cu_seqlens, max_seqlen, heads, options["BLOCK_M"])
    q, k, v = qkv.unbind(1)
    _attention_varlen_fwd_kernel[grid](
        q, k, v, cu_seqlens, out, lse, *(s for t in (q, k, v) for s in t.stride()[:2]), heads * head_dim, total,
        heads, tiles, scale * math.log2(math.e), SPLIT=qkv.dtype.itemsize == 2, **options,
    )  # fmt: skip


def launch_attention_varlen_bwd(
    dout: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, cu_seqlens: torch.Tensor,
    max_seqlen: int, scale: float, dqkv: torch.Tensor,
) -> None:  # fmt: skip
    """dout and qkv with a dense last dimension, forward's outputs -> dqkv (T, 3, heads, head_dim)."""
    total, _, heads, head_dim = qkv.shape
    delta = torch.empty_like(lse)
    (q, k, v), (dq, dk, dv) = qkv.unbind(1), dqkv.unbind(1)
    for_kv, for_q = (_options(tiles, qkv.dtype, head_dim) for tiles in (_BWD_KV, _BWD_Q))
    _attention_varlen_delta_kernel[(triton.cdiv(total, 64) * heads,)](
        dout, out, delta, *dout.stride()[:2], heads * head_dim, total, heads, head_dim, for_kv["BLOCK_D"], 64
    )
    strides = [s for t in (dout, q, k, v) for s in t.stride()[:2]]
    common = (*strides, dqkv.stride(0), total, heads)
    inputs, factors = (dout, q, k, v, cu_seqlens, lse, delta), (scale * math.log2(math.e), scale)
    tiles, grid = _grid(cu_seqlens, max_seqlen, heads, for_kv["BLOCK_N"])
    _attention_varlen_bwd_kv_kernel[grid](*inputs, dk, dv, *common, tiles, *factors, **for_kv)
    tiles, grid = _grid(cu_seqlens, max_seqlen, heads, for_q["BLOCK_M"])
    _attention_varlen_bwd_q_kernel[grid](*inputs, dq, *common, tiles, *factors, **for_q)
