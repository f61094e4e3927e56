"""Non-maximum suppression on a GPU through CUDA C++: scratch, and what C cannot see in pointers."""

from __future__ import annotations

from ..library import call_cuda
from .ops import overlap_words


def launch_nms_slots_fwd(boxes, valid, iou_threshold, stop_at, keep):
    """Contiguous boxes (Z, n, 4) float32 and valid (Z, n) bool, a float32 threshold -> keep (Z, n) bool."""
    call_cuda("nms_slots_fwd", boxes, valid, iou_threshold, stop_at, keep, overlap_words(boxes), sizes=keep.shape)
