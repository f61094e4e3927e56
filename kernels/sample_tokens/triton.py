"""Token sampling on a GPU through Triton, one program a picture."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Tokens that a program looks at together; more of them spill registers.
_BLOCK = 2048


@triton.jit
def _sort_key(noise, valid, token, L):
    """int32 in the order of argsort: padding as infinity, -0 equal to 0, NaN last. noise: (L,) float32; valid: (L,)."""
    x = tl.load(noise + token, mask=token < L, other=0.0)
    x = tl.where(tl.load(valid + token, mask=token < L, other=0) != 0, x, float("inf"))
    key = x.to(tl.int32, bitcast=True)
    key = tl.where(key < 0, key ^ 0x7FFFFFFF, key)
    key = tl.where(x == 0, 0, key)
    return tl.where(x != x, 0x7FFFFFFF, key)


@triton.jit
def _sample_tokens_kernel(noise, valid, keep, drop, restore, L, K, BLOCK: tl.constexpr):
    """noise: (B, L) float32; valid: (B, L) uint8; keep: (B, K), drop: (B, L - K), restore: (B, L) int64."""
    b = tl.program_id(0).to(tl.int64)
    noise, valid, restore = noise + b * L, valid + b * L, restore + b * L
    keep, drop = keep + b * K, drop + b * (L - K)

    # Bisection for the K-th smallest key: K keys or more are <= high, fewer are < low.
    low = tl.full((), -2147483648, tl.int64)
    high = tl.full((), 2147483647, tl.int64)
    for _ in range(32):
        middle = (low + high) >> 1
        counts = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, L, BLOCK):
            token = start + tl.arange(0, BLOCK)
            key = _sort_key(noise, valid, token, L)
            counts += ((token < L) & (key <= middle.to(tl.int32))).to(tl.int32)
        enough = tl.sum(counts, axis=0) >= K
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    last = high.to(tl.int32)

    counts = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, L, BLOCK):
        token = start + tl.arange(0, BLOCK)
        counts += ((token < L) & (_sort_key(noise, valid, token, L) < last)).to(tl.int32)
    # Of the keys equal to the last one, the first in raster order fill up the count.
    ties = K - tl.sum(counts, axis=0)
    kept = tl.full((), 0, tl.int32)
    for start in range(0, L, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < L
        key = _sort_key(noise, valid, token, L)
        equal = (inside & (key == last)).to(tl.int32)
        taken = inside & ((key < last) | ((equal != 0) & (tl.cumsum(equal, axis=0) <= ties)))
        place = kept + tl.cumsum(taken.to(tl.int32), axis=0) - taken.to(tl.int32)
        tl.store(keep + place, token.to(tl.int64), mask=taken)
        tl.store(drop + token - place, token.to(tl.int64), mask=inside & (taken == 0))
        tl.store(restore + token, tl.where(taken, place, K + token - place).to(tl.int64), mask=inside)
        ties -= tl.sum(equal, axis=0)
        kept += tl.sum(taken.to(tl.int32), axis=0)


def launch_sample_tokens(
    noise: torch.Tensor, valid: torch.Tensor, keep: torch.Tensor, drop: torch.Tensor, restore: torch.Tensor
) -> None:
    """Contiguous noise (B, L) float32 and valid (B, L) bool -> keep (B, K >= 1), drop (B, L - K), restore (B, L)."""
    batch, length = noise.shape
    block = min(_BLOCK, triton.next_power_of_2(length))
    _sample_tokens_kernel[(batch,)](
        noise, valid.view(torch.uint8), keep, drop, restore, length, keep.shape[1],
        BLOCK=block, num_warps=max(1, block // 256),
    )  # fmt: skip
