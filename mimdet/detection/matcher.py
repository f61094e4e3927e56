"""Which ground-truth box, if any, each anchor or proposal answers for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torchvision.ops import box_iou

from ..modeling.areas import ValidArea


class Matcher:
    """Labels each candidate by its best overlap.

    Args:
        thresholds: ascending, above 0; they cut the overlaps into ``len(thresholds) + 1`` bands.
        labels: of each band, lowest first: 1 foreground, 0 background, -1 ignored.
        allow_low_quality_matches: also make foreground every candidate that ties for the best overlap with
            some ground-truth box, however low.

    Raises:
        ValueError: counts that do not fit, thresholds out of order, other labels.
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
    """(B, H * W * A) bool of each level: anchors of cells in the padding; None on a canvas or without padding."""
    if not any(area is not None and area.padded for area in areas):
        return None
    return [area.outside(count) for area, count in zip(areas, num_anchors, strict=True)]


def match_anchors(
    matcher: Matcher, boxes: Sequence[torch.Tensor], anchors: torch.Tensor, outside: torch.Tensor | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The matcher's answer for each image's boxes (M, 4) and all anchors (N, 4), of which those ``outside`` (B, N) are
    the best of no box, whatever label they get."""
    for i, own in enumerate(boxes):
        overlaps = box_iou(own, anchors)
        yield matcher(overlaps if outside is None else overlaps.masked_fill(outside[i], -1.0))


def matched_truth(
    target: Mapping[str, torch.Tensor],
    index: torch.Tensor,
    labels: torch.Tensor,
    candidates: torch.Tensor,
    num_classes: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Class and ground-truth box of N candidates that a :class:`Matcher` has labelled.

    Args:
        target: one picture's ``boxes`` (M, 4) and ``labels`` (M,).
        index, labels: the matcher's answer, (N,) each.
        candidates: (N, 4), the boxes returned where there is no ground truth.
        num_classes: the class of background.

    Returns:
        (N,) int64 classes, -1 for ignored, and (N, 4) boxes.
    """
    if not len(target["boxes"]):
        return torch.full_like(index, num_classes), candidates
    classes = torch.where(labels == 1, target["labels"][index], num_classes)
    return classes.masked_fill(labels < 0, -1), target["boxes"][index]
