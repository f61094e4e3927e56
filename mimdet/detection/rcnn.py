"""The two-stage detector: Mask R-CNN and Cascade Mask R-CNN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .detector import Detector
from .passes import InferencePasses
from .slots import Detections, GroundTruth


class GeneralizedRCNN(Detector):
    """Backbone with pyramid, proposal generator and ROI heads.

    Its losses are ``loss_rpn_cls``, ``loss_rpn_loc`` and those of the heads.

    Args:
        backbone: ``ImageList`` -> pyramid levels; has ``size_divisibility``.
        proposal_generator: an ``RPN``.
        roi_heads: a ``StandardROIHeads`` or ``CascadeROIHeads``.
        pixel_mean, pixel_std: of each channel, on the 0..255 scale, in the order of ``input_format``.
        input_format: only "RGB".
        lsj_postprocess: ``FixedSizeCrop`` has padded the images to one fixed size, on the right or at the bottom; so
            detections are scaled to ``output_sizes`` by one factor, the larger of the two sides' ratios.
        inference: test-time ensemble over token samples; None evaluates once.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        proposal_generator: nn.Module,
        roi_heads: nn.Module,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "RGB",
        lsj_postprocess: bool = False,
        inference: InferencePasses | None = None,
    ):
        super().__init__(
            backbone=backbone,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            input_format=input_format,
            inference=inference,
        )
        self.proposal_generator = proposal_generator
        self.roi_heads = roi_heads
        self.lsj_postprocess = lsj_postprocess

    @property
    def num_classes(self) -> int:
        """Number of classes, without background."""
        return self.roi_heads.num_classes

    def compute_losses(
        self, features: dict[str, torch.Tensor], sizes: torch.Tensor, truth: GroundTruth
    ) -> dict[str, torch.Tensor]:
        proposals, rpn_losses = self.proposal_generator(features, sizes, truth)
        _, losses = self.roi_heads(features, proposals, sizes, truth)
        return rpn_losses | losses

    def detect(self, features: dict[str, torch.Tensor], sizes: torch.Tensor) -> Detections:
        proposals, _ = self.proposal_generator(features, sizes)
        detections, _ = self.roi_heads(features, proposals, sizes)
        return detections
