"""Masks in three forms: polygons or bitmaps of ground truth, soft 28x28 maps, and pasted pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pycocotools.mask as coco_mask
import torch
import torch.nn.functional as F
from torchvision.ops import roi_align

Polygons = Sequence[np.ndarray]


def crop_and_resize(
    masks: torch.Tensor | Sequence[Polygons], index: torch.Tensor, boxes: torch.Tensor, size: int
) -> torch.Tensor:
    """The part of ground-truth masks inside boxes, as small bitmaps: the mask head's targets.

    Args:
        masks: (M, H, W) bool, or M lists of COCO polygons [x0, y0, x1, y1, ...] in pixels.
        index: (N,) int64, the mask of each box.
        boxes: (N, 4) pixels.
        size: side of the result.

    Returns:
        (N, size, size) bool on the device of ``boxes``.
    """
    if isinstance(masks, torch.Tensor):
        rois = torch.cat([index.unsqueeze(1).to(boxes.dtype), boxes], dim=1)
        maps = masks.to(boxes.device, torch.float32).unsqueeze(1)
        return roi_align(maps, rois, size, 1.0, 0, aligned=True).squeeze(1) >= 0.5
    chosen = index.tolist()
    windows = boxes.detach().double().cpu().numpy()
    out = np.zeros((len(chosen), size, size), dtype=bool)
    for row, (mask, window) in enumerate(zip(chosen, windows, strict=True)):
        out[row] = _rasterize(masks[mask], window, size)
    return torch.from_numpy(out).to(boxes.device)


def _rasterize(polygons: Polygons, window: np.ndarray, size: int) -> np.ndarray:
    # Degenerate windows are treated as a tenth of a pixel wide.
    scale = size / np.maximum(window[2:] - window[:2], 0.1)
    moved = [((np.asarray(p, np.float64).reshape(-1, 2) - window[:2]) * scale).reshape(-1) for p in polygons]
    if not moved:
        return np.zeros((size, size), dtype=bool)
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(moved, size, size))).astype(bool)


def paste_masks(
    probabilities: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int], threshold: float = 0.5
) -> torch.Tensor:
    """Soft maps of boxes resampled bilinearly into pictures and cut at a threshold.

    Args:
        probabilities: (N, S, S) in [0, 1].
        boxes: (N, 4) in pixels of the picture.
        size: (height, width) of the picture.

    Returns:
        (N, height, width) bool.
    """
    height, width = size
    out = torch.zeros(len(boxes), height, width, dtype=torch.bool, device=boxes.device)
    if boxes.device.type == "cpu":
        # One by one, each in its own window: most masks cover little of the picture.
        for row, (prob, box) in enumerate(zip(probabilities, boxes, strict=True)):
            x0, y0 = (box[:2].floor().int() - 1).clamp(min=0).tolist()
            x1, y1 = (min(int(c) + 1, side) for c, side in zip(box[2:].ceil(), (width, height), strict=True))
            if x1 > x0 and y1 > y0:
                out[row, y0:y1, x0:x1] = _resample(prob[None], box[None], (x0, y0, x1, y1))[0] >= threshold
        return out
    # Whole pictures at once, as many as a quarter gigabyte of float32 holds.
    for rows in torch.arange(len(boxes), device=boxes.device).split(max(1, 2**26 // max(1, height * width))):
        out[rows] = _resample(probabilities[rows], boxes[rows], (0, 0, width, height)) >= threshold
    return out


def _resample(prob: torch.Tensor, boxes: torch.Tensor, window: tuple[int, int, int, int]) -> torch.Tensor:
    x0, y0, x1, y1 = window
    x = torch.arange(x0, x1, device=boxes.device, dtype=torch.float32) + 0.5
    y = torch.arange(y0, y1, device=boxes.device, dtype=torch.float32) + 0.5
    left, top, right, bottom = boxes.float().unsqueeze(-1).unbind(1)
    # A box without area divides by zero; its pixels must lie outside, or count as the centre.
    gx = ((x - left) / (right - left) * 2 - 1).nan_to_num(0.0, 0.0, 0.0)
    gy = ((y - top) / (bottom - top) * 2 - 1).nan_to_num(0.0, 0.0, 0.0)
    grid = torch.stack([gx[:, None, :].expand(-1, len(y), -1), gy[:, :, None].expand(-1, -1, len(x))], dim=-1)
    return F.grid_sample(prob[:, None].float(), grid, align_corners=False).squeeze(1)
