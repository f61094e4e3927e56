"""Token sampling on a GPU through Triton, one program per image."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Tokens whose keys fit into a program's registers. Larger images are read again in every round.
_BLOCK = 8192
# Tokens of a warp: 16 keys per lane in registers, 4 per lane in the scan. More would spill registers.
_WARP_KEYS, _WARP_SCAN = 512, 128
# Keys of tokens that are not part of the image, of NaN and of infinity.
_OUTSIDE = tl.constexpr(0x7FFFFFFF)
_NAN = tl.constexpr(0x7FFFFFFE)
_INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def _sort_key(noise, valid_mask, token, L, PACKED: tl.constexpr):
    """int32 in the order of argsort, -0 equal to 0. noise: (L,) float32; valid_mask: (L,) uint8."""
    x = tl.load(noise + token, mask=token < L, other=0.0)
    valid = tl.load(valid_mask + token, mask=token < L, other=0) != 0
    key = x.to(tl.int32, bitcast=True)
    key = tl.where(key < 0, key ^ 0x7FFFFFFF, key)
    key = tl.where(x == 0, 0, key)
    key = tl.where(x != x, _NAN, key)
    key = tl.where(valid, key, _OUTSIDE if PACKED else _INFINITY)
    return tl.where(token < L, key, _OUTSIDE)


@triton.jit(do_not_specialize=["L", "kept", "masked"])
def _sample_tokens_fwd_kernel(
    noise, valid_mask, offsets, ids_keep, ids_mask, ids_restore, L, kept, masked,
    PACKED: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """noise: (B, L) float32; valid_mask: (B, L) uint8; ids_restore: (B, L) int64. Packed: offsets: (2, B + 1) int32;
    ids_keep: (kept,), ids_mask: (masked,) int64; else ids_keep: (B, kept), ids_mask: (B, masked)."""
    b = tl.program_id(0).to(tl.int64)
    noise, valid_mask, ids_restore = noise + b * L, valid_mask + b * L, ids_restore + b * L
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
        keys = _sort_key(noise, valid_mask, tl.arange(0, BLOCK), L, PACKED)

    # Radix selection of the count-th smallest key, two bits a round: it is >= low, and `below` < count keys are < low.
    # Not eight bits a round, as CUDA C++: before 3.8 tl.histogram counts by ballots, more instructions and registers.
    low = tl.full((), -2147483648, tl.int32)
    below = tl.full((), 0, tl.int32)
    step = tl.full((), 1073741824, tl.int32)
    for _ in range(16):
        t1, t2, t3 = low + step, low + step + step, low + step + step + step
        n1, n2, n3 = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
        for start in range(0, BLOCK if ONE_BLOCK else L, BLOCK):
            if not ONE_BLOCK:
                keys = _sort_key(noise, valid_mask, start + tl.arange(0, BLOCK), L, PACKED)
            # One tl.sum for three counts of 20 bits.
            counts = (keys < t1).to(tl.int64) + ((keys < t2).to(tl.int64) << 20) + ((keys < t3).to(tl.int64) << 40)
            total = tl.sum(counts, axis=0)
            n1 += (total & 0xFFFFF).to(tl.int32)
            n2 += (total >> 20 & 0xFFFFF).to(tl.int32)
            n3 += (total >> 40).to(tl.int32)
        low = tl.where(n3 < count, t3, tl.where(n2 < count, t2, tl.where(n1 < count, t1, low)))
        below = tl.where(n3 < count, n3, tl.where(n2 < count, n2, tl.where(n1 < count, n1, below)))
        step = step >> 2

    # Ties: of the keys equal to low, the first in raster order fill up the count.
    ties = count - below
    smaller, equal, members = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    for start in range(0, L, SCAN):
        token = start + tl.arange(0, SCAN)
        key = _sort_key(noise, valid_mask, token, L, PACKED)
        # One tl.cumsum for two counts of 16 bits.
        both = (key < low).to(tl.int32) + ((key == low).to(tl.int32) << 16)
        earlier = tl.cumsum(both, axis=0) - both
        equal_before = equal + (earlier >> 16)
        kept_row = smaller + (earlier & 0xFFFF) + tl.minimum(equal_before, ties)
        taken = (key < low) | ((key == low) & (equal_before < ties))
        member = key != _OUTSIDE
        if PACKED:
            masked_row = members + tl.cumsum(member.to(tl.int32), axis=0) - member.to(tl.int32) - kept_row
            members += tl.sum(member.to(tl.int32), axis=0)
        else:
            masked_row = token - kept_row
        tl.store(ids_keep + kept_row, first_token + token, mask=taken)
        tl.store(ids_mask + masked_row, first_token + token, mask=member & (taken == 0))
        row = tl.where(taken, first_kept + kept_row, first_masked + masked_row)
        tl.store(ids_restore + token, tl.where(member, row, -1), mask=token < L)
        total = tl.sum(both, axis=0)
        smaller += total & 0xFFFF
        equal += total >> 16


def launch_sample_tokens_fwd(
    noise: torch.Tensor, valid_mask: torch.Tensor, offsets: torch.Tensor | None, ids_keep: torch.Tensor,
    ids_mask: torch.Tensor, ids_restore: torch.Tensor,
) -> None:  # fmt: skip
    """Contiguous noise (B, L) float32, valid_mask (B, L) bool and offsets -> the three outputs, see ``ops``."""
    batch, length = noise.shape
    # The same block for every image: others would be other kernels to compile, and take as long.
    warps = max(1, _BLOCK // _WARP_KEYS)
    _sample_tokens_fwd_kernel[(batch,)](
        noise, valid_mask.view(torch.uint8), offsets, ids_keep, ids_mask, ids_restore, length, ids_keep.shape[-1],
        ids_mask.shape[-1], PACKED=offsets is not None, ONE_BLOCK=length <= _BLOCK, BLOCK=_BLOCK,
        SCAN=min(_BLOCK, warps * _WARP_SCAN), num_warps=warps,
    )  # fmt: skip
