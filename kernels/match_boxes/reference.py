"""Matching of boxes in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Overlaps in memory at once, unless those of one slot are more.
_PAIRS = 2**21


def match_boxes(
    boxes: torch.Tensor,
    counts: torch.Tensor,
    candidates: torch.Tensor,
    thresholds: Sequence[float],
    labels: Sequence[int],
    low_quality: bool,
    outside: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Best box and label of every candidate; some slots of all images at a time.

    Args:
        boxes: (B, G, 4); counts: (B,); candidates: (N, 4) or (B, N, 4); outside: (B, N) bool or None.
        thresholds: ascending; labels: one more.
        low_quality: label 1 where the overlap with a box is the best of this box.

    Returns:
        (B, N) int32 index and (B, N) int8 label.
    """
    batch, slots, count = *boxes.shape[:2], candidates.shape[-2]
    real = torch.arange(slots, device=boxes.device) < counts[:, None]
    best, index = boxes.new_zeros(batch, count), boxes.new_zeros(batch, count, dtype=torch.int32)
    low = torch.zeros_like(index, dtype=torch.bool)
    step = max(1, _PAIRS // max(batch * count, 1))
    for first in range(0, slots if count else 0, step):
        some = real[:, first : first + step, None]
        overlap = overlaps(boxes[:, first : first + step], candidates)
        overlap = overlap.where(some if outside is None else some & ~outside[:, None], 0)
        highest, slot = overlap.max(dim=1)
        index = torch.where(highest > best, (slot + first).int(), index)
        best = torch.maximum(best, highest)
        if low_quality:
            low |= ((overlap == overlap.amax(dim=2, keepdim=True)) & some).any(dim=1)
    label = torch.full_like(index, labels[0], dtype=torch.int8)
    for threshold, upper in zip(thresholds, labels[1:], strict=True):
        label = label.masked_fill(best >= threshold, upper)
    label = label.masked_fill(low, 1)
    return index, label if outside is None else label.masked_fill(outside, -1)


def overlaps(boxes: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """(B, G, N) float32 overlaps of boxes (B, G, 4) with candidates (N, 4) or (B, N, 4); never NaN."""
    x0, y0, x1, y1 = boxes[:, :, None].unbind(-1)
    u0, v0, u1, v1 = (candidates if candidates.dim() == 2 else candidates[:, None]).unbind(-1)
    width = (torch.minimum(x1, u1) - torch.maximum(x0, u0)).clamp(min=0)
    shared = width * (torch.minimum(y1, v1) - torch.maximum(y0, v0)).clamp(min=0)
    overlap = shared / ((x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - shared)
    return overlap.where(overlap > 0, 0)
