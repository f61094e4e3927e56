"""Matching of boxes on a GPU through Triton, one program a block of candidates."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

_BLOCK = 512


@triton.jit
def _load(candidates, image, block, count, image_stride, BLOCK: tl.constexpr):
    """A block of an image's candidates: their numbers, which exist, their coordinates and their areas."""
    n = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = n < count
    at = candidates + image * image_stride + n * 4
    x0, y0 = tl.load(at, mask=here, other=0.0), tl.load(at + 1, mask=here, other=0.0)
    x1, y1 = tl.load(at + 2, mask=here, other=0.0), tl.load(at + 3, mask=here, other=0.0)
    return n, here, x0, y0, x1, y1, (x1 - x0) * (y1 - y0)


@triton.jit
def _overlap(box, x0, y0, x1, y1, area):
    """Overlaps of a box with candidates, 0 instead of NaN; both passes must compute the same bits."""
    left, top, right, bottom = tl.load(box), tl.load(box + 1), tl.load(box + 2), tl.load(box + 3)
    width, height = tl.minimum(x1, right) - tl.maximum(x0, left), tl.minimum(y1, bottom) - tl.maximum(y0, top)
    shared = tl.where(width > 0.0, width, 0.0) * tl.where(height > 0.0, height, 0.0)
    overlap = tl.div_rn(shared, (right - left) * (bottom - top) + area - shared)
    return tl.where(overlap > 0.0, overlap, 0.0)


@triton.jit(do_not_specialize=["slots", "count", "image_stride"])
def _match_boxes_maxima_fwd_kernel(
    boxes, counts, candidates, outside, maxima, slots, count, image_stride, HAS_OUTSIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """maxima (B, G) int32: bits of each box's best overlap. They rise with the overlap, which is not negative, and a
    maximum is the same in any order."""
    blocks = tl.cdiv(count, BLOCK)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    n, here, x0, y0, x1, y1, area = _load(candidates, image, tl.program_id(0) % blocks, count, image_stride, BLOCK)
    if HAS_OUTSIDE:
        here = here & (tl.load(outside + image * count + n, mask=here, other=1) == 0)
    for g in range(tl.minimum(tl.load(counts + image), slots)):
        overlap = _overlap(boxes + (image * slots + g) * 4, x0, y0, x1, y1, area)
        highest = tl.max(tl.where(here, overlap, 0.0), axis=0)
        tl.atomic_max(maxima + image * slots + g, highest.to(tl.int32, bitcast=True), mask=highest > 0.0, sem="relaxed")


@triton.jit(do_not_specialize=["slots", "count", "image_stride", "low_quality"])
def _match_boxes_fwd_kernel(
    boxes, counts, candidates, thresholds, outside, maxima, index, label, slots, count, image_stride,
    labels, low_quality, HAS_OUTSIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """boxes: (B, G, 4); counts: (B,) int32; candidates: an image's ``image_stride`` after the last one's; maxima:
    (B, G); index: (B, N) int32; label: (B, N) int8."""
    blocks = tl.cdiv(count, BLOCK)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    n, here, x0, y0, x1, y1, area = _load(candidates, image, tl.program_id(0) % blocks, count, image_stride, BLOCK)
    best, slot = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.int32)
    low = tl.zeros((BLOCK,), tl.int1)
    for g in range(tl.minimum(tl.load(counts + image), slots)):
        overlap = _overlap(boxes + (image * slots + g) * 4, x0, y0, x1, y1, area)
        slot = tl.where(overlap > best, g, slot)
        best = tl.where(overlap > best, overlap, best)
        # No overlap is -1.
        low = low | (overlap == tl.load(maxima + image * slots + g, mask=low_quality != 0, other=-1.0))
    band = tl.full((BLOCK,), labels[0], tl.float32)
    for i in tl.static_range(len(thresholds)):
        band = tl.where(best >= thresholds[i], labels[i + 1], band)
    band = tl.where(low, 1.0, band)
    place = image * count + n
    if HAS_OUTSIDE:
        drop = tl.load(outside + place, mask=here, other=1) != 0
        slot, band = tl.where(drop, 0, slot), tl.where(drop, -1.0, band)
    tl.store(index + place, slot, mask=here)
    tl.store(label + place, band.to(tl.int8), mask=here)


def launch_match_boxes_fwd(
    boxes: torch.Tensor, counts: torch.Tensor, candidates: torch.Tensor, thresholds: list[float], labels: list[int],
    outside: torch.Tensor | None, maxima: torch.Tensor | None, index: torch.Tensor, label: torch.Tensor,
) -> None:  # fmt: skip
    """Contiguous boxes (B, G, 4), counts (B,) int32, candidates (N, 4) or (B, N, 4), outside (B, N) -> index, label
    (B, N). maxima: (B, G) zeros, which become each box's best overlap; None without a second pass."""
    batch, count = index.shape
    grid = (batch * triton.cdiv(count, _BLOCK),)
    sizes = boxes.shape[1], count, 4 * count if candidates.dim() == 3 else 0
    outside = None if outside is None else outside.view(torch.uint8)
    # Each operation is rounded once: fused they would differ from box_iou in the last bit, and so would the best box.
    options = {"HAS_OUTSIDE": outside is not None, "BLOCK": _BLOCK, "num_warps": 4, "enable_fp_fusion": False}
    if maxima is not None:
        _match_boxes_maxima_fwd_kernel[grid](
            boxes, counts, candidates, outside, maxima.view(torch.int32), *sizes, **options
        )
    # Triton compiles anew for another number of thresholds, and for integers in a tuple.
    above = max(0, 2 - len(thresholds))
    thresholds, labels = (*thresholds, *[math.inf] * above), (*labels, *labels[-1:] * above)
    _match_boxes_fwd_kernel[grid](
        boxes, counts, candidates, thresholds, outside, boxes if maxima is None else maxima, index, label, *sizes,
        tuple(map(float, labels)), int(maxima is not None), **options,
    )  # fmt: skip
