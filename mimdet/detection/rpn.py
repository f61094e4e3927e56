"""Region proposal network (Ren et al. 2015)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels import nms_slots
from ..modeling.areas import ValidArea, levels_of
from ..modeling.noise import NoiseSource
from .assignment import (
    Box2BoxTransform,
    Matcher,
    clip_boxes,
    column_of,
    outside_images,
    rank_keys,
    subsample_labels,
    top_scores,
)
from .layers import Conv2d, normal_fill
from .slots import GroundTruth, blank, take


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
    """Proposals of B images in S slots each, best first.

    Attributes:
        boxes: (B, S, 4) in pixels of the padded batch; (0, 0, 1, 1) where not valid.
        valid: (B, S) bool, the first ones of each image.
    """

    boxes: torch.Tensor
    valid: torch.Tensor


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
        sizes: torch.Tensor,
        truth: GroundTruth | None = None,
    ) -> tuple[Proposals, dict[str, torch.Tensor]]:
        """Proposals and, in training, the losses.

        Args:
            features: pyramid levels, (B, C, H, W) each. Anchors in the padding of
                ``PackedFeatures`` propose nothing and enter no loss.
            sizes: (B, 2), height and width of the images before padding.
            truth: needed in training.

        Returns:
            Proposals, and ``loss_rpn_cls``, ``loss_rpn_loc`` (empty in eval mode).
        """
        levels = [features[name] for name in self.in_features]
        anchors = self.anchor_generator(levels)
        counts, anchors = [len(a) for a in anchors], torch.cat(anchors)
        areas = levels_of(features, self.anchor_generator.strides)
        logits, deltas = (torch.cat(parts, 1) for parts in self.rpn_head(levels, areas))
        outside = outside_images(areas, self.anchor_generator.num_anchors)
        outside = None if outside is None else torch.cat(outside, 1)
        losses = self.losses(anchors, logits, deltas, truth, outside) if self.training else {}
        if outside is not None:
            logits = logits.masked_fill(outside, -torch.inf)
        return self.predict_proposals(anchors, counts, logits, deltas, sizes), losses

    def losses(
        self,
        anchors: torch.Tensor,
        logits: torch.Tensor,
        deltas: torch.Tensor,
        truth: GroundTruth,
        outside: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Binary cross entropy of sampled anchors and box loss of foreground ones, both divided by
        ``batch_size_per_image`` times the number of images; anchors ``outside`` (B, N) are never sampled."""
        matched, labels = self.anchor_matcher(truth, anchors, outside)
        noise = self.noise.draw(labels.shape, labels.device)
        index, used = subsample_labels(labels, self.batch_size_per_image, self.positive_fraction, noise)
        is_object = labels.gather(1, index) == 1
        boxes = blank(take(truth.boxes, matched.gather(1, index).long()), is_object)
        target = self.box2box_transform.get_deltas(anchors[index], boxes)
        logit, delta = logits.gather(1, index).float(), take(deltas, index).float()
        cls = F.binary_cross_entropy_with_logits(logit, is_object.float(), reduction="none")
        loc = F.smooth_l1_loss(delta, target, beta=self.smooth_l1_beta, reduction="none").sum(dim=-1)
        scale = self.loss_weight / (self.batch_size_per_image * len(labels))
        zero = cls.new_zeros(())
        return {
            "loss_rpn_cls": torch.where(used, cls, zero).sum() * scale,
            "loss_rpn_loc": torch.where(used & is_object, loc, zero).sum() * scale,
        }

    @torch.no_grad()
    def predict_proposals(
        self,
        anchors: torch.Tensor,
        counts: Sequence[int],
        logits: torch.Tensor,
        deltas: torch.Tensor,
        sizes: torch.Tensor,
    ) -> Proposals:
        """The best boxes of each level after NMS, which compares boxes of one level only.

        Args:
            anchors: (N, 4) of all levels, ``counts`` of each.
            logits, deltas: (B, N) and (B, N, 4).
            sizes: (B, 2), height and width of the images.
        """
        pre, post = (pair[0 if self.training else 1] for pair in (self.pre_nms_topk, self.post_nms_topk))
        logits = logits.float()
        best = [keys.topk(min(pre, keys.shape[1])).values for keys in rank_keys(logits).split(counts, 1)]
        # Every level is a problem of NMS, all of one size: the smaller ones get slots that are not valid.
        most = max(keys.shape[1] for keys in best)
        none = torch.iinfo(torch.int64).min
        best = torch.stack([F.pad(keys, (0, most - keys.shape[1]), value=none) for keys in best], 1)
        index = column_of(best).clamp(max=len(anchors) - 1).flatten(1)
        boxes = self.box2box_transform.apply_deltas(take(deltas, index), anchors[index])
        scores = logits.gather(1, index)
        finite = boxes.isfinite().all(dim=-1) & scores.isfinite() & (best.flatten(1) > none)
        boxes = clip_boxes(boxes, sizes)
        valid = finite & (boxes[..., 2:] - boxes[..., :2] > self.min_box_size).all(dim=-1)
        problems = (x.view(-1, most, *x.shape[2:]) for x in (boxes, valid))
        stays = nms_slots(*problems, self.nms_thresh, post).view_as(valid)
        total = sum(min(pre, count) for count in counts)
        best, index = top_scores(torch.where(stays, scores, -torch.inf), min(post, total))
        valid = best > -torch.inf
        return Proposals(blank(take(boxes, index), valid), valid)
