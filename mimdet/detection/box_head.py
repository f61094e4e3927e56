"""Box head and the classification and box regression layers on it (Fast R-CNN)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels import nms_slots
from ..modeling.shapes import ShapeSpec
from .assignment import Box2BoxTransform, clip_boxes, top_scores
from .layers import Conv2d, get_norm, msra_fill, normal_fill, xavier_fill
from .slots import Detections, blank, take


class FastRCNNConvFCHead(nn.Sequential):
    """3x3 convolutions, then fully connected layers, each with ReLU.

    Args:
        input_shape: channels, height and width of the pooled features.
        conv_dims: channels of each convolution.
        fc_dims: width of each fully connected layer, at least one.
        conv_norm: norm of the convolutions; "" for none, which gives them a bias.
    """

    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        conv_dims: Sequence[int],
        fc_dims: Sequence[int],
        conv_norm: str | Callable[[int], nn.Module] = "",
    ):
        super().__init__()
        if not fc_dims:
            raise ValueError("box head: fc_dims must name at least one layer")
        channels = input_shape.channels
        for i, dim in enumerate(conv_dims, start=1):
            norm = get_norm(conv_norm, dim)
            conv = Conv2d(channels, dim, 3, padding=1, bias=norm is None, norm=norm, activation=F.relu)
            msra_fill(conv)
            self.add_module(f"conv{i}", conv)
            channels = dim
        self.add_module("flatten", nn.Flatten())
        width = channels * input_shape.height * input_shape.width
        for i, dim in enumerate(fc_dims, start=1):
            fc = nn.Linear(width, dim)
            xavier_fill(fc)
            self.add_module(f"fc{i}", fc)
            self.add_module(f"fc_relu{i}", nn.ReLU())
            width = dim
        self.output_shape = ShapeSpec(channels=width)

    def forward(self, x: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        """(N, C, S, S) -> (N, width). Rows that are not ``valid`` (N,) bool enter no statistics; None: all are."""
        for layer in self:
            x = layer(x, valid=valid) if isinstance(layer, Conv2d) else layer(x)
        return x


class FastRCNNOutputLayers(nn.Module):
    """Class scores and box deltas of pooled proposals, their losses, and detections from them.

    Args:
        input_shape: channels of the box head's output.
        box2box_transform: codes boxes relative to proposals.
        num_classes: without background, which is the last score.
        test_score_thresh: detections need a higher score.
        test_nms_thresh: overlap above which the worse of two detections of one class is dropped.
        test_topk_per_image: detections kept of each image.
        cls_agnostic_bbox_reg: one box for all classes instead of one each.
        smooth_l1_beta: where the box loss turns from quadratic to linear; 0 is plain L1.
    """

    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        box2box_transform: Box2BoxTransform,
        num_classes: int,
        test_score_thresh: float = 0.0,
        test_nms_thresh: float = 0.5,
        test_topk_per_image: int = 100,
        cls_agnostic_bbox_reg: bool = False,
        smooth_l1_beta: float = 0.0,
    ):
        super().__init__()
        self.box2box_transform = box2box_transform
        self.num_classes = num_classes
        self.test_score_thresh = test_score_thresh
        self.test_nms_thresh = test_nms_thresh
        self.test_topk_per_image = test_topk_per_image
        self.smooth_l1_beta = smooth_l1_beta
        self.num_boxes = 1 if cls_agnostic_bbox_reg else num_classes
        self.cls_score = nn.Linear(input_shape.channels, num_classes + 1)
        self.bbox_pred = nn.Linear(input_shape.channels, self.num_boxes * 4)
        normal_fill(self.cls_score, std=0.01)
        normal_fill(self.bbox_pred, std=0.001)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, channels) -> scores (N, num_classes + 1) and deltas (N, K * 4) of one box or one for each class."""
        return self.cls_score(x), self.bbox_pred(x)

    def losses(
        self,
        scores: torch.Tensor,
        deltas: torch.Tensor,
        boxes: torch.Tensor,
        classes: torch.Tensor,
        gt_boxes: torch.Tensor,
        valid: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Losses of N proposals, both divided by their number.

        Args:
            scores, deltas: as :meth:`forward` returns them.
            boxes: (N, 4) proposals.
            classes: (N,) int64, ``num_classes`` for background.
            gt_boxes: (N, 4) matched ground truth; any finite box of positive size for background.
            valid: (N,) bool, the proposals that count, all others being background; None: all.
        """
        cls = F.cross_entropy(scores.float(), classes, reduction="none")
        count = max(len(classes), 1)
        if valid is not None:
            cls, count = torch.where(valid, cls, 0.0), valid.sum().clamp(min=1)
        foreground = classes < self.num_classes
        column = classes.clamp(max=self.num_boxes - 1).view(-1, 1, 1).expand(-1, 1, 4)
        delta = deltas.float().view(-1, self.num_boxes, 4).gather(1, column).squeeze(1)
        target = self.box2box_transform.get_deltas(boxes, gt_boxes)
        loc = F.smooth_l1_loss(delta, target, beta=self.smooth_l1_beta, reduction="none").sum(dim=1)
        loc = torch.where(foreground, loc, loc.new_zeros(()))
        return {"loss_cls": cls.sum() / count, "loss_box_reg": loc.sum() / count}

    @torch.no_grad()
    def inference(
        self,
        scores: torch.Tensor,
        deltas: torch.Tensor,
        proposals: torch.Tensor,
        valid: torch.Tensor,
        sizes: torch.Tensor,
    ) -> Detections:
        """Detections among proposals (B, N, 4) of images of ``sizes`` (B, 2), by scores (B, N, num_classes + 1) and
        deltas (B, N, K * 4); ``valid`` (B, N) says which are proposals."""
        boxes = self.box2box_transform.apply_deltas(deltas, proposals)
        return self.select(boxes, scores.float().softmax(dim=-1), valid, sizes)

    def select(
        self, boxes: torch.Tensor, probabilities: torch.Tensor, valid: torch.Tensor, sizes: torch.Tensor
    ) -> Detections:
        """The best detections of boxes (B, N, K * 4) by probabilities (B, N, num_classes + 1) after NMS, which
        compares boxes of one class only."""
        scores = probabilities[..., :-1]
        valid = valid & boxes.isfinite().all(dim=-1) & scores.isfinite().all(dim=-1)
        valid = valid.unsqueeze(-1) & (scores > self.test_score_thresh)
        boxes = clip_boxes(boxes.unflatten(-1, (self.num_boxes, 4)), sizes)
        # Every class is a problem of NMS.
        ordered, order = top_scores(torch.where(valid, scores, -torch.inf).transpose(1, 2), scores.shape[1])
        of_class = boxes.transpose(1, 2).expand(-1, self.num_classes, -1, -1)
        of_class = of_class.gather(2, order.unsqueeze(-1).expand(-1, -1, -1, 4))
        stays = nms_slots(
            of_class.flatten(0, 1),
            (ordered > -torch.inf).flatten(0, 1),
            self.test_nms_thresh,
            self.test_topk_per_image,
        ).view_as(ordered)
        stays = torch.zeros_like(stays).scatter(2, order, stays).transpose(1, 2)
        best, index = top_scores(torch.where(stays, scores, -torch.inf).flatten(1), self.test_topk_per_image)
        row, label = index // self.num_classes, index % self.num_classes
        column = row * self.num_boxes + label.clamp(max=self.num_boxes - 1)
        valid = best > -torch.inf
        return Detections(blank(take(boxes.flatten(1, 2), column), valid), best, label, valid)
