"""Boxes, their deltas and their order, and the assignment of candidates to ground-truth boxes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn
from torchvision.ops import box_iou, nms

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


def top_scores(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k highest scores of each row, best first, and their columns; of equal scores the earlier one first.

    Args:
        scores: (..., N) float32. NaN counts as the highest, -0 as 0.
        k: at most; all N where there are fewer.

    Returns:
        (..., k) float32 and (..., k) int64. The order is total, so every device and every algorithm gives this answer.
    """
    bits = torch.where(scores.isnan(), torch.nan, scores + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers they rise with the floats
    last = torch.arange(0xFFFFFFFF, 0xFFFFFFFF - scores.shape[-1], -1, device=scores.device)
    index = 0xFFFFFFFF - (((ordered.long() << 32) | last).topk(min(k, scores.shape[-1]), dim=-1).values & 0xFFFFFFFF)
    return scores.gather(-1, index), index


def grouped_nms(boxes: torch.Tensor, scores: torch.Tensor, groups: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Non-maximum suppression in which boxes of different groups do not see each other.

    Each group is a problem of its own: no offsets are added to boxes, whose rounding would change overlaps.

    Args:
        boxes: (N, 4) float32.
        scores: (N,) float32.
        groups: (N,) int64, such as levels or classes.
        iou_threshold: a box goes if its overlap with a better one that stays is higher.

    Returns:
        (K,) int64 rows of the boxes that stay, best first; of equal scores the earlier one.
    """
    stays = torch.zeros_like(groups, dtype=torch.bool)
    for group in groups.unique():
        rows = (groups == group).nonzero().squeeze(1)
        stays[rows[nms(boxes[rows], scores[rows], iou_threshold)]] = True
    rows = stays.nonzero().squeeze(1)
    return rows[scores[rows].sort(descending=True, stable=True).indices]


class Box2BoxTransform(nn.Module):
    """R-CNN's box coding: shifts by the reference's size, log of the size ratio, each times a weight.

    Args:
        weights: of dx, dy, dw, dh.
        scale_clamp: upper bound of dw and dh when decoding.
    """

    def __init__(self, weights: Sequence[float], scale_clamp: float = SCALE_CLAMP):
        super().__init__()
        self.register_buffer("weights", torch.tensor([float(w) for w in weights]), persistent=False)
        self.scale_clamp = scale_clamp

    def get_deltas(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Deltas (..., 4) that take boxes ``source`` of positive size to ``target``."""
        source_size = source[..., 2:] - source[..., :2]
        target_size = target[..., 2:] - target[..., :2]
        shift = (target[..., :2] + 0.5 * target_size) - (source[..., :2] + 0.5 * source_size)
        deltas = torch.cat([shift / source_size, torch.log(target_size / source_size)], dim=-1)
        return deltas * self.weights.to(deltas.dtype)

    def apply_deltas(self, deltas: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Boxes (..., K * 4) in float32 from deltas (..., K * 4) about boxes (..., 4)."""
        shape = deltas.shape
        deltas = deltas.float().reshape(*shape[:-1], shape[-1] // 4, 4) / self.weights.float()
        boxes = boxes.float().unsqueeze(-2)
        size = boxes[..., 2:] - boxes[..., :2]
        center = boxes[..., :2] + 0.5 * size + deltas[..., :2] * size
        half = 0.5 * size * deltas[..., 2:].clamp(max=self.scale_clamp).exp()
        return torch.cat([center - half, center + half], dim=-1).reshape(shape)


class Matcher(nn.Module):
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
        super().__init__()
        self.thresholds = list(thresholds)
        self.register_buffer("labels", torch.tensor(list(labels), dtype=torch.int8), persistent=False)
        self.allow_low_quality_matches = allow_low_quality_matches

    def forward(self, iou: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(M, N) overlaps of M ground-truth boxes with N candidates.

        Returns:
            (N,) int64 index of the best ground-truth box (0 if there is none) and (N,) int8 label.
        """
        if iou.shape[0] == 0:
            return iou.new_zeros(iou.shape[1], dtype=torch.int64), self.labels[0].expand(iou.shape[1])
        best, index = iou.max(dim=0)
        band = torch.zeros_like(index)
        for threshold in self.thresholds:
            band += best >= threshold
        labels = self.labels[band]
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
