"""The second stage: sample proposals, classify and refine them, and predict masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..kernels.tensors import HostCopy, is_fake
from ..modeling.areas import areas_of
from ..modeling.noise import NoiseSource
from .assignment import Matcher, sample_slots
from .layers import knows_valid_maps
from .mask_head import mask_loss
from .rpn import Proposals
from .slots import Detections, GroundTruth, Rows, blank, counting_is_free, take

# Images of a batch in which the mask head computes all slots, and the multiple to which it rounds up their number in a
# larger one, so that cuDNN sees few shapes.
_BATCH_OF_ALL_SLOTS = 2
_ROUNDING = 16


class SampledProposals(NamedTuple):
    """Training proposals of B images in S slots each, foreground first.

    Attributes:
        boxes: (B, S, 4); (0, 0, 1, 1) where not valid.
        valid: (B, S) bool.
        classes: (B, S) int64, ``num_classes`` for background and where not valid.
        gt_index: (B, S) int64, slot of the matched ground truth; 0 where there is none.
        gt_boxes: (B, S, 4), its box; (0, 0, 1, 1) for background.
    """

    boxes: torch.Tensor
    valid: torch.Tensor
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
        self._count = not all(map(knows_valid_maps, (*_modules(box_head), mask_head)))

    def forward(
        self,
        features: dict[str, torch.Tensor],
        proposals: Proposals,
        sizes: torch.Tensor,
        truth: GroundTruth | None = None,
    ) -> tuple[Detections | None, dict[str, torch.Tensor]]:
        """Detections (eval mode) or losses (training), without the other one.

        Args:
            features: pyramid levels, (B, C, H, W) each; the padding of ``PackedFeatures`` is not pooled.
            proposals: of all images.
            sizes: (B, 2), height and width of the images before padding.
            truth: needed in training.

        Returns:
            Detections with ``mask_probabilities`` (B, S, 28, 28); and ``loss_cls``, ``loss_box_reg``, ``loss_mask``.
        """
        if self.training:
            sampled = self.sample_proposals(proposals, truth)
            count = self._count_masks(sampled)
            losses = self._box_losses(features, sampled, sizes, truth)
            return None, losses | self._mask_losses(features, sampled, truth, count)
        return self._add_masks(features, self._detect(features, proposals, sizes)), {}

    @torch.no_grad()
    def sample_proposals(self, proposals: Proposals, truth: GroundTruth) -> SampledProposals:
        """Label each image's proposals and draw the training sample."""
        boxes, valid = proposals
        noise = self.noise.draw_candidates(*boxes.shape[:2], truth.boxes.shape[1], truth.most, boxes.device)
        if self.proposal_append_gt:
            boxes, valid = torch.cat([boxes, truth.boxes], 1), torch.cat([valid, truth.filled], 1)
        index, labels = self.proposal_matcher(truth, boxes)
        labels = torch.where(valid, labels, -1)
        drawn, used = sample_slots(
            labels, self.batch_size_per_image, self.positive_fraction, noise[:, : labels.shape[1]]
        )
        return self._matched(take(boxes, drawn), used, index.gather(1, drawn), labels.gather(1, drawn), truth)

    def _matched(
        self,
        boxes: torch.Tensor,
        valid: torch.Tensor,
        index: torch.Tensor,
        labels: torch.Tensor,
        truth: GroundTruth,
    ) -> SampledProposals:
        """Slots with what a matcher has found for them."""
        index, foreground = index.long(), (labels == 1) & valid
        classes = torch.where(foreground, truth.labels.gather(1, index), self.num_classes)
        return SampledProposals(blank(boxes, valid), valid, classes, index, blank(take(truth.boxes, index), foreground))

    def _box_losses(
        self,
        features: dict[str, torch.Tensor],
        sampled: SampledProposals,
        sizes: torch.Tensor,
        truth: GroundTruth,
    ) -> dict[str, torch.Tensor]:
        rows = self._rows(sampled.valid)
        predictions = self._predict(features, sampled.boxes, rows)
        return self._losses_of(self.box_predictor, predictions, sampled, rows)

    def _rows(self, valid: torch.Tensor) -> Rows:
        return Rows(valid, count=self._count)

    def _predict(
        self, features: dict[str, torch.Tensor], boxes: torch.Tensor, rows: Rows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and deltas of the rows among boxes (B, S, 4)."""
        return self.box_predictor(rows.run(self.box_head, self._pool_boxes(features, boxes, rows)))

    def _pool_boxes(self, features: dict[str, torch.Tensor], boxes: torch.Tensor, rows: Rows) -> torch.Tensor:
        levels = [features[f] for f in self.box_in_features]
        return rows.take(self.box_pooler(levels, boxes, rows.slots, areas_of(features)))

    def _mask_logits(
        self, features: dict[str, torch.Tensor], boxes: torch.Tensor, classes: torch.Tensor, rows: Rows
    ) -> torch.Tensor:
        """(R, M, M) of the rows among boxes (B, S, 4) of classes (B, S)."""
        levels = [features[f] for f in self.mask_in_features]
        pooled = rows.take(self.mask_pooler(levels, boxes, rows.slots, areas_of(features)))
        return rows.run(self.mask_head, pooled, rows.take(classes.flatten()))

    @staticmethod
    def _losses_of(
        predictor: nn.Module, predictions: tuple[torch.Tensor, torch.Tensor], sampled: SampledProposals, rows: Rows
    ) -> dict[str, torch.Tensor]:
        columns = (rows.take(x.flatten(0, 1)) for x in (sampled.boxes, sampled.classes, sampled.gt_boxes))
        return predictor.losses(*predictions, *columns, rows.valid)

    def _count_masks(self, sampled: SampledProposals) -> HostCopy | None:
        """The largest number of foreground proposals of an image; None if the mask head shall compute all slots.

        In a large batch empty slots cost more than a wait, and the box head is the GPU's work meanwhile.
        """
        few = len(sampled.boxes) <= _BATCH_OF_ALL_SLOTS
        if few or counting_is_free(sampled.boxes.device) or is_fake(sampled.boxes):
            return None
        return HostCopy((sampled.classes < self.num_classes).sum(1).amax())

    def _mask_losses(
        self,
        features: dict[str, torch.Tensor],
        sampled: SampledProposals,
        truth: GroundTruth,
        count: HostCopy | None,
    ) -> dict[str, torch.Tensor]:
        most = int(self.batch_size_per_image * self.positive_fraction)
        if count is not None:
            most = min(most, -(-count.tolist() // _ROUNDING) * _ROUNDING)
        boxes, classes, index = (x[:, :most] for x in (sampled.boxes, sampled.classes, sampled.gt_index))
        foreground = classes < self.num_classes
        rows = self._rows(foreground)
        logits = self._mask_logits(features, boxes, classes.clamp(max=self.num_classes - 1), rows)
        masks = truth.masks.targets(index, boxes, foreground, logits.shape[-1])
        return {"loss_mask": mask_loss(logits, rows.take(masks.flatten(0, 1)), rows.valid)}

    def _detect(self, features: dict[str, torch.Tensor], proposals: Proposals, sizes: torch.Tensor) -> Detections:
        boxes, valid = proposals
        rows = self._rows(valid)
        scores, deltas = self._predict(features, boxes, rows)
        return self.box_predictor.inference(rows.put(scores), rows.put(deltas), boxes, valid, sizes)

    def _add_masks(self, features: dict[str, torch.Tensor], detections: Detections) -> Detections:
        rows = self._rows(detections.valid)
        logits = self._mask_logits(features, detections.boxes, detections.labels, rows)
        return detections._replace(mask_probabilities=rows.put(logits.sigmoid()))


def _modules(heads: nn.Module) -> Sequence[nn.Module]:
    return list(heads) if isinstance(heads, nn.ModuleList) else [heads]
