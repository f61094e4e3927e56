"""Test-time ensemble over token samples (paper, Table 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torchvision.ops import batched_nms, box_iou


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

    def __call__(self, detect: Callable[..., list[dict[str, torch.Tensor]]]) -> list[dict[str, torch.Tensor]]:
        """The merged result of ``passes`` calls of ``detect()``, or ``detect(sample_ratio=ratio)``."""
        ratio = {} if self.ratio is None else {"sample_ratio": self.ratio}
        return self.merge([detect(**ratio) for _ in range(self.passes)])

    def merge(self, detections: Sequence[Sequence[dict[str, torch.Tensor]]]) -> list[dict[str, torch.Tensor]]:
        """Detections of each image, best first, from those of each pass: boxes (N, 4), scores (N,), labels (N,) and,
        where there are masks, mask_probabilities (N, M, M)."""
        if len(detections) == 1:
            return list(detections[0])
        return [self._merge(passes) for passes in zip(*detections, strict=True)]

    def _merge(self, passes: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        every = {key: torch.cat([detections[key] for detections in passes]) for key in passes[0]}
        boxes, scores, labels = (every[key] for key in ("boxes", "scores", "labels"))
        keep = batched_nms(boxes, scores, labels, self.nms_thresh)[: self.topk]
        same = (box_iou(boxes[keep], boxes) > self.nms_thresh) & (labels[keep, None] == labels)
        same[torch.arange(len(keep), device=keep.device), keep] = True  # the IoU of an empty box with itself is 0
        weight = same * scores.clamp(min=torch.finfo(scores.dtype).tiny)
        weight = weight / weight.sum(1, keepdim=True)
        merged = {key: value[keep] for key, value in every.items()}
        for key in {"boxes", "mask_probabilities"} & every.keys():
            merged[key] = torch.tensordot(weight, every[key].to(weight.dtype), dims=1)
        return merged
