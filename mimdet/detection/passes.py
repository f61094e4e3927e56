"""Several passes over a picture, each with another sample of its tokens (paper, Table 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torchvision.ops import box_iou

from .assignment import grouped_nms


class InferencePasses:
    """How often a detector looks at a picture in eval mode, and how what it finds each time becomes one result.

    The paper gives "the ensemble result of several independent evaluations" and not how they are merged. Here all
    detections stand together, the worse of two that overlap within a class goes as it does within one pass, and the
    best are kept. Each keeps its score; its box and its mask become the means, weighted by score, of all that overlap
    with it within its class ("box voting", Gidaris and Komodakis, 2015).

    Args:
        passes: number of passes.
        ratio: keep ratio of each, in (0, 1]; None leaves it to the backbone.
        nms_thresh: overlap above which the worse of two detections of one class goes.
        topk: detections kept of each picture.

    Raises:
        ValueError: no pass, a ratio outside (0, 1], or several passes that would all see the same.
    """

    def __init__(self, passes: int = 1, ratio: float | None = None, nms_thresh: float = 0.5, topk: int = 100):
        if passes < 1:
            raise ValueError(f"inference.passes must be at least 1, got {passes}")
        if ratio is not None and not 0.0 < ratio <= 1.0:
            raise ValueError(f"inference.ratio must be in (0, 1], got {ratio}")
        if passes > 1 and ratio in (None, 1.0):
            raise ValueError(f"inference.passes={passes} need an inference.ratio below 1: else all see the same tokens")
        self.passes, self.ratio, self.nms_thresh, self.topk = passes, ratio, nms_thresh, topk

    def __call__(self, detect: Callable[..., list[dict[str, torch.Tensor]]]) -> list[dict[str, torch.Tensor]]:
        """``detect()``, or ``detect(sample_ratio=ratio)``, as often as there are passes, and the merged result."""
        ratio = {} if self.ratio is None else {"sample_ratio": self.ratio}
        return self.merge([detect(**ratio) for _ in range(self.passes)])

    def merge(self, found: Sequence[Sequence[dict[str, torch.Tensor]]]) -> list[dict[str, torch.Tensor]]:
        """Detections of each picture, best first, from those of each pass: boxes (N, 4), scores (N,), labels (N,) and,
        where there are masks, mask_probabilities (N, M, M)."""
        if len(found) == 1:
            return list(found[0])
        return [self._merge(of_picture) for of_picture in zip(*found, strict=True)]

    def _merge(self, found: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        every = {key: torch.cat([each[key] for each in found]) for key in found[0]}
        boxes, scores, labels = (every[key] for key in ("boxes", "scores", "labels"))
        keep = grouped_nms(boxes, scores, labels, self.nms_thresh)[: self.topk]
        same = (box_iou(boxes[keep], boxes) > self.nms_thresh) & (labels[keep, None] == labels)
        same[torch.arange(len(keep), device=keep.device), keep] = True  # an empty box overlaps with nothing
        weight = same * scores.clamp(min=torch.finfo(scores.dtype).tiny)
        weight = weight / weight.sum(1, keepdim=True)
        merged = {key: value[keep] for key, value in every.items()}
        for key in {"boxes", "mask_probabilities"} & every.keys():
            merged[key] = torch.tensordot(weight, every[key].to(weight.dtype), dims=1)
        return merged
