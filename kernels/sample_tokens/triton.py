"""Token sampling on a GPU through Triton, one program a image."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Tokens whose keys a program holds in registers. Images of more tokens are read again in every round.
_BLOCK = 8192
# Each warp holds 16 keys a lane, and places 4 tokens a lane at a time: more of these spill registers.
_HELD, _PLACED = 512, 128
# Keys of what is not part of the image, and of NaN and infinity.
_OUTSIDE = tl.constexpr(0x7FFFFFFF)
_NAN = tl.constexpr(0x7FFFFFFE)
_INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def _sort_key(noise, valid, token, L, PACKED: tl.constexpr):
    """int32 in the order of argsort, -0 equal to 0. noise: (L,) float32; valid: (L,) uint8."""
    x = tl.load(noise + token, mask=token < L, other=0.0)
    inside = tl.load(valid + token, mask=token < L, other=0) != 0
    key = x.to(tl.int32, bitcast=True)
    key = tl.where(key < 0, key ^ 0x7FFFFFFF, key)
    key = tl.where(x == 0, 0, key)
    key = tl.where(x != x, _NAN, key)
    key = tl.where(inside, key, _OUTSIDE if PACKED else _INFINITY)
    return tl.where(token < L, key, _OUTSIDE)


@triton.jit
def _sample_tokens_fwd_kernel(
    noise, valid, offsets, ids_keep, ids_mask, ids_restore, L, kept, masked,
    PACKED: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """noise: (B, L) float32; valid: (B, L) uint8; ids_restore: (B, L) int64. Packed: offsets: (2, B + 1) int32;
    ids_keep: (kept,), ids_mask: (masked,) int64; else ids_keep: (B, kept), ids_mask: (B, masked)."""
    b = tl.program_id(0).to(tl.int64)
    noise, valid, ids_restore = noise + b * L, valid + b * L, ids_restore + b * L
    if PACKED:
        count = tl.load(offsets + b + 1) - tl.load(offsets + b)
        first_kept = tl.load(offsets + b).to(tl.int64)
        first_masked = tl.load(offsets + tl.num_programs(0) + 1 + b).to(tl.int64)
        ids_keep, ids_mask = ids_keep + first_kept, ids_mask + first_masked
        first_token, first_masked = b * L, kept + first_masked
    else:
        count = kept
        ids_keep, ids_mask = ids_keep + b * kept, ids_mask + b * masked
        first_token, first_kept, first_masked = 0, 0, kept
    if ONE_BLOCK:
        keys = _sort_key(noise, valid, tl.arange(0, BLOCK), L, PACKED)

    # The count-th smallest key, two bits a round: it is >= low; `below` keys, fewer than count, are < low.
    low = tl.full((), -2147483648, tl.int32)
    below = tl.full((), 0, tl.int32)
    step = tl.full((), 1073741824, tl.int32)
    for _ in range(16):
        t1, t2, t3 = low + step, low + step + step, low + step + step + step
        n1, n2, n3 = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
        for start in range(0, BLOCK if ONE_BLOCK else L, BLOCK):
            if not ONE_BLOCK:
                keys = _sort_key(noise, valid, start + tl.arange(0, BLOCK), L, PACKED)
            # Three counts in one sum.
            some = (keys < t1).to(tl.int64) + ((keys < t2).to(tl.int64) << 20) + ((keys < t3).to(tl.int64) << 40)
            total = tl.sum(some, axis=0)
            n1 += (total & 0xFFFFF).to(tl.int32)
            n2 += (total >> 20 & 0xFFFFF).to(tl.int32)
            n3 += (total >> 40).to(tl.int32)
        low = tl.where(n3 < count, t3, tl.where(n2 < count, t2, tl.where(n1 < count, t1, low)))
        below = tl.where(n3 < count, n3, tl.where(n2 < count, n2, tl.where(n1 < count, n1, below)))
        step = step >> 2

    # Of the keys equal to it, the first in raster order fill up the count.
    ties = count - below
    smaller, equal, members = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    for start in range(0, L, SCAN):
        token = start + tl.arange(0, SCAN)
        key = _sort_key(noise, valid, token, L, PACKED)
        # Two counts in one scan.
        both = (key < low).to(tl.int32) + ((key == low).to(tl.int32) << 16)
        earlier = tl.cumsum(both, axis=0) - both
        equal_before = equal + (earlier >> 16)
        place = smaller + (earlier & 0xFFFF) + tl.minimum(equal_before, ties)
        taken = (key < low) | ((key == low) & (equal_before < ties))
        member = key != _OUTSIDE
        if PACKED:
            others = members + tl.cumsum(member.to(tl.int32), axis=0) - member.to(tl.int32) - place
            members += tl.sum(member.to(tl.int32), axis=0)
        else:
            others = token - place
        tl.store(ids_keep + place, first_token + token, mask=taken)
        tl.store(ids_mask + others, first_token + token, mask=member & (taken == 0))
        row = tl.where(taken, first_kept + place, first_masked + others)
        tl.store(ids_restore + token, tl.where(member, row, -1), mask=token < L)
        total = tl.sum(both, axis=0)
        smaller += total & 0xFFFF
        equal += total >> 16


def launch_sample_tokens_fwd(
    noise: torch.Tensor, valid: torch.Tensor, offsets: torch.Tensor | None, ids_keep: torch.Tensor,
    ids_mask: torch.Tensor, ids_restore: torch.Tensor,
) -> None:  # fmt: skip
    """Contiguous noise (B, L) float32, valid (B, L) bool and offsets -> the three outputs, see ``ops``."""
    batch, length = noise.shape
    block = min(_BLOCK, triton.next_power_of_2(length))
    warps = max(1, block // _HELD)
    _sample_tokens_fwd_kernel[(batch,)](
        noise, valid.view(torch.uint8), offsets, ids_keep, ids_mask, ids_restore, length, ids_keep.shape[-1],
        ids_mask.shape[-1], PACKED=offsets is not None, ONE_BLOCK=length <= block, BLOCK=block,
        SCAN=min(block, warps * _PLACED), num_warps=warps,
    )  # fmt: skip
