"""Box heads in a cascade, each refining the boxes of the one before (Cai and Vasconcelos 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .assignment import Matcher, clip_boxes, nonempty
from .roi_heads import SampledProposals, StandardROIHeads
from .rpn import Proposals
from .slots import Detections, GroundTruth, Rows


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
        self.proposal_matchers = nn.ModuleList(proposal_matchers)

    def _box_losses(
        self,
        features: dict[str, torch.Tensor],
        sampled: SampledProposals,
        sizes: torch.Tensor,
        truth: GroundTruth,
    ) -> dict[str, torch.Tensor]:
        losses = {}
        for stage, predictor in enumerate(self.box_predictor):
            rows = self._rows(sampled.valid)
            scores, deltas = self._run(stage, features, sampled.boxes, rows)
            stage_losses = self._losses_of(predictor, (scores, deltas), sampled, rows)
            losses |= {f"{name}_stage{stage}": loss for name, loss in stage_losses.items()}
            if stage + 1 < len(self.box_predictor):
                with torch.no_grad():
                    refined = predictor.box2box_transform.apply_deltas(rows.put(deltas), sampled.boxes)
                    boxes = _as_proposals(refined, sizes)
                    index, labels = self.proposal_matchers[stage + 1](truth, boxes)
                    sampled = self._matched(boxes, sampled.valid & nonempty(boxes), index, labels, truth)
        return losses

    def _detect(self, features: dict[str, torch.Tensor], proposals: Proposals, sizes: torch.Tensor) -> Detections:
        boxes, valid = proposals
        rows, probabilities = self._rows(valid), []
        for stage, predictor in enumerate(self.box_predictor):
            scores, deltas = self._run(stage, features, boxes, rows)
            refined = predictor.box2box_transform.apply_deltas(rows.put(deltas), boxes)
            # A row whose box overflows in any stage drops out in the end: its mean score is NaN.
            finite = refined.isfinite().all(dim=-1, keepdim=True)
            probabilities.append(rows.put(scores).float().softmax(dim=-1).masked_fill(~finite, torch.nan))
            boxes = _as_proposals(refined, sizes)
        return predictor.select(refined, sum(probabilities) * (1 / len(probabilities)), valid, sizes)

    def _run(
        self, stage: int, features: dict[str, torch.Tensor], boxes: torch.Tensor, rows: Rows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A stage's scores and deltas of the rows among boxes (B, S, 4)."""
        pooled = self._pool_boxes(features, boxes, rows)
        if pooled.requires_grad:
            # Gradient of the features: the mean over the stages, as in Detectron2. Each head gets its gradient in full.
            pooled.register_hook(lambda grad: grad * (1 / len(self.box_head)))
        return self.box_predictor[stage](rows.run(self.box_head[stage], pooled))


def _as_proposals(boxes: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """A stage's boxes (B, S, 4) as input of the next: clipped, without NaN, which has no pyramid level."""
    return clip_boxes(boxes.nan_to_num(0.0), sizes)
