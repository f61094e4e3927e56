"""ROIAlign over all levels of a pyramid on a GPU through CUDA C++: scratch, and what C cannot see in pointers."""

from __future__ import annotations

import torch

from ..library import call_cuda

# kGap in csrc/RoiAlignLevelsCUDA.cu.
_GAP = 3


def launch_roi_align_levels_fwd(features, boxes, levels, sizes, scales, sampling_ratio, y):
    """features (B, C, H, W) and y (B * S, C, P, P) channels_last, boxes (B, S, 4), levels (B, S), sizes (L, B, 2)."""
    arguments = features, boxes, levels, sizes, scales, sampling_ratio, y
    _call("fwd", arguments, features, boxes, y)


def launch_roi_align_levels_bwd(dy, boxes, levels, sizes, scales, sampling_ratio, dfeatures):
    """dy (B * S, C, P, P) channels_last, and what forward took -> dfeatures (B, C, H, W) channels_last."""
    arguments = dy, boxes, levels, sizes, scales, sampling_ratio, dfeatures
    _call("bwd", arguments, dfeatures, boxes, dy)


def _call(way, arguments, maps, boxes, pooled):
    heights, widths = ([m.shape[i] for m in maps] for i in (2, 3))
    rois, channels, side, _ = pooled.shape
    length = max(*heights, *widths) + _GAP * side
    ranges = torch.empty((rois, 2, side, 2), dtype=torch.int32, device=boxes.device)
    weights = torch.empty((rois, 2, length), dtype=torch.float32, device=boxes.device)
    numbers = len(maps), *boxes.shape[:2], channels, side, length
    call_cuda(
        f"roi_align_levels_{way}", *arguments, ranges, weights, heights, widths, sizes=numbers, typed=(pooled,)
    )  # fmt: skip
