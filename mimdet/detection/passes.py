"""Test-time ensemble over token samples (paper, Table 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torchvision.ops import box_iou

from .assignment import nms_of_classes, top_scores
from .slots import Detections, take


class InferencePasses:
    """Evaluates a detector several times, each time on another sample of the tokens, and merges the detections.

    The paper reports "the ensemble result of several independent evaluations" and does not say how they are merged.
    Here the detections of all passes go through NMS together, and the best are kept. A detection keeps its score. Its
    box and its mask become the means, weighted by score, of all that overlap with it within its class ("box voting",
    Gidaris and Komodakis, 2015).

    Args:
        passes: number of evaluations.
        ratio: keep ratio of each pass, in (0, 1]; None is the backbone's.
        nms_thresh: overlap above which the worse of two detections of one class is dropped.
        topk: detections kept of each image.

    Raises:
        ValueError: passes below 1, a ratio outside (0, 1], or several passes over the same tokens.
    """

    def __init__(self, passes: int = 1, ratio: float | None = None, nms_thresh: float = 0.5, topk: int = 100):
        if passes < 1:
            raise ValueError(f"inference.passes must be at least 1, got {passes}")
        if ratio is not None and not 0.0 < ratio <= 1.0:
            raise ValueError(f"inference.ratio must be in (0, 1], got {ratio}")
        if passes > 1 and ratio in (None, 1.0):
            raise ValueError(f"inference.passes={passes} need an inference.ratio below 1: else all see the same tokens")
        self.passes, self.ratio, self.nms_thresh, self.topk = passes, ratio, nms_thresh, topk

    def __call__(self, detect: Callable[..., Detections], num_classes: int) -> Detections:
        """The merged result of ``passes`` calls of ``detect()``, or ``detect(sample_ratio=ratio)``."""
        ratio = {} if self.ratio is None else {"sample_ratio": self.ratio}
        return self.merge([detect(**ratio) for _ in range(self.passes)], num_classes)

    def merge(self, detections: Sequence[Detections], num_classes: int) -> Detections:
        """Detections from those of each pass."""
        if len(detections) == 1:
            return detections[0]
        columns = zip(*(d for d in detections), strict=True)
        every = Detections(*(None if column[0] is None else torch.cat(column, 1) for column in columns))
        scores, order = top_scores(torch.where(every.valid, every.scores, -torch.inf), every.scores.shape[1])
        every = Detections(*(None if column is None else take(column, order) for column in every))
        stays = nms_of_classes(every.boxes, every.labels, every.valid, num_classes, self.nms_thresh, self.topk)
        best, keep = top_scores(torch.where(stays, scores, -torch.inf), self.topk)
        merged = Detections(*(None if column is None else take(column, keep) for column in every))
        # Box voting.
        same = torch.stack([box_iou(*pair) for pair in zip(merged.boxes, every.boxes, strict=True)]) > self.nms_thresh
        same &= (merged.labels[:, :, None] == every.labels[:, None]) & every.valid[:, None]
        same |= keep[:, :, None] == torch.arange(scores.shape[1], device=keep.device)  # an empty box has no overlap
        weight = same * every.scores.clamp(min=torch.finfo(scores.dtype).tiny)[:, None]
        weight = weight / weight.sum(2, keepdim=True)
        voted = {"boxes": weight @ every.boxes, "valid": best > -torch.inf}
        if every.mask_probabilities is not None:
            maps = every.mask_probabilities.to(weight.dtype)
            voted["mask_probabilities"] = (weight @ maps.flatten(2)).unflatten(2, maps.shape[2:])
        return merged._replace(**voted)
