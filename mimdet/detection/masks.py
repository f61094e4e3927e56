"""Masks: polygons or bitmaps of ground truth, soft 28x28 maps of detections, and bitmaps of whole images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torchvision.ops import roi_align

from ..kernels import rasterize_polygons
from ..kernels.tensors import to_device_together

# grid_sample processes this many pixels at once: 2**26 in float32 are 256 MiB.
_CPU_PIXELS, _GPU_PIXELS = 2**22, 2**26
# paste_in_parts yields masks of at most this many pixels together.
_PART_PIXELS = 2**24


class GroundTruthMasks(NamedTuple):
    """Masks of the ground truth of B images in G slots each: polygons, bitmaps, or both.

    Attributes:
        points, polygon_starts, instance_starts: B * G + 1 instances' polygons, as ``rasterize_polygons`` takes them;
            the last instance has none.
        bitmaps: (M, H, W) of the images, by number, that have them instead of polygons.
        slots: G.
    """

    points: torch.Tensor
    polygon_starts: torch.Tensor
    instance_starts: torch.Tensor
    bitmaps: Mapping[int, torch.Tensor]
    slots: int

    def targets(self, index: torch.Tensor, boxes: torch.Tensor, valid: torch.Tensor, size: int) -> torch.Tensor:
        """The mask head's targets: the part of masks inside boxes.

        Args:
            index: (B, S) int64, slot of each box's instance.
            boxes: (B, S, 4) pixels.
            valid: (B, S) bool; the others give empty masks.
            size: side of the result.

        Returns:
            (B, S, size, size) bool.
        """
        instance = index + torch.arange(0, len(index) * self.slots, self.slots, device=index.device)[:, None]
        instance = torch.where(valid, instance, len(index) * self.slots).flatten()
        # On the CPU for MPS.
        place = self.points.device
        masks = rasterize_polygons(
            self.points,
            self.polygon_starts,
            self.instance_starts,
            instance.to(place),
            boxes.flatten(0, 1).to(place),
            size,
        )
        masks = masks.to(boxes.device).unflatten(0, index.shape)
        if not self.bitmaps:
            return masks
        images = list(masks)
        for i, bitmap in self.bitmaps.items():
            if len(bitmap):
                images[i] = _crop_bitmaps(bitmap, index[i], boxes[i], size) & valid[i, :, None, None]
        return torch.stack(images)


def _crop_bitmaps(masks: torch.Tensor, index: torch.Tensor, boxes: torch.Tensor, size: int) -> torch.Tensor:
    """(M, H, W) bitmaps, the number (S,) and the box (S, 4) of each crop -> (S, size, size) bool."""
    rois = torch.cat([index.unsqueeze(1).to(boxes.dtype), boxes], dim=1)
    (maps,) = to_device_together([masks], boxes.device)
    return roi_align(maps.float().unsqueeze(1), rois, size, 1.0, 0, aligned=True).squeeze(1) >= 0.5


def paste_masks(
    probabilities: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int], threshold: float = 0.5
) -> torch.Tensor:
    """Soft maps of boxes resampled bilinearly into images and cut at a threshold.

    Args:
        probabilities: (N, S, S) in [0, 1].
        boxes: (N, 4) in pixels of the image.
        size: (height, width) of the image.

    Returns:
        (N, height, width) bool on the device of ``boxes``. Temporary memory: a few float32 maps of at most 2**26
        pixels on a GPU, 2**22 on a CPU.
    """
    height, width = size
    out = torch.zeros(len(boxes), height, width, dtype=torch.bool, device=boxes.device)
    if boxes.device.type == "cpu":
        # On a CPU one mask at a time, inside its box: most masks cover little of the image.
        for row, box in enumerate(boxes):
            x0, y0 = (box[:2].floor().int() - 1).clamp(min=0).tolist()
            x1, y1 = (min(int(c) + 1, side) for c, side in zip(box[2:].ceil(), (width, height), strict=True))
            _paste(out, probabilities, boxes, slice(row, row + 1), (x0, y0, x1, y1), _CPU_PIXELS, threshold)
        return out
    # On a GPU as many whole masks at once as fit.
    count = max(1, _GPU_PIXELS // max(1, height * width))
    for row in range(0, len(boxes), count):
        _paste(out, probabilities, boxes, slice(row, row + count), (0, 0, width, height), _GPU_PIXELS, threshold)
    return out


def paste_in_parts(
    probabilities: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int], threshold: float = 0.5
) -> Iterator[torch.Tensor]:
    """The masks of :func:`paste_masks` in order, a few at a time.

    Yields:
        (n, height, width) bool: one mask, or as many as have 2**24 pixels (16 MiB) together. Their numbers add up to N.
    """
    count = max(1, _PART_PIXELS // max(1, size[0] * size[1]))
    for maps, windows in zip(probabilities.split(count), boxes.split(count), strict=True):
        yield paste_masks(maps, windows, size, threshold)


def _paste(
    out: torch.Tensor,
    probabilities: torch.Tensor,
    boxes: torch.Tensor,
    rows: slice,
    window: tuple[int, int, int, int],
    most: int,
    threshold: float,
) -> None:
    """Fill ``window`` (x0, y0, x1, y1) of the masks ``rows``, in bands of at most ``most`` pixels (or one line)."""
    x0, y0, x1, y1 = window
    if x1 <= x0 or y1 <= y0:
        return
    lines = max(1, most // (x1 - x0))
    for top in range(y0, y1, lines):
        bottom = min(top + lines, y1)
        maps = _resample(probabilities[rows], boxes[rows], (x0, top, x1, bottom))
        out[rows, top:bottom, x0:x1] = maps >= threshold


def _resample(prob: torch.Tensor, boxes: torch.Tensor, window: tuple[int, int, int, int]) -> torch.Tensor:
    x0, y0, x1, y1 = window
    x = torch.arange(x0, x1, device=boxes.device, dtype=torch.float32) + 0.5
    y = torch.arange(y0, y1, device=boxes.device, dtype=torch.float32) + 0.5
    left, top, right, bottom = boxes.float().unsqueeze(-1).unbind(1)
    # A box without area divides by zero: infinities and NaN become 0, the center of the map.
    gx = ((x - left) / (right - left) * 2 - 1).nan_to_num(0.0, 0.0, 0.0)
    gy = ((y - top) / (bottom - top) * 2 - 1).nan_to_num(0.0, 0.0, 0.0)
    grid = torch.stack([gx[:, None, :].expand(-1, len(y), -1), gy[:, :, None].expand(-1, -1, len(x))], dim=-1)
    return F.grid_sample(prob[:, None].float(), grid, align_corners=False).squeeze(1)
