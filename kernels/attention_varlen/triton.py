"""Packed attention on a GPU through Triton: FlashAttention-2, backward in two kernels without atomics.

A program takes one tile of one head of one sequence, so its result depends on that sequence alone. With SPLIT the last
tile, which needs a mask, comes before the loop: after it, it would make ptxas wait for each single matrix product of
the loop (its message C7515).
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Tiles(NamedTuple):
    """Queries (M) and keys (N) of a tile, Triton's launch options, and variants of the loop.

    POLYNOMIAL: one exponential in so many, 8 or 16, is a polynomial instead of the EX2 unit's; 0: none.
    SPLIT: the loop has whole tiles alone, which need no mask. It costs registers.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    POLYNOMIAL: int = 0
    SPLIT: bool = True


# (bytes of an element, BLOCK_D) -> tiles of forward, of backward to keys and values, and of backward to queries; first
# what any GPU takes, within the 99 KiB of shared memory of consumer GPUs. Chosen from machine code, not tuned on a GPU:
# no spilled registers, the fewest instructions a score, and from those the most warps a multiprocessor.
_ANY = {
    (2, 32): (Tiles(64, 128, 4, 3), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)),
    (2, 64): (Tiles(128, 64, 8, 3), Tiles(64, 128, 8, 2, SPLIT=False), Tiles(128, 64, 8, 2)),
    (2, 128): (
        Tiles(128, 64, 8, 2, SPLIT=False), Tiles(64, 64, 8, 2, SPLIT=False), Tiles(64, 64, 8, 2, SPLIT=False)
    ),
    (4, 32): (Tiles(32, 32, 4, 1, SPLIT=False), Tiles(16, 32, 4, 1, SPLIT=False), Tiles(16, 32, 4, 1, SPLIT=False)),
    (4, 64): (Tiles(32, 32, 8, 2, SPLIT=False), Tiles(32, 32, 8, 1, SPLIT=False), Tiles(32, 32, 8, 1, SPLIT=False)),
    (4, 128): (Tiles(16, 32, 4, 1, SPLIT=False), Tiles(16, 16, 4, 1, SPLIT=False), Tiles(16, 32, 4, 1, SPLIT=False)),
}  # fmt: skip
# What differs, by compute capability (90 for 9.0) or AMD's name. Polynomials where the EX2 unit is the limit
# (backward to keys and values waits as long for Hopper's tensor cores).
_TILES = {
    90: {(2, 32): (Tiles(64, 128, 4, 3, 16), Tiles(64, 128, 4, 2), Tiles(64, 64, 4, 2, 16))},
    100: {(2, 32): (Tiles(64, 128, 4, 3, 8), Tiles(64, 128, 4, 2, 16), Tiles(128, 64, 4, 2, 8))},
    "gfx942": {(2, 32): (Tiles(128, 64, 4, 2), Tiles(64, 128, 4, 2), Tiles(64, 64, 4, 2))},
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
def _at(x, token, head):
    """Where a token of a head is; x: a tensor (T, H, D) and its strides of T and H."""
    return x[0] + token * x[1] + head * x[2]


@triton.jit
def _load(base, stride, length, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr):
    """(ROWS, BLOCK_D) of a matrix (length, D); zeros beyond D, and with MASK beyond length."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    pointers = base + (row.to(tl.int64)[:, None] * stride + column[None, :])
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
def _load_column(base, length, SIZE: tl.constexpr, MASK: tl.constexpr):
    """(SIZE,): the first column of a matrix (length, 2); with MASK zeros beyond length."""
    row = tl.arange(0, SIZE)
    if MASK:
        return tl.load(base + row * 2, mask=row < length, other=0.0)
    return tl.load(base + row * 2)


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
def _exp2_by_fma(x):
    """2 ** x for x up to 127, relative error at most 1.1e-4; 2 ** -126 below -126.

    2 ** x = 2 ** (i + f), i the nearest integer. 2 ** f is a polynomial of degree 3, the best one that is 1 at f = 0;
    i is added to its exponent. The error is a quarter of float16's rounding, a twentieth of bfloat16's.
    """
    x = tl.maximum(x, -126.0, propagate_nan=tl.PropagateNan.ALL)
    shifted = x + 12582912.0  # 1.5 * 2 ** 23 rounds to an integer, which is in the low bits of the sum
    f = x - (shifted - 12582912.0)
    y = ((0.05500893 * f + 0.242211) * f + 0.69328293) * f + 1.0
    bits = y.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _exp2_of_8(x0, x1, x2, x3, x4, x5, x6, x7):
    return tl.exp2(x0), tl.exp2(x1), tl.exp2(x2), tl.exp2(x3), tl.exp2(x4), tl.exp2(x5), tl.exp2(x6), _exp2_by_fma(x7)


@triton.jit
def _exp2_of_16(x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15):
    return (tl.exp2(x0), tl.exp2(x1), tl.exp2(x2), tl.exp2(x3), tl.exp2(x4), tl.exp2(x5),
            tl.exp2(x6), tl.exp2(x7), tl.exp2(x8), tl.exp2(x9), tl.exp2(x10), tl.exp2(x11),
            tl.exp2(x12), tl.exp2(x13), tl.exp2(x14), _exp2_by_fma(x15))  # fmt: skip


@triton.jit
def _exp2(x, POLYNOMIAL: tl.constexpr, WIDEN: tl.constexpr):
    """2 ** x of a tile, one element in POLYNOMIAL of them by multiplications, which run beside the EX2 unit."""
    if POLYNOMIAL == 0:
        return tl.exp2(x)
    if WIDEN:  # Triton's interpreter has no map_elementwise
        by_fma = tl.arange(0, x.shape[1]) % POLYNOMIAL == POLYNOMIAL - 1
        return tl.where(by_fma[None, :], _exp2_by_fma(x), tl.exp2(x))
    if POLYNOMIAL == 8:
        return tl.map_elementwise(_exp2_of_8, x, pack=8)[0]
    return tl.map_elementwise(_exp2_of_16, x, pack=16)[0]


@triton.jit
def _fwd_step(
    q_tile, k, v, stride_k, stride_v, length, m_i, total, acc, scale, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, POLYNOMIAL: tl.constexpr, WIDEN: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Online softmax over one tile of keys: the new maximum, sum of exponentials and sum of values (BLOCK_M, ...).

    k and v point to the tile, length is the number of keys from there on.
    """
    keys = _load(k, stride_k, length, D, BLOCK_N, BLOCK_D, MASK)
    scores = _dot(q_tile, tl.trans(keys), WIDEN)
    if MASK:
        scores = tl.where((tl.arange(0, BLOCK_N) < length)[None, :], scores, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(scores, 1) * scale)
    p = _exp2(scores * scale - m_new[:, None], POLYNOMIAL, WIDEN)
    alpha = tl.exp2(m_i - m_new)
    values = _load(v, stride_v, length, D, BLOCK_N, BLOCK_D, MASK)
    acc = acc * alpha[:, None] + _dot(p.to(values.dtype), values, WIDEN)
    return m_new, total * alpha + tl.sum(p, 1), acc


@triton.jit(do_not_specialize=["T", "tiles"])
def _attention_varlen_fwd_kernel(
    q, k, v, cu_seqlens, out, lse, T, H, tiles, scale, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, POLYNOMIAL: tl.constexpr, WIDEN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """q, k, v, out: (T, H, D), each with its strides, see _at; lse: (H, T) float32; exponents in base 2."""
    head, start, length, first, left = _locate(cu_seqlens, H, tiles, BLOCK_M)
    if left <= 0:
        return
    keys, values = _at(k, start, head), _at(v, start, head)
    q_tile = _load(_at(q, first, head), q[1], left, D, BLOCK_M, BLOCK_D, True)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    end = length
    if SPLIT:
        end = length - 1 - (length - 1) % BLOCK_N
        last = end.to(tl.int64)
        m_i, total, acc = _fwd_step(
            q_tile, keys + last * k[1], values + last * v[1], k[1], v[1], length - end, m_i, total, acc, scale,
            D, BLOCK_D, BLOCK_N, 0, WIDEN, True,
        )  # fmt: skip
    for n in range(0, end, BLOCK_N):
        m_i, total, acc = _fwd_step(
            q_tile, keys, values, k[1], v[1], length - n, m_i, total, acc, scale,
            D, BLOCK_D, BLOCK_N, POLYNOMIAL, WIDEN, not SPLIT,
        )  # fmt: skip
        keys += tl.full((), BLOCK_N, tl.int64) * k[1]
        values += tl.full((), BLOCK_N, tl.int64) * v[1]
    _store(_at(out, first, head), out[1], left, D, acc / total[:, None], BLOCK_M, BLOCK_D)
    row = tl.arange(0, BLOCK_M)
    tl.store(lse + head * T + first + row, m_i + tl.log2(total), mask=row < left)


@triton.jit
def _bwd_q_step(
    q_tile, dy, lse_row, delta_row, k, v, stride_k, stride_v, length, dq_tile, scale, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, POLYNOMIAL: tl.constexpr, WIDEN: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """dq with one more tile of keys; k and v point to it, length keys are left from there on."""
    keys = _load(k, stride_k, length, D, BLOCK_N, BLOCK_D, MASK)
    values = _load(v, stride_v, length, D, BLOCK_N, BLOCK_D, MASK)
    scores = _dot(q_tile, tl.trans(keys), WIDEN)
    dp = _dot(dy, tl.trans(values), WIDEN)
    p = _exp2(scores * scale - lse_row[:, None], POLYNOMIAL, WIDEN)
    if MASK:
        # p of keys past the end may be infinite, and infinity times zero is NaN.
        p = tl.where((tl.arange(0, BLOCK_N) < length)[None, :], p, 0.0)
    ds = p * (dp - delta_row[:, None])
    return dq_tile + _dot(ds.to(keys.dtype), keys, WIDEN)


@triton.jit(do_not_specialize=["T", "tiles"])
def _attention_varlen_bwd_q_kernel(
    dout, q, k, v, cu_seqlens, out, lse, stats, dq, T, H, tiles, scale, scale_out, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, POLYNOMIAL: tl.constexpr,
    WIDEN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """dout, q, k, v, out, dq: (T, H, D), each with its strides, see _at; lse: (H, T), of forward.

    Writes stats (H, T, 2) float32 for the keys' kernel: lse and delta, the sum over D of dout * out. Side by side they
    need one pointer, of the registers that the largest tiles leave.
    """
    head, start, length, first, left = _locate(cu_seqlens, H, tiles, BLOCK_M)
    if left <= 0:
        return
    dy = _load(_at(dout, first, head), dout[1], left, D, BLOCK_M, BLOCK_D, True)
    y = _load(_at(out, first, head), out[1], left, D, BLOCK_M, BLOCK_D, True)
    delta_row = tl.sum(dy.to(tl.float32) * y.to(tl.float32), 1)
    row = tl.arange(0, BLOCK_M)
    token = head * T + first
    lse_row = tl.load(lse + token + row, mask=row < left, other=0.0)
    stats += token * 2
    tl.store(stats + row * 2, lse_row, mask=row < left)
    tl.store(stats + row * 2 + 1, delta_row, mask=row < left)
    keys, values = _at(k, start, head), _at(v, start, head)
    q_tile = _load(_at(q, first, head), q[1], left, D, BLOCK_M, BLOCK_D, True)
    dq_tile = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    end = length
    if SPLIT:
        end = length - 1 - (length - 1) % BLOCK_N
        last = end.to(tl.int64)
        dq_tile = _bwd_q_step(
            q_tile, dy, lse_row, delta_row, keys + last * k[1], values + last * v[1], k[1], v[1], length - end,
            dq_tile, scale, D, BLOCK_D, BLOCK_N, 0, WIDEN, True,
        )  # fmt: skip
    for n in range(0, end, BLOCK_N):
        dq_tile = _bwd_q_step(
            q_tile, dy, lse_row, delta_row, keys, values, k[1], v[1], length - n, dq_tile, scale,
            D, BLOCK_D, BLOCK_N, POLYNOMIAL, WIDEN, not SPLIT,
        )  # fmt: skip
        keys += tl.full((), BLOCK_N, tl.int64) * k[1]
        values += tl.full((), BLOCK_N, tl.int64) * v[1]
    _store(_at(dq, first, head), dq[1], left, D, dq_tile * scale_out, BLOCK_M, BLOCK_D)


@triton.jit
def _bwd_kv_step(
    k_tile, v_tile, q, dout, stats, stride_q, stride_g, length, dk_tile, dv_tile, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, POLYNOMIAL: tl.constexpr, WIDEN: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """dk and dv with one more tile of queries; q, dout and stats point to it, length queries are left from there on."""
    # Queries past the sequence's end load as zeros, so they add nothing.
    q_tile = _load(q, stride_q, length, D, BLOCK_M, BLOCK_D, MASK)
    dy = _load(dout, stride_g, length, D, BLOCK_M, BLOCK_D, MASK)
    scores = _dot(k_tile, tl.trans(q_tile), WIDEN)
    dp = _dot(v_tile, tl.trans(dy), WIDEN)
    p = _exp2(scores * scale - _load_column(stats, length, BLOCK_M, MASK)[None, :], POLYNOMIAL, WIDEN)
    dv_tile += _dot(p.to(dy.dtype), dy, WIDEN)
    ds = p * (dp - _load_column(stats + 1, length, BLOCK_M, MASK)[None, :])
    return dk_tile + _dot(ds.to(q_tile.dtype), q_tile, WIDEN), dv_tile


@triton.jit(do_not_specialize=["T", "tiles"])
def _attention_varlen_bwd_kv_kernel(
    dout, q, k, v, cu_seqlens, stats, dk, dv, T, H, tiles, scale, scale_out, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, POLYNOMIAL: tl.constexpr, WIDEN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """dout, q, k, v, dk, dv: (T, H, D), each with its strides, see _at; stats: of the queries' kernel."""
    head, start, length, first, left = _locate(cu_seqlens, H, tiles, BLOCK_N)
    if left <= 0:
        return
    queries, gradients = _at(q, start, head), _at(dout, start, head)
    stats += (head * T + start) * 2
    k_tile = _load(_at(k, first, head), k[1], left, D, BLOCK_N, BLOCK_D, True)
    v_tile = _load(_at(v, first, head), v[1], left, D, BLOCK_N, BLOCK_D, True)
    dk_tile = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_tile = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    end = length
    if SPLIT:
        end = length - 1 - (length - 1) % BLOCK_M
        last = end.to(tl.int64)
        dk_tile, dv_tile = _bwd_kv_step(
            k_tile, v_tile, queries + last * q[1], gradients + last * dout[1], stats + last * 2, q[1], dout[1],
            length - end, dk_tile, dv_tile, scale, D, BLOCK_D, BLOCK_M, 0, WIDEN, True,
        )  # fmt: skip
    for m in range(0, end, BLOCK_M):
        dk_tile, dv_tile = _bwd_kv_step(
            k_tile, v_tile, queries, gradients, stats, q[1], dout[1], length - m, dk_tile, dv_tile, scale,
            D, BLOCK_D, BLOCK_M, POLYNOMIAL, WIDEN, not SPLIT,
        )  # fmt: skip
        queries += tl.full((), BLOCK_M, tl.int64) * q[1]
        gradients += tl.full((), BLOCK_M, tl.int64) * dout[1]
        stats += BLOCK_M * 2
    _store(_at(dk, first, head), dk[1], left, D, dk_tile * scale_out, BLOCK_N, BLOCK_D)
    _store(_at(dv, first, head), dv[1], left, D, dv_tile, BLOCK_N, BLOCK_D)


def _architecture() -> int | str | None:
    """Compute capability (90 for 9.0) or AMD's name of the current device; None without a GPU."""
    if triton.knobs.runtime.interpret:
        return 90
    try:
        driver = triton.runtime.driver.active
    except RuntimeError:  # launches are recorded, to be compiled ahead of time
        return None
    return _architecture_of(driver, driver.get_current_device())


@cache
def _architecture_of(driver, device: int) -> int | str:
    return driver.get_current_target().arch


def _options(dtype: torch.dtype, head_dim: int) -> tuple[dict, dict, dict]:
    """Constants and launch options of the three kernels."""
    block = max(32, triton.next_power_of_2(head_dim))
    kind = dtype.itemsize, block
    tiles = _TILES.get(_architecture(), _ANY).get(kind, _ANY[kind])
    interpreted = triton.knobs.runtime.interpret
    common = {"D": head_dim, "BLOCK_D": block, "WIDEN": interpreted}
    return tuple([common | one._asdict() for one in tiles])


def _grid(cu_seqlens: torch.Tensor, max_seqlen: int, heads: int, block: int) -> tuple[int, tuple[int]]:
    """Tiles of the longest sequence, and programs for those of every head of every sequence."""
    tiles = triton.cdiv(max_seqlen, block)
    return tiles, (tiles * heads * (len(cu_seqlens) - 1),)


def _with_strides(*tensors: torch.Tensor) -> list[tuple]:
    """Tensors (T, H, D) as ``_at`` takes them."""
    return [(t, *t.stride()[:2]) for t in tensors]


def launch_attention_varlen_fwd(
    qkv: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, scale: float, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """qkv (T, 3, heads, head_dim), the last dimension dense -> out (T, heads, head_dim), lse (heads, T) in base 2."""
    total, _, heads, head_dim = qkv.shape
    options = _options(qkv.dtype, head_dim)[0]
    tiles, grid = _grid(cu_seqlens, max_seqlen, heads, options["BLOCK_M"])
    q, k, v, out = _with_strides(*qkv.unbind(1), out)
    _attention_varlen_fwd_kernel[grid](
        q, k, v, cu_seqlens, out, lse, total, heads, tiles, scale * math.log2(math.e), **options
    )


def launch_attention_varlen_bwd(
    dout: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, cu_seqlens: torch.Tensor,
    max_seqlen: int, scale: float, dqkv: torch.Tensor,
) -> None:  # fmt: skip
    """dout and qkv with a dense last dimension, forward's outputs -> dqkv (T, 3, heads, head_dim)."""
    total, _, heads, head_dim = qkv.shape
    stats = lse.new_empty((heads, total, 2))
    dout, q, k, v, out, dq, dk, dv = _with_strides(dout, *qkv.unbind(1), out, *dqkv.unbind(1))
    _, for_kv, for_q = _options(qkv.dtype, head_dim)
    inputs, factors = (dout, q, k, v, cu_seqlens), (scale * math.log2(math.e), scale)
    # First the queries' kernel: it writes stats.
    tiles, grid = _grid(cu_seqlens, max_seqlen, heads, for_q["BLOCK_M"])
    _attention_varlen_bwd_q_kernel[grid](*inputs, out, lse, stats, dq, total, heads, tiles, *factors, **for_q)
    tiles, grid = _grid(cu_seqlens, max_seqlen, heads, for_kv["BLOCK_N"])
    _attention_varlen_bwd_kv_kernel[grid](*inputs, stats, dk, dv, total, heads, tiles, *factors, **for_kv)
