"""Boxes, their deltas and their order, and the assignment of candidates to ground-truth boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..kernels import match_boxes, nms_slots
from ..modeling.areas import ValidArea

if TYPE_CHECKING:
    from .slots import GroundTruth

# exp() would overflow for large deltas: a box grows by at most 1000 / 16.
SCALE_CLAMP = math.log(1000.0 / 16)


def clip_boxes(boxes: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Boxes (B, ..., 4) clipped to images of ``sizes`` (B, 2), height and width."""
    limits = sizes.flip(1).repeat(1, 2).view(len(sizes), *[1] * (boxes.dim() - 2), 4)
    return boxes.clamp(min=0).minimum(limits.to(boxes.dtype))


def nonempty(boxes: torch.Tensor) -> torch.Tensor:
    """(...,) bool: width and height both above zero."""
    return (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])


def rank_keys(scores: torch.Tensor) -> torch.Tensor:
    """Integers (..., N) that order float32 scores (..., N), the highest first: of equal ones the earlier first.

    NaN counts as the highest, -0 as 0. No two keys of a row are equal, so every device and every algorithm sorts them
    alike. ``column_of`` gives a key's column.
    """
    bits = torch.where(scores.isnan(), torch.nan, scores + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers they rise with the floats
    last = torch.arange(0xFFFFFFFF, 0xFFFFFFFF - scores.shape[-1], -1, device=scores.device)
    return (ordered.long() << 32) | last


def column_of(keys: torch.Tensor) -> torch.Tensor:
    """The columns that ``rank_keys`` has made keys of."""
    return 0xFFFFFFFF - (keys & 0xFFFFFFFF)


def top_scores(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k highest float32 scores of each row, best first, and their columns, in the order of ``rank_keys``.

    Args:
        scores: (..., N).
        k: at most; all N where there are fewer.

    Returns:
        (..., k) float32 and (..., k) int64.
    """
    index = column_of(rank_keys(scores).topk(min(k, scores.shape[-1]), dim=-1).values)
    return scores.gather(-1, index), index


def nms_of_classes(
    boxes: torch.Tensor,
    labels: torch.Tensor,
    valid: torch.Tensor,
    num_classes: int,
    iou_threshold: float,
    stop_at: int | None = None,
) -> torch.Tensor:
    """Non-maximum suppression in which boxes of different classes do not see each other.

    Each class is a problem of its own: no offsets are added to boxes, whose rounding would change overlaps.

    Args:
        boxes: (B, N, 4) float32, those of each image best first.
        labels: (B, N) int64 in 0 .. ``num_classes`` - 1.
        valid: (B, N) bool, the boxes that take part.
        iou_threshold: a box goes if its overlap with a better one that stays is higher.
        stop_at: boxes of a class that stay at most.

    Returns:
        (B, N) bool, which stay.
    """
    of_class = (labels[:, None] == torch.arange(num_classes, device=labels.device)[:, None]) & valid[:, None]
    every = boxes[:, None].expand(-1, num_classes, -1, -1)
    stays = nms_slots(every.flatten(0, 1), of_class.flatten(0, 1), iou_threshold, stop_at)
    return stays.view_as(of_class).any(1)


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
        self.labels = list(labels)
        self.allow_low_quality_matches = allow_low_quality_matches

    def forward(
        self, truth: GroundTruth, candidates: torch.Tensor, outside: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots of the best ground-truth boxes and labels, of candidates (N, 4) of all images or (B, N, 4).

        Candidates ``outside`` (B, N) are never the best one of a box; their label is -1.

        Returns:
            (B, N) int32, 0 where there is no ground truth, and (B, N) int8.
        """
        return match_boxes(
            truth.boxes,
            truth.counts,
            candidates,
            self.thresholds,
            self.labels,
            self.allow_low_quality_matches,
            outside,
        )


def outside_images(areas: Sequence[ValidArea | None], num_anchors: Sequence[int]) -> list[torch.Tensor] | None:
    """(B, H * W * A) bool of each level: anchors of cells in the padding; None if padding counts as image, or if there
    is none."""
    if not any(area is not None and area.padded for area in areas):
        return None
    return [area.outside(count) for area, count in zip(areas, num_anchors, strict=True)]


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
        used: (B, P + num_samples) bool; of either kind the first slots.
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


def sample_slots(
    labels: torch.Tensor, num_samples: int, positive_fraction: float, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`subsample_labels`, with the background right behind the foreground.

    Returns:
        index: (B, min(num_samples, N)) int64.
        used: (B, min(num_samples, N)) bool, the first slots of each row.
    """
    index, used = subsample_labels(labels, num_samples, positive_fraction, noise)
    most = min(int(num_samples * positive_fraction), labels.shape[1])
    positive, negative = used[:, :most].sum(1, keepdim=True), used[:, most:].sum(1, keepdim=True)
    slot = torch.arange(index.shape[1] - most, device=labels.device)
    column = torch.where(slot < positive, slot, slot - positive + most)
    return index.gather(1, column), slot < positive + negative
