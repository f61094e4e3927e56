"""Which ground-truth box, if any, each anchor or proposal answers for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch


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
