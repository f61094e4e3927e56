"""The second stage: sample proposals, classify and refine them, and predict masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torchvision.ops import box_iou

from ..modeling.areas import areas_of
from ..modeling.noise import NoiseSource
from .assignment import Matcher, matched_truth, subsample_labels
from .mask_head import mask_loss
from .masks import mask_targets
from .rpn import Proposals


class SampledProposals(NamedTuple):
    """Training proposals of one image, foreground first.

    Attributes:
        boxes: (N, 4).
        classes: (N,) int64, ``num_classes`` for background.
        gt_index: (N,) int64, matched ground truth (0 where there is none).
        gt_boxes: (N, 4), its box (the proposal itself where there is none).
    """

    boxes: torch.Tensor
    classes: torch.Tensor
    gt_index: torch.Tensor
    gt_boxes: torch.Tensor


class StandardROIHeads(nn.Module):
    """Box and mask heads over a pyramid.

    Args:
        num_classes: without background.
        batch_size_per_image: proposals that enter the losses, for each image.
        positive_fraction: upper bound of foreground among them.
        proposal_matcher: labels proposals in training.
        box_in_features, mask_in_features: levels the poolers read.
        box_pooler, mask_pooler: pool features under boxes.
        box_head, mask_head: layers on the pooled features.
        box_predictor: class scores, boxes, their losses, detections.
        proposal_append_gt: ground-truth boxes join the proposals in training.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        batch_size_per_image: int,
        positive_fraction: float,
        proposal_matcher: Matcher,
        box_in_features: Sequence[str],
        box_pooler: nn.Module,
        box_head: nn.Module,
        box_predictor: nn.Module,
        mask_in_features: Sequence[str],
        mask_pooler: nn.Module,
        mask_head: nn.Module,
        proposal_append_gt: bool = True,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction
        self.proposal_matcher = proposal_matcher
        self.proposal_append_gt = proposal_append_gt
        self.box_in_features = list(box_in_features)
        self.box_pooler = box_pooler
        self.box_head = box_head
        self.box_predictor = box_predictor
        self.mask_in_features = list(mask_in_features)
        self.mask_pooler = mask_pooler
        self.mask_head = mask_head
        self.noise = NoiseSource("proposals")

    def forward(
        self,
        features: dict[str, torch.Tensor],
        proposals: Sequence[Proposals],
        image_sizes: Sequence[tuple[int, int]],
        targets: Sequence[dict[str, Any]] | None = None,
    ) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        """Detections (eval mode) or losses (training), the other one empty.

        Args:
            features: pyramid levels, (B, C, H, W) each; the padding of ``PackedFeatures`` is not pooled.
            proposals: of each image.
            image_sizes: B pairs (height, width) before padding.
            targets: of each image boxes, labels and masks; needed in training.

        Returns:
            Detections with boxes, scores, labels and ``mask_probabilities`` (N, 28, 28) of each image; and
            ``loss_cls``, ``loss_box_reg``, ``loss_mask``.
        """
        if self.training:
            sampled = self.sample_proposals(proposals, targets)
            losses = self._box_losses(features, sampled, image_sizes, targets)
            return [], losses | self._mask_losses(features, sampled, targets)
        detections = self._detect(features, [p.boxes for p in proposals], image_sizes)
        return self._add_masks(features, detections), {}

    @torch.no_grad()
    def sample_proposals(
        self, proposals: Sequence[Proposals], targets: Sequence[dict[str, Any]]
    ) -> list[SampledProposals]:
        """Label each image's proposals and draw the training sample."""
        boxes, matched, labels, counts = [], [], [], []
        for proposal, target in zip(proposals, targets, strict=True):
            candidates = torch.cat([proposal.boxes, target["boxes"]]) if self.proposal_append_gt else proposal.boxes
            index, label = self.proposal_matcher(box_iou(target["boxes"], candidates))
            boxes.append(candidates)
            matched.append(index)
            labels.append(label)
            counts.append((len(proposal.boxes), len(candidates) - len(proposal.boxes)))
        # pad_sequence gives padding the label -1, which is never drawn.
        padded = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-1)
        noise = self.noise.draw_candidates(counts, padded.device)
        index, used = subsample_labels(padded, self.batch_size_per_image, self.positive_fraction, noise)
        sampled = []
        for i, target in enumerate(targets):
            rows = index[i][used[i]]
            box, gt_index = boxes[i][rows], matched[i][rows]
            classes, gt_boxes = matched_truth(target, gt_index, labels[i][rows], box, self.num_classes)
            sampled.append(SampledProposals(box, classes, gt_index, gt_boxes))
        return sampled

    def _box_losses(
        self,
        features: dict[str, torch.Tensor],
        sampled: Sequence[SampledProposals],
        image_sizes: Sequence[tuple[int, int]],
        targets: Sequence[dict[str, Any]],
    ) -> dict[str, torch.Tensor]:
        pooled = self._pool_boxes(features, [s.boxes for s in sampled])
        return self._losses_of(self.box_predictor, self.box_predictor(self.box_head(pooled)), sampled)

    def _pool_boxes(self, features: dict[str, torch.Tensor], boxes: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.box_pooler([features[f] for f in self.box_in_features], boxes, areas_of(features))

    def _mask_logits(
        self, features: dict[str, torch.Tensor], boxes: Sequence[torch.Tensor], classes: torch.Tensor
    ) -> torch.Tensor:
        pooled = self.mask_pooler([features[f] for f in self.mask_in_features], boxes, areas_of(features))
        return self.mask_head(pooled, classes)

    @staticmethod
    def _losses_of(
        predictor: nn.Module, predictions: tuple[torch.Tensor, torch.Tensor], sampled: Sequence[SampledProposals]
    ) -> dict[str, torch.Tensor]:
        columns = (torch.cat([getattr(s, name) for s in sampled]) for name in ("boxes", "classes", "gt_boxes"))
        return predictor.losses(*predictions, *columns)

    def _mask_losses(
        self,
        features: dict[str, torch.Tensor],
        sampled: Sequence[SampledProposals],
        targets: Sequence[dict[str, Any]],
    ) -> dict[str, torch.Tensor]:
        keep = [s.classes < self.num_classes for s in sampled]
        boxes = [s.boxes[k] for s, k in zip(sampled, keep, strict=True)]
        classes = torch.cat([s.classes[k] for s, k in zip(sampled, keep, strict=True)])
        logits = self._mask_logits(features, boxes, classes)
        index = [s.gt_index[k] for s, k in zip(sampled, keep, strict=True)]
        masks = mask_targets([t["masks"] for t in targets], index, boxes, logits.shape[-1])
        return {"loss_mask": mask_loss(logits, masks)}

    def _detect(
        self,
        features: dict[str, torch.Tensor],
        boxes: Sequence[torch.Tensor],
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[dict[str, torch.Tensor]]:
        pooled = self._pool_boxes(features, boxes)
        scores, deltas = self.box_predictor(self.box_head(pooled))
        return self.box_predictor.inference(scores, deltas, boxes, image_sizes)

    def _add_masks(
        self, features: dict[str, torch.Tensor], detections: list[dict[str, torch.Tensor]]
    ) -> list[dict[str, torch.Tensor]]:
        boxes = [d["boxes"] for d in detections]
        probabilities = self._mask_logits(features, boxes, torch.cat([d["labels"] for d in detections])).sigmoid()
        for detection, maps in zip(detections, probabilities.split([len(b) for b in boxes]), strict=True):
            detection["mask_probabilities"] = maps
        return detections
