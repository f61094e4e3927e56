"""Detectron2's RetinaNet for a backbone that needs the image sizes before padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.modeling.postprocessing import detector_postprocess

from .model import ChannelsLast


class RetinaNetImageListForward(ChannelsLast, RetinaNet):
    """``RetinaNet`` that passes the ``ImageList`` to its backbone, in channels_last memory.

    Args:
        args, kwargs: as ``RetinaNet``.
    """

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor] | list[dict[str, Any]]:
        """Losses in training, ``{"instances": Instances}`` of each image in eval mode."""
        images = self.preprocess_image(batched_inputs)
        levels = self.backbone(images)
        features = [levels[name] for name in self.head_in_features]
        predictions = self.head(features)
        if self.training:
            truth = [x["instances"].to(self.device) for x in batched_inputs]
            return self.forward_training(images, features, predictions, truth)
        results = self.forward_inference(images, features, predictions)
        sizes = [
            (x.get("height", h), x.get("width", w))
            for x, (h, w) in zip(batched_inputs, images.image_sizes, strict=True)
        ]
        return [{"instances": detector_postprocess(r, *size)} for r, size in zip(results, sizes, strict=True)]
