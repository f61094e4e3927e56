"""Non-maximum suppression in plain PyTorch."""

from __future__ import annotations

import torch

# Rows that are resolved together, and pairs of boxes that are compared together: memory is a few of these.
_BLOCK = 128
_PAIRS = 2**22


def nms_slots(boxes: torch.Tensor, valid: torch.Tensor, iou_threshold: float, stop_at: int) -> torch.Tensor:
    """The first ``stop_at`` rows of each problem that are valid and that no such row before them suppresses.

    Within a block of rows, ``keep = candidates & no kept row suppresses it`` is repeated until nothing changes: after
    k rounds the first k rows are final, so there is one solution, the greedy one. Each round waits for the device.

    Args:
        boxes: (Z, n, 4) float32, best first; valid: (Z, n) bool.
        iou_threshold: a float32 number; an IoU above it suppresses.
        stop_at: 0 or more.

    Returns:
        (Z, n) bool.
    """
    rows = boxes.shape[1]
    if rows == 0:
        return valid.clone(memory_format=torch.contiguous_format)
    problems = max(1, _PAIRS // (_BLOCK * rows))
    parts = zip(boxes.split(problems), valid.split(problems), strict=True)
    keep = torch.cat([_greedy(*part, iou_threshold) for part in parts])
    return keep & (keep.cumsum(1) <= stop_at)


def _greedy(boxes: torch.Tensor, valid: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    candidates = valid.clone(memory_format=torch.contiguous_format)
    for start in range(0, boxes.shape[1], _BLOCK):
        block = candidates[:, start : start + _BLOCK]
        size = block.shape[1]
        suppresses = _overlap(boxes[:, start : start + size], boxes[:, start:], iou_threshold)
        earlier = suppresses[:, :, :size].triu(1)
        keep, before = block.clone(), ~block
        while not torch.equal(keep, before):
            before = keep
            keep = block & ~(earlier & keep[:, :, None]).any(1)
        candidates[:, start + size :] &= ~(suppresses[:, :, size:] & keep[:, :, None]).any(1)
        block.copy_(keep)
    return candidates


def _overlap(first: torch.Tensor, second: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Whether boxes (Z, k, 4) and (Z, m, 4) have an IoU above the threshold, (Z, k, m)."""
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (first.unbind(-1), second.unbind(-1))]
    a, b = (boxes.movedim(-1, 0).contiguous() for boxes in (first, second))
    a, b = a[..., None], b[:, :, None]
    width, height = (torch.minimum(a[i + 2], b[i + 2]).sub_(torch.maximum(a[i], b[i])).clamp_(min=0) for i in (0, 1))
    intersection = width.mul_(height)
    union = (areas[0][:, :, None] + areas[1][:, None]).sub_(intersection)
    return intersection.div_(union) > iou_threshold
