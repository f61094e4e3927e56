"""Region proposal network (Ren et al. 2015)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import batched_nms

from ..modeling.areas import ValidArea, levels_of
from ..modeling.noise import NoiseSource
from .assignment import Box2BoxTransform, Matcher, clip_boxes, match_anchors, outside_images, subsample_labels
from .layers import Conv2d, normal_fill


class StandardRPNHead(nn.Module):
    """Shared convolutions, then objectness logits and box deltas for every anchor of a cell.

    Args:
        in_channels: channels of every level.
        num_anchors: anchors at a cell.
        box_dim: numbers that code a box.
        conv_dims: channels of the 3x3 convolutions; -1 keeps the number of the layer before.
    """

    def __init__(self, in_channels: int, num_anchors: int, box_dim: int = 4, conv_dims: Sequence[int] = (-1,)):
        super().__init__()
        layers: list[nn.Module] = []
        for dim in conv_dims:
            channels = in_channels if dim == -1 else dim
            layers.append(Conv2d(in_channels, channels, 3, padding=1, activation=F.relu))
            in_channels = channels
        names = [f"conv{i}" for i in range(len(layers))]
        # state_dict: one layer has the plain key "conv", several are numbered under it.
        self.conv = layers[0] if len(layers) == 1 else nn.Sequential()
        if len(layers) > 1:
            for name, layer in zip(names, layers, strict=True):
                self.conv.add_module(name, layer)
        self.objectness_logits = nn.Conv2d(in_channels, num_anchors, 1)
        self.anchor_deltas = nn.Conv2d(in_channels, num_anchors * box_dim, 1)
        self.box_dim = box_dim
        for layer in (*layers, self.objectness_logits, self.anchor_deltas):
            normal_fill(layer, std=0.01)

    def forward(
        self, features: Sequence[torch.Tensor], areas: Sequence[ValidArea | None] | None = None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(B, C, H, W) of each level -> logits (B, H*W*A) and deltas (B, H*W*A, 4) of each, in anchor order.

        With ``areas``, an image's values are those it has alone; values in the padding mean nothing.
        """
        logits, deltas = [], []
        layers = self.conv if isinstance(self.conv, nn.Sequential) else [self.conv]
        for x, area in zip(features, areas or [None] * len(features), strict=True):
            for layer in layers:
                x = layer(x, area)
            logits.append(self.objectness_logits(x).permute(0, 2, 3, 1).flatten(1))
            d = self.anchor_deltas(x).permute(0, 2, 3, 1)
            deltas.append(d.reshape(d.shape[0], -1, self.box_dim))
        return logits, deltas


class Proposals(NamedTuple):
    """Proposals of one image, best first: boxes (N, 4) in pixels of the padded batch, logits (N,)."""

    boxes: torch.Tensor
    logits: torch.Tensor


class RPN(nn.Module):
    """Scores and refines anchors, and proposes the best after NMS.

    Args:
        in_features: input levels, finest first.
        head: predicts logits and deltas.
        anchor_generator: makes the anchors.
        anchor_matcher: labels anchors in training.
        box2box_transform: codes boxes relative to anchors.
        batch_size_per_image: anchors that enter the loss, for each image.
        positive_fraction: upper bound of foreground among them.
        pre_nms_topk: (training, test) anchors kept of each level before NMS.
        post_nms_topk: (training, test) proposals kept of each image.
        nms_thresh: overlap above which the worse of two proposals of one level is dropped.
        min_box_size: proposals with a side of at most this many pixels are dropped.
        loss_weight: factor of both losses.
        smooth_l1_beta: where the box loss turns from quadratic to linear; 0 is plain L1.
    """

    def __init__(
        self,
        *,
        in_features: Sequence[str],
        head: nn.Module,
        anchor_generator: nn.Module,
        anchor_matcher: Matcher,
        box2box_transform: Box2BoxTransform,
        batch_size_per_image: int,
        positive_fraction: float,
        pre_nms_topk: tuple[int, int],
        post_nms_topk: tuple[int, int],
        nms_thresh: float = 0.7,
        min_box_size: float = 0.0,
        loss_weight: float = 1.0,
        smooth_l1_beta: float = 0.0,
    ):
        super().__init__()
        self.in_features = list(in_features)
        self.rpn_head = head
        self.anchor_generator = anchor_generator
        self.anchor_matcher = anchor_matcher
        self.box2box_transform = box2box_transform
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction
        self.pre_nms_topk = tuple(pre_nms_topk)
        self.post_nms_topk = tuple(post_nms_topk)
        self.nms_thresh = nms_thresh
        self.min_box_size = min_box_size
        self.loss_weight = loss_weight
        self.smooth_l1_beta = smooth_l1_beta
        self.noise = NoiseSource("anchors")

    def forward(
        self,
        features: dict[str, torch.Tensor],
        image_sizes: Sequence[tuple[int, int]],
        gt_boxes: Sequence[torch.Tensor] | None = None,
    ) -> tuple[list[Proposals], dict[str, torch.Tensor]]:
        """Proposals of each image and, in training, the losses.

        Args:
            features: pyramid levels, (B, C, H, W) each. Anchors in the padding of
                ``PackedFeatures`` propose nothing and enter no loss.
            image_sizes: B pairs (height, width) before padding.
            gt_boxes: B tensors (M, 4), needed in training.

        Returns:
            Proposals of each image, and ``loss_rpn_cls``, ``loss_rpn_loc`` (empty in eval mode).
        """
        levels = [features[name] for name in self.in_features]
        anchors = self.anchor_generator(levels)
        areas = levels_of(features, self.anchor_generator.strides)
        logits, deltas = self.rpn_head(levels, areas)
        outside = outside_images(areas, self.anchor_generator.num_anchors)
        losses = {}
        if self.training:
            every = None if outside is None else torch.cat(outside, 1)
            losses = self.losses(torch.cat(anchors), torch.cat(logits, 1), torch.cat(deltas, 1), gt_boxes, every)
        if outside is not None:
            logits = [x.masked_fill(o, -torch.inf) for x, o in zip(logits, outside, strict=True)]
        return self.predict_proposals(anchors, logits, deltas, image_sizes), losses

    @torch.no_grad()
    def label_anchors(
        self, anchors: torch.Tensor, gt_boxes: Sequence[torch.Tensor], outside: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Labels (B, N) int8 of all anchors, -1 where ``outside`` (B, N), and their matched boxes (B, N, 4)."""
        labels, targets = [], []
        matched = match_anchors(self.anchor_matcher, gt_boxes, anchors, outside)
        for boxes, (index, label) in zip(gt_boxes, matched, strict=True):
            labels.append(label)
            targets.append(boxes[index] if len(boxes) else anchors)
        labels = torch.stack(labels)
        return labels if outside is None else labels.masked_fill(outside, -1), torch.stack(targets)

    def losses(
        self,
        anchors: torch.Tensor,
        logits: torch.Tensor,
        deltas: torch.Tensor,
        gt_boxes: Sequence[torch.Tensor],
        outside: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Binary cross entropy of sampled anchors and box loss of foreground ones, both divided by
        ``batch_size_per_image`` times the number of images."""
        labels, targets = self.label_anchors(anchors, gt_boxes, outside)
        noise = self.noise.draw(labels.shape, labels.device)
        index, used = subsample_labels(labels, self.batch_size_per_image, self.positive_fraction, noise)
        label = labels.gather(1, index)
        logit = logits.gather(1, index).float()
        rows = index.unsqueeze(-1).expand(-1, -1, 4)
        delta = deltas.gather(1, rows).float()
        foreground = used & (label == 1)
        target_deltas = self.box2box_transform.get_deltas(anchors[index], targets.gather(1, rows))
        cls = F.binary_cross_entropy_with_logits(logit, (label == 1).float(), reduction="none")
        loc = F.smooth_l1_loss(delta, target_deltas, beta=self.smooth_l1_beta, reduction="none").sum(dim=-1)
        scale = self.loss_weight / (self.batch_size_per_image * len(gt_boxes))
        zero = cls.new_zeros(())
        return {
            "loss_rpn_cls": torch.where(used, cls, zero).sum() * scale,
            "loss_rpn_loc": torch.where(foreground, loc, zero).sum() * scale,
        }

    @torch.no_grad()
    def predict_proposals(
        self,
        anchors: Sequence[torch.Tensor],
        logits: Sequence[torch.Tensor],
        deltas: Sequence[torch.Tensor],
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[Proposals]:
        """The best boxes of each level after NMS, which compares boxes of one level only."""
        pre, post = (pair[0 if self.training else 1] for pair in (self.pre_nms_topk, self.post_nms_topk))
        boxes, scores, levels = [], [], []
        for level, (anchor, logit, delta) in enumerate(zip(anchors, logits, deltas, strict=True)):
            score, index = logit.float().topk(min(pre, logit.shape[1]), dim=1)
            delta = delta.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
            boxes.append(self.box2box_transform.apply_deltas(delta, anchor[index]))
            scores.append(score)
            levels.append(torch.full_like(index[0], level))
        all_boxes, all_scores, level_of = torch.cat(boxes, 1), torch.cat(scores, 1), torch.cat(levels)
        return [
            self._select(b, s, level_of, size, post)
            for b, s, size in zip(all_boxes, all_scores, image_sizes, strict=True)
        ]

    def _select(
        self,
        boxes: torch.Tensor,
        scores: torch.Tensor,
        levels: torch.Tensor,
        size: tuple[int, int],
        count: int,
    ) -> Proposals:
        finite = boxes.isfinite().all(dim=1) & scores.isfinite()
        boxes = clip_boxes(boxes, size)
        sides = boxes[:, 2:] - boxes[:, :2]
        keep = finite & (sides > self.min_box_size).all(dim=1)
        boxes, scores, levels = boxes[keep], scores[keep], levels[keep]
        order = batched_nms(boxes, scores, levels, self.nms_thresh)[:count]
        return Proposals(boxes[order], scores[order])
