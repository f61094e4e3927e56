"""Detectron2's R-CNN for a backbone that needs the image sizes before padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import ImageList, Instances, ROIMasks
from detectron2.utils.events import get_event_storage


class ChannelsLast:
    """Mixin: weights and images of a Detectron2 detector in channels_last memory, which is faster."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.to(memory_format=torch.channels_last)

    def preprocess_image(self, batched_inputs: Sequence[dict[str, Any]]) -> ImageList:
        """Normalized and padded images."""
        images = super().preprocess_image(batched_inputs)
        images.tensor = images.tensor.contiguous(memory_format=torch.channels_last)
        return images


class GeneralizedRCNNImageListForward(ChannelsLast, GeneralizedRCNN):
    """``GeneralizedRCNN`` that passes the ``ImageList`` to its backbone, in channels_last memory.

    Args:
        lsj_postprocess: images were resized into the corner of a square (large-scale jitter).
        args, kwargs: as ``GeneralizedRCNN``.
    """

    def __init__(self, *args: Any, lsj_postprocess: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.lsj_postprocess = lsj_postprocess

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor] | list[dict[str, Any]]:
        """Losses in training, ``{"instances": Instances}`` of each image in eval mode."""
        if not self.training:
            return self.inference(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        truth = None
        if "instances" in batched_inputs[0]:
            truth = [x["instances"].to(self.device) for x in batched_inputs]
        features = self.backbone(images)
        proposals, losses = self._propose(images, features, batched_inputs, truth)
        _, detector_losses = self.roi_heads(images, features, proposals, truth)
        if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
            self.visualize_training(batched_inputs, proposals)
        return {**detector_losses, **losses}

    def inference(
        self,
        batched_inputs: Sequence[dict[str, Any]],
        detected_instances: Sequence[Instances] | None = None,
        do_postprocess: bool = True,
    ) -> list[Any]:
        """As ``GeneralizedRCNN.inference``."""
        if self.training:
            raise RuntimeError("inference needs the model in eval mode: call model.eval()")
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images)
        if detected_instances is None:
            proposals, _ = self._propose(images, features, batched_inputs, None)
            results, _ = self.roi_heads(images, features, proposals, None)
        else:
            instances = [x.to(self.device) for x in detected_instances]
            results = self.roi_heads.forward_with_given_boxes(features, instances)
        if not do_postprocess:
            return results
        postprocess = _postprocess if self.lsj_postprocess else GeneralizedRCNN._postprocess
        return postprocess(results, batched_inputs, images.image_sizes)

    def _propose(self, images, features, batched_inputs, truth) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        if self.proposal_generator is not None:
            return self.proposal_generator(images, features, truth)
        return [x["proposals"].to(self.device) for x in batched_inputs], {}


def _postprocess(
    instances: Sequence[Instances], batched_inputs: Sequence[dict[str, Any]], image_sizes: Sequence[tuple[int, int]]
) -> list[dict[str, Instances]]:
    """Results in pixels of the original images, not of large-scale jitter's squares (the original's name)."""
    return [
        {"instances": _in_image(result, (x.get("height", size[0]), x.get("width", size[1])))}
        for result, x, size in zip(instances, batched_inputs, image_sizes, strict=True)
    ]


def _in_image(instances: Instances, size: tuple[int, int]) -> Instances:
    # The longer side filled the square: one factor for both axes; the rest of the square is padding.
    scale = max(new / old for new, old in zip(size, instances.image_size, strict=True))
    result = Instances(size, **instances.get_fields())
    name = "pred_boxes" if result.has("pred_boxes") else "proposal_boxes"
    boxes = result.get(name).clone()
    boxes.scale(scale, scale)
    boxes.clip(size)
    result.set(name, boxes)
    result = result[boxes.nonempty()]
    if result.has("pred_masks"):
        masks = result.pred_masks
        masks = masks if isinstance(masks, ROIMasks) else ROIMasks(masks[:, 0])
        result.pred_masks = masks.to_bitmasks(result.pred_boxes, *size, 0.5).tensor
    return result
