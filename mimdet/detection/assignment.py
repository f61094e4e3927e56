"""Boxes and their deltas, and the assignment of candidates to ground-truth boxes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torchvision.ops import box_iou

from ..modeling.areas import ValidArea

# exp() would overflow for large deltas: a box grows by at most 1000 / 16.
SCALE_CLAMP = math.log(1000.0 / 16)


def clip_boxes(boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Boxes clipped to an image of (height, width)."""
    height, width = size
    x = boxes[..., 0::2].clamp(min=0, max=width)
    y = boxes[..., 1::2].clamp(min=0, max=height)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1)


def nonempty(boxes: torch.Tensor) -> torch.Tensor:
    """(...,) bool: width and height both above zero."""
    return (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])


def scale_boxes(boxes: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """Boxes of an image of size ``old`` (height, width) in an image of size ``new``."""
    sy, sx = new[0] / old[0], new[1] / old[1]
    return boxes * boxes.new_tensor([sx, sy, sx, sy])


class Box2BoxTransform:
    """R-CNN's box coding: shifts by the reference's size, log of the size ratio, each times a weight.

    Args:
        weights: of dx, dy, dw, dh.
        scale_clamp: upper bound of dw and dh when decoding.
    """

    def __init__(self, weights: Sequence[float], scale_clamp: float = SCALE_CLAMP):
        self.weights = tuple(float(w) for w in weights)
        self.scale_clamp = scale_clamp

    def get_deltas(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Deltas (..., 4) that take boxes ``source`` of positive size to ``target``."""
        source_size = source[..., 2:] - source[..., :2]
        target_size = target[..., 2:] - target[..., :2]
        shift = (target[..., :2] + 0.5 * target_size) - (source[..., :2] + 0.5 * source_size)
        deltas = torch.cat([shift / source_size, torch.log(target_size / source_size)], dim=-1)
        return deltas * deltas.new_tensor(self.weights)

    def apply_deltas(self, deltas: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Boxes (..., K * 4) in float32 from deltas (..., K * 4) about boxes (..., 4)."""
        shape = deltas.shape
        deltas = deltas.float().reshape(*shape[:-1], shape[-1] // 4, 4) / deltas.new_tensor(
            self.weights, dtype=torch.float32
        )
        boxes = boxes.float().unsqueeze(-2)
        size = boxes[..., 2:] - boxes[..., :2]
        center = boxes[..., :2] + 0.5 * size + deltas[..., :2] * size
        half = 0.5 * size * deltas[..., 2:].clamp(max=self.scale_clamp).exp()
        return torch.cat([center - half, center + half], dim=-1).reshape(shape)


class Matcher:
    """Labels each candidate by its best overlap.

    Args:
        thresholds: ascending, above 0; they divide the overlaps into ``len(thresholds) + 1`` bands.
        labels: of each band, lowest first: 1 foreground, 0 background, -1 ignored.
        allow_low_quality_matches: also make foreground every candidate that ties for the best overlap with
            some ground-truth box, however low.

    Raises:
        ValueError: counts that do not fit, thresholds out of order, unknown labels.
    """

    def __init__(self, thresholds: Sequence[float], labels: Sequence[int], allow_low_quality_matches: bool = False):
        if len(labels) != len(thresholds) + 1 or list(thresholds) != sorted(thresholds) or min(thresholds) <= 0:
            raise ValueError(f"matcher: thresholds {list(thresholds)} and labels {list(labels)} do not fit")
        if any(label not in (-1, 0, 1) for label in labels):
            raise ValueError(f"matcher: labels must be -1, 0 or 1, got {list(labels)}")
        self.thresholds = list(thresholds)
        self.labels = list(labels)
        self.allow_low_quality_matches = allow_low_quality_matches

    def __call__(self, iou: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(M, N) overlaps of M ground-truth boxes with N candidates.

        Returns:
            (N,) int64 index of the best ground-truth box (0 if there is none) and (N,) int8 label.
        """
        if iou.shape[0] == 0:
            empty = iou.new_zeros(iou.shape[1], dtype=torch.int64)
            return empty, torch.full_like(empty, self.labels[0], dtype=torch.int8)
        best, index = iou.max(dim=0)
        band = torch.zeros_like(index)
        for threshold in self.thresholds:
            band += best >= threshold
        labels = torch.tensor(self.labels, dtype=torch.int8, device=iou.device)[band]
        if self.allow_low_quality_matches:
            best_of_each = iou.max(dim=1, keepdim=True).values
            labels = torch.where((iou == best_of_each).any(dim=0), labels.new_ones(()), labels)
        return index, labels


def outside_images(areas: Sequence[ValidArea | None], num_anchors: Sequence[int]) -> list[torch.Tensor] | None:
    """(B, H * W * A) bool of each level: anchors of cells in the padding; None if padding counts as image, or if there
    is none."""
    if not any(area is not None and area.padded for area in areas):
        return None
    return [area.outside(count) for area, count in zip(areas, num_anchors, strict=True)]


def match_anchors(
    matcher: Matcher, boxes: Sequence[torch.Tensor], anchors: torch.Tensor, outside: torch.Tensor | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The matcher's result for each image's boxes (M, 4) and all anchors (N, 4).

    Anchors ``outside`` (B, N) are never the best one of a box; their labels mean nothing.
    """
    for i, image_boxes in enumerate(boxes):
        overlaps = box_iou(image_boxes, anchors)
        yield matcher(overlaps if outside is None else overlaps.masked_fill(outside[i], -1.0))


def matched_truth(
    target: Mapping[str, torch.Tensor],
    index: torch.Tensor,
    labels: torch.Tensor,
    candidates: torch.Tensor,
    num_classes: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Class and ground-truth box of N candidates that a :class:`Matcher` has labeled.

    Args:
        target: one image's ``boxes`` (M, 4) and ``labels`` (M,).
        index, labels: the matcher's result, (N,) each.
        candidates: (N, 4), the boxes returned where there is no ground truth.
        num_classes: the class of background.

    Returns:
        (N,) int64 classes, -1 for ignored, and (N, 4) boxes.
    """
    if not len(target["boxes"]):
        return torch.full_like(index, num_classes), candidates
    classes = torch.where(labels == 1, target["labels"][index], num_classes)
    return classes.masked_fill(labels < 0, -1), target["boxes"][index]


def subsample_labels(
    labels: torch.Tensor, num_samples: int, positive_fraction: float, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose up to ``num_samples`` candidates of each row, at most a fraction of them foreground.

    Each candidate has one uniform number: the smallest are chosen, the earlier one on a tie. Background fills up what
    foreground leaves. Shapes do not depend on the data, so there is no synchronization with the device.

    Args:
        labels: (B, N) integers, 1 foreground, 0 background, anything else never chosen.
        num_samples: upper bound of the candidates chosen from each row.
        positive_fraction: upper bound of the fraction of foreground.
        noise: (B, N) uniform numbers.

    Returns:
        index: (B, P + num_samples) int64, P foreground slots first; entries of unused slots are arbitrary.
        used: (B, P + num_samples) bool.
    """
    count = labels.shape[1]
    num_positive = int(num_samples * positive_fraction)
    # Ties: 2**-48 per index makes every key distinct and does not change the order of float32 numbers.
    ramp = torch.arange(count, device=labels.device, dtype=torch.float64) * 2.0**-48
    key = noise.double() + ramp
    positive, used_positive = _smallest(key, labels == 1, num_positive)
    negative, used_negative = _smallest(key, labels == 0, num_samples)
    left = num_samples - used_positive.sum(dim=1, keepdim=True)
    used_negative &= torch.arange(negative.shape[1], device=labels.device) < left
    return torch.cat([positive, negative], dim=1), torch.cat([used_positive, used_negative], dim=1)


def _smallest(key: torch.Tensor, candidate: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, index = key.masked_fill(~candidate, torch.inf).topk(min(k, key.shape[1]), dim=1, largest=False)
    return index, values.isfinite()
