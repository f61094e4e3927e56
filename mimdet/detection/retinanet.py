"""RetinaNet: classes and boxes of every anchor in one stage (Lin et al. 2017)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import sigmoid_focal_loss

from ..modeling.areas import ValidArea, levels_of
from ..modeling.shapes import ShapeSpec
from .anchors import DefaultAnchorGenerator
from .assignment import Box2BoxTransform, Matcher, nms_of_classes, outside_images, top_scores
from .detector import Detector
from .layers import get_norm, normal_fill, normalize
from .passes import InferencePasses
from .slots import Detections, GroundTruth, blank, take

_FIRST_NORMALIZER = 100.0
_NORMALIZER_MOMENTUM = 0.9


class RetinaNetHead(nn.Module):
    """Two towers of 3x3 convolutions, for classes and for boxes, that all levels share.

    Args:
        input_shape: of every level; all of the same channels.
        num_classes: scores of an anchor.
        num_anchors: anchors at a cell.
        conv_dims: channels of each convolution of a tower.
        norm: norm after each of them. Not a batch norm: its statistics would mix the levels.
        prior_prob: score of every anchor before training.

    Raises:
        ValueError: levels of different channels, no convolution, or a batch norm.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[ShapeSpec],
        num_classes: int,
        num_anchors: int,
        conv_dims: Sequence[int],
        norm: str | Callable[[int], nn.Module] = "",
        prior_prob: float = 0.01,
    ):
        super().__init__()
        channels = [shape.channels for shape in input_shape]
        if len(set(channels)) != 1 or not conv_dims:
            raise ValueError(
                f"RetinaNetHead: levels of {channels} channels and conv_dims {list(conv_dims)}; the levels must be "
                "alike, and there must be a convolution"
            )
        self.num_classes = num_classes
        self.num_anchors = num_anchors
        self.cls_subnet = _tower(channels[0], conv_dims, norm)
        self.bbox_subnet = _tower(channels[0], conv_dims, norm)
        self.cls_score = nn.Conv2d(conv_dims[-1], num_anchors * num_classes, 3, padding=1)
        self.bbox_pred = nn.Conv2d(conv_dims[-1], num_anchors * 4, 3, padding=1)
        normal_fill(self.cls_score, std=0.01)
        normal_fill(self.bbox_pred, std=0.01)
        nn.init.constant_(self.cls_score.bias, -math.log((1 - prior_prob) / prior_prob))

    def forward(
        self, features: Sequence[torch.Tensor], areas: Sequence[ValidArea | None] | None = None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(B, C, H, W) of each level -> logits (B, H*W*A, num_classes) and deltas (B, H*W*A, 4), in anchor order.

        With ``areas``, an image's values are those it has alone; values in the padding mean nothing.
        """
        levels = list(zip(features, areas or [None] * len(features), strict=True))
        logits = [_by_anchor(self.cls_score(self.cls_subnet(f, area)), self.num_classes) for f, area in levels]
        deltas = [_by_anchor(self.bbox_pred(self.bbox_subnet(f, area)), 4) for f, area in levels]
        return logits, deltas


class _Tower(nn.Sequential):
    """Convolutions, each with a norm or none, and ReLU."""

    def forward(self, x: torch.Tensor, area: ValidArea | None = None) -> torch.Tensor:
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                x = layer(x)
            elif isinstance(layer, nn.ReLU):
                x = layer(x) if area is None else area.zero_padding(layer(x))
            else:
                x = normalize(layer, x, area)
        return x


def _tower(channels: int, dims: Sequence[int], norm: str | Callable[[int], nn.Module]) -> _Tower:
    layers: list[nn.Module] = []
    for dim in dims:
        conv = nn.Conv2d(channels, dim, 3, padding=1)
        normal_fill(conv, std=0.01)
        after = get_norm(norm, dim)
        if isinstance(after, nn.modules.batchnorm._BatchNorm):
            raise ValueError(f"RetinaNetHead: norm {norm!r} would mix the levels' statistics; use 'GN' or ''")
        layers += [conv, nn.ReLU()] if after is None else [conv, after, nn.ReLU()]
        channels = dim
    return _Tower(*layers)


def _by_anchor(x: torch.Tensor, size: int) -> torch.Tensor:
    """(B, A * size, H, W) -> (B, H * W * A, size)."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, size)


class RetinaNet(Detector):
    """Backbone with pyramid, and a head that scores and refines every anchor; no masks.

    Its losses are ``loss_cls`` (focal) and ``loss_box_reg`` (smooth L1 of foreground anchors), both divided by a
    running mean of the number of foreground anchors in a batch of this process, which starts at 100 and is not
    part of the state dict.

    Args:
        backbone: ``ImageList`` -> pyramid levels; has ``size_divisibility``.
        head: a ``RetinaNetHead``.
        head_in_features: input levels, finest first.
        anchor_generator: makes the anchors.
        box2box_transform: codes boxes relative to anchors.
        anchor_matcher: labels anchors in training; ignored ones enter neither loss.
        num_classes: number of classes, without background.
        focal_loss_alpha, focal_loss_gamma: weight of foreground, and exponent, of the focal loss.
        smooth_l1_beta: where the box loss turns from quadratic to linear; 0 is plain L1.
        test_score_thresh: detections need a higher score.
        test_topk_candidates: pairs of anchor and class kept of each level before NMS.
        test_nms_thresh: overlap above which the worse of two detections of one class is dropped.
        max_detections_per_image: detections kept of each image.
        pixel_mean, pixel_std: of each channel, on the 0..255 scale, in the order of ``input_format``.
        input_format: only "RGB".
        inference: test-time ensemble over token samples; None evaluates once.

    Raises:
        ValueError: head, levels and anchors do not fit together.
    """

    predicts_masks = False

    def __init__(
        self,
        *,
        backbone: nn.Module,
        head: RetinaNetHead,
        head_in_features: Sequence[str],
        anchor_generator: DefaultAnchorGenerator,
        box2box_transform: Box2BoxTransform,
        anchor_matcher: Matcher,
        num_classes: int,
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        smooth_l1_beta: float = 0.0,
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.5,
        max_detections_per_image: int = 100,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "RGB",
        inference: InferencePasses | None = None,
    ):
        super().__init__(
            backbone=backbone,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            input_format=input_format,
            inference=inference,
        )
        if anchor_generator.num_anchors != [head.num_anchors] * len(head_in_features):
            raise ValueError(
                f"RetinaNet: the head has {head.num_anchors} anchors at a cell of each of {len(head_in_features)} "
                f"levels, the anchor generator makes {anchor_generator.num_anchors}"
            )
        if head.num_classes != num_classes:
            raise ValueError(f"RetinaNet: the head has {head.num_classes} classes, num_classes is {num_classes}")
        self.head = head
        self.head_in_features = list(head_in_features)
        self.anchor_generator = anchor_generator
        self.box2box_transform = box2box_transform
        self.anchor_matcher = anchor_matcher
        self.num_classes = num_classes
        self.focal_loss_alpha = focal_loss_alpha
        self.focal_loss_gamma = focal_loss_gamma
        self.smooth_l1_beta = smooth_l1_beta
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image
        self.register_buffer("loss_normalizer", torch.tensor(_FIRST_NORMALIZER), persistent=False)

    def compute_losses(
        self, features: dict[str, torch.Tensor], sizes: torch.Tensor, truth: GroundTruth
    ) -> dict[str, torch.Tensor]:
        levels = [features[name] for name in self.head_in_features]
        anchors = torch.cat(self.anchor_generator(levels))
        areas = levels_of(features, self.anchor_generator.strides)
        logits, deltas = (torch.cat(parts, dim=1).float() for parts in self.head(levels, areas))
        outside = outside_images(areas, self.anchor_generator.num_anchors)
        classes, boxes = self.label_anchors(anchors, truth, None if outside is None else torch.cat(outside, 1))
        foreground = (classes >= 0) & (classes < self.num_classes)
        normalizer = self._update_normalizer(foreground)

        # One-hot targets; the row of background is zero.
        one_hot = classes.unsqueeze(-1) == torch.arange(self.num_classes, device=classes.device)
        cls = sigmoid_focal_loss(logits, one_hot.float(), self.focal_loss_alpha, self.focal_loss_gamma).sum(dim=-1)
        target_deltas = self.box2box_transform.get_deltas(anchors, boxes)
        loc = F.smooth_l1_loss(deltas, target_deltas, beta=self.smooth_l1_beta, reduction="none").sum(dim=-1)
        zero = cls.new_zeros(())
        return {
            "loss_cls": torch.where(classes >= 0, cls, zero).sum() / normalizer,
            "loss_box_reg": torch.where(foreground, loc, zero).sum() / normalizer,
        }

    @torch.no_grad()
    def label_anchors(
        self, anchors: torch.Tensor, truth: GroundTruth, outside: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Classes (B, N) of N anchors, ``num_classes`` for background and -1 for those that are ignored, as are those
        ``outside`` (B, N); and the boxes (B, N, 4) of foreground."""
        index, labels = self.anchor_matcher(truth, anchors, outside)
        index = index.long()
        classes = torch.where(labels == 1, truth.labels.gather(1, index), self.num_classes)
        return classes.masked_fill(labels < 0, -1), blank(take(truth.boxes, index), labels == 1)

    @torch.no_grad()
    def _update_normalizer(self, foreground: torch.Tensor) -> torch.Tensor:
        count = foreground.sum().clamp(min=1).to(self.loss_normalizer.dtype)
        self.loss_normalizer.lerp_(count, 1 - _NORMALIZER_MOMENTUM)
        # Autograd needs a copy: the next step changes the buffer in place, possibly before this step's backward.
        return self.loss_normalizer.clone()

    @torch.no_grad()
    def detect(self, features: dict[str, torch.Tensor], sizes: torch.Tensor) -> Detections:
        levels = [features[name] for name in self.head_in_features]
        anchors = self.anchor_generator(levels)
        areas = levels_of(features, self.anchor_generator.strides)
        logits, deltas = self.head(levels, areas)
        outside = outside_images(areas, self.anchor_generator.num_anchors) or [None] * len(levels)
        best = [self._best_of_level(*level) for level in zip(anchors, logits, deltas, outside, strict=True)]
        boxes, scores, labels = (torch.cat(column, 1) for column in zip(*best, strict=True))
        scores, order = top_scores(scores, scores.shape[1])
        boxes, labels = take(boxes, order), labels.gather(1, order)
        valid, most = scores > -torch.inf, self.max_detections_per_image
        stays = nms_of_classes(boxes, labels, valid, self.num_classes, self.test_nms_thresh, most)
        scores, keep = top_scores(torch.where(stays, scores, -torch.inf), most)
        valid = scores > -torch.inf
        # Boxes are clipped with those of all detectors, after the cap on their number.
        return Detections(blank(take(boxes, keep), valid), scores, labels.gather(1, keep), valid)

    def _best_of_level(
        self, anchors: torch.Tensor, logits: torch.Tensor, deltas: torch.Tensor, outside: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Boxes (B, S, 4), scores (B, S) and labels (B, S) of the best pairs of anchor and class; the score is -inf
        where there is none."""
        scores = logits.float().sigmoid()
        scores = torch.where(scores > self.test_score_thresh, scores, -torch.inf)
        if outside is not None:
            scores = scores.masked_fill(outside.unsqueeze(2), -torch.inf)
        # The k best pairs belong to the k anchors with the best pairs; these in their order, so that ties stay in it.
        rows = top_scores(scores.amax(2), self.test_topk_candidates)[1].sort(1).values
        best, index = top_scores(take(scores, rows).flatten(1), self.test_topk_candidates)
        rows, labels = rows.gather(1, index // self.num_classes), index % self.num_classes
        boxes = self.box2box_transform.apply_deltas(take(deltas, rows), anchors[rows])
        return boxes, torch.where(boxes.isfinite().all(dim=-1), best, -torch.inf), labels
