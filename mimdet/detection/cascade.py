"""Box heads in a cascade, each refining the boxes of the one before (Cai and Vasconcelos 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torchvision.ops import box_iou

from .assignment import Matcher, clip_boxes, matched_truth, nonempty
from .roi_heads import SampledProposals, StandardROIHeads


class CascadeROIHeads(StandardROIHeads):
    """Box heads in stages, and one mask head.

    Training proposals are sampled once. Each later stage takes the boxes that the one before predicts: without
    gradient, clipped, without empty ones. It matches all of them anew, by its own threshold. The mask head is trained
    on the foreground of the first stage. Detections are the last stage's boxes; their score is the mean of the class
    probabilities of all stages, each for its own input boxes. ``test_score_thresh``, ``test_nms_thresh`` and
    ``test_topk_per_image`` are the last predictor's.

    Args:
        box_heads, box_predictors, proposal_matchers: of each stage; predictors with one box for all classes.
        others: as ``StandardROIHeads``.

    Raises:
        ValueError: lists of different length, or a predictor with a box for each class.
    """

    def __init__(
        self,
        *,
        box_heads: Sequence[nn.Module],
        box_predictors: Sequence[nn.Module],
        proposal_matchers: Sequence[Matcher],
        **others: Any,
    ):
        if not len(box_heads) == len(box_predictors) == len(proposal_matchers) > 0:
            raise ValueError(
                f"cascade: {len(box_heads)} box_heads, {len(box_predictors)} box_predictors and "
                f"{len(proposal_matchers)} proposal_matchers; every stage needs one of each"
            )
        for stage, predictor in enumerate(box_predictors):
            if predictor.num_boxes != 1:
                raise ValueError(f"cascade: box_predictors[{stage}] needs cls_agnostic_bbox_reg=True")
        super().__init__(
            proposal_matcher=proposal_matchers[0],
            box_head=nn.ModuleList(box_heads),
            box_predictor=nn.ModuleList(box_predictors),
            **others,
        )
        self.proposal_matchers = list(proposal_matchers)

    def _box_losses(
        self,
        features: dict[str, torch.Tensor],
        sampled: Sequence[SampledProposals],
        image_sizes: Sequence[tuple[int, int]],
        targets: Sequence[dict[str, Any]],
    ) -> dict[str, torch.Tensor]:
        losses = {}
        for stage, predictor in enumerate(self.box_predictor):
            boxes = [s.boxes for s in sampled]
            scores, deltas = self._run(stage, features, boxes)
            stage_losses = self._losses_of(predictor, (scores, deltas), sampled)
            losses |= {f"{name}_stage{stage}": loss for name, loss in stage_losses.items()}
            if stage + 1 < len(self.box_predictor):
                refined = self._proposals(predictor.predict_boxes(deltas, boxes), image_sizes)
                sampled = self._match(stage + 1, refined, targets)
        return losses

    def _detect(
        self,
        features: dict[str, torch.Tensor],
        boxes: Sequence[torch.Tensor],
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[dict[str, torch.Tensor]]:
        probabilities = []
        for stage, predictor in enumerate(self.box_predictor):
            scores, deltas = self._run(stage, features, boxes)
            refined = predictor.predict_boxes(deltas, boxes)
            # A row whose box overflows in any stage drops out in the end: its mean score is NaN.
            finite = torch.cat(refined).isfinite().all(dim=1, keepdim=True)
            probabilities.append(scores.float().softmax(dim=1).masked_fill(~finite, torch.nan))
            boxes = self._proposals(refined, image_sizes)
        return predictor.select(refined, sum(probabilities) * (1 / len(probabilities)), image_sizes)

    def _run(
        self, stage: int, features: dict[str, torch.Tensor], boxes: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A stage's scores and deltas of boxes."""
        pooled = self._pool_boxes(features, boxes)
        if pooled.requires_grad:
            # Gradient of the features: the mean over the stages, as in Detectron2. Each head gets its gradient in full.
            pooled.register_hook(lambda grad: grad * (1 / len(self.box_head)))
        return self.box_predictor[stage](self.box_head[stage](pooled))

    def _proposals(self, boxes: Sequence[torch.Tensor], image_sizes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        """A stage's boxes as input of the next: clipped, and in training without empty ones."""
        # NaN has no pyramid level in the pooler.
        boxes = [clip_boxes(b.nan_to_num(0.0), size) for b, size in zip(boxes, image_sizes, strict=True)]
        # In eval mode every stage must score the same rows: their probabilities are averaged.
        return [b[nonempty(b)] for b in boxes] if self.training else boxes

    @torch.no_grad()
    def _match(
        self, stage: int, boxes: Sequence[torch.Tensor], targets: Sequence[dict[str, Any]]
    ) -> list[SampledProposals]:
        matched = []
        for box, target in zip(boxes, targets, strict=True):
            index, label = self.proposal_matchers[stage](box_iou(target["boxes"], box))
            classes, gt_boxes = matched_truth(target, index, label, box, self.num_classes)
            matched.append(SampledProposals(box, classes, index, gt_boxes))
        return matched
