"""Non-maximum suppression on a GPU through Triton: bits of all pairs in parallel, then one program a problem."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .ops import WORD, overlap_words

# Words that a program joins at once: more of them spill registers.
_WORDS = 2048


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _corners(boxes, row, n, WORD: tl.constexpr):
    """x0, y0, x1, y1 of rows of boxes (n, 4), each (WORD,): a box is one load of 16 bytes."""
    at = boxes + row[:, None] * 4 + tl.arange(0, 4)[None, :]
    x, y = tl.split(tl.reshape(tl.load(at, mask=(row < n)[:, None], other=0.0), (WORD, 2, 2)))
    x0, x1 = tl.split(x)
    y0, y1 = tl.split(y)
    return x0, y0, x1, y1


@triton.jit(do_not_specialize=["n"])
def _nms_slots_pairs_fwd_kernel(boxes, valid, words, n, threshold, WORD: tl.constexpr):
    """boxes: (Z, n, 4) float32; valid: (Z, n) uint8; words: (Z, n, count) int64. A program has 64 rows and one word."""
    count = tl.cdiv(n, WORD)
    tile = tl.program_id(0).to(tl.int64)
    word, block, z = tile % count, tile // count % count, tile // count // count
    boxes, valid, words = boxes + z * n * 4, valid + z * n, words + z * n * count
    row, later = block * WORD + tl.arange(0, WORD), word * WORD + tl.arange(0, WORD)
    # Words before the diagonal and those of rows that are not valid are never read.
    if word >= block:
        valid_row = tl.load(valid + row, mask=row < n, other=0)
        if tl.max(valid_row, axis=0) != 0:
            ax0, ay0, ax1, ay1 = _corners(boxes, row, n, WORD)
            bx0, by0, bx1, by1 = _corners(boxes, later, n, WORD)
            area = ((ax1 - ax0) * (ay1 - ay0))[:, None] + ((bx1 - bx0) * (by1 - by0))[None, :]
            ax0, ay0, ax1, ay1 = ax0[:, None], ay0[:, None], ax1[:, None], ay1[:, None]
            bx0, by0, bx1, by1 = bx0[None, :], by0[None, :], bx1[None, :], by1[None, :]
            width = tl.minimum(ax1, bx1) - tl.maximum(ax0, bx0)
            height = tl.minimum(ay1, by1) - tl.maximum(ay0, by0)
            intersection = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
            over = tl.div_rn(intersection, area - intersection) > threshold
            over = over & (later.to(tl.int32)[None, :] > row.to(tl.int32)[:, None]) & (later < n)[None, :]
            # The bits differ, so that their sum joins them.
            bits = tl.sum(over.to(tl.int64) << tl.arange(0, WORD).to(tl.int64)[None, :], axis=1)
            tl.store(words + row * count + word, bits, mask=row < n)


@triton.jit(do_not_specialize=["n", "stop_at"])
def _nms_slots_fwd_kernel(
    valid, words, keep, n, stop_at, WORD: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """valid, keep: (Z, n) uint8; words: (Z, n, count) int64, COUNT at least count."""
    z = tl.program_id(0).to(tl.int64)
    count = tl.cdiv(n, WORD)
    valid, words, keep = valid + z * n, words + z * n * count, keep + z * n
    lane = tl.arange(0, WORD).to(tl.int64)
    word = tl.arange(0, COUNT)
    suppressed = tl.zeros((COUNT,), tl.int64)
    room = tl.zeros((), tl.int32) + stop_at
    first = tl.zeros((), tl.int64)
    for block in range(count):
        row = first + lane
        bit = tl.load(valid + row, mask=row < n, other=0).to(tl.int64)
        candidates = tl.sum(bit << lane, axis=0) & ~tl.sum(tl.where(word == block, suppressed, 0), axis=0)
        bit = tl.zeros((WORD,), tl.int64)
        if (candidates != 0) & (room > 0):
            # Repeated until nothing changes: after k rounds the first k rows are final.
            is_candidate = (candidates >> lane) & 1 != 0
            diagonal = tl.load(words + row * count + block, mask=is_candidate & (row < n), other=0)
            kept = candidates
            before = ~candidates
            while kept != before:
                before = kept
                bits = tl.where((kept >> lane) & 1 != 0, diagonal, 0)
                kept = candidates & ~tl.reduce(bits, 0, _either)
            bit = (kept >> lane) & 1
            bit = tl.where(tl.cumsum(bit, axis=0) <= room, bit, 0)
            room -= tl.sum(bit, axis=0).to(tl.int32)
            kept = tl.sum(bit << lane, axis=0)
            for start in range(0, WORD, ROWS):
                member = start + tl.arange(0, ROWS).to(tl.int64)
                is_kept = (kept >> member) & 1 != 0
                at = words + (first + member)[:, None] * count + word[None, :]
                here = is_kept[:, None] & (word[None, :] > block) & (word[None, :] < count)
                suppressed |= tl.reduce(tl.load(at, mask=here, other=0), 0, _either)
        tl.store(keep + row, bit.to(tl.uint8), mask=row < n)
        first += WORD


def launch_nms_slots_fwd(
    boxes: torch.Tensor, valid: torch.Tensor, iou_threshold: float, stop_at: int, keep: torch.Tensor
) -> None:
    """Contiguous boxes (Z, n, 4) float32 and valid (Z, n) bool, a float32 threshold -> keep (Z, n) bool."""
    problems, rows = keep.shape
    words = overlap_words(boxes)
    count = words.shape[2]
    valid = valid.view(torch.uint8)
    # A product and a sum are rounded one after the other, as torchvision's are.
    _nms_slots_pairs_fwd_kernel[(problems * count * count,)](
        boxes, valid, words, rows, iou_threshold, WORD=WORD, num_warps=8, enable_fp_fusion=False
    )
    columns = triton.next_power_of_2(count)
    _nms_slots_fwd_kernel[(problems,)](
        valid, words, keep.view(torch.uint8), rows, stop_at, WORD=WORD, COUNT=columns,
        ROWS=min(WORD, max(1, _WORDS // columns)), num_warps=4,
    )  # fmt: skip
