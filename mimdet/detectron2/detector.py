"""The native detectors behind Detectron2's interface: its inputs and ``Instances`` in, losses or ``Instances`` out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks, RotatedBoxes

from .. import detection
from ..modeling.shapes import ImageList


class _InDetectron2:
    """Mixin: the interface of Detectron2's meta-architectures on a native detector, a later base class.

    Args:
        input_format: order of the channels that the data has, as ``pixel_mean`` and ``pixel_std`` have it.
        arguments: as the native detector.
    """

    vis_period = 0  # no images of the training are drawn

    def __init__(self, *, input_format: str | None = None, **arguments: Any):
        super().__init__(**arguments)
        self.input_format = input_format
        self.to(memory_format=torch.channels_last)

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor] | list[dict[str, Any]]:
        """Losses in training, ``{"instances": Instances}`` of each image in eval mode.

        Args:
            batched_inputs: for each image ``image`` (3, H, W), 0..255, uint8 or float; in training ``instances`` with
                ``gt_boxes``, ``gt_classes`` and, for detectors that predict masks, ``gt_masks``, ``PolygonMasks`` or
                ``BitMasks``; in eval mode ``height`` and ``width`` of the results, by default those of ``image``.

        Returns:
            Training: Detectron2's losses under its names.
            Eval: ``Instances`` with ``pred_boxes``, ``scores``, ``pred_classes`` and, from detectors that predict them,
            ``pred_masks`` (N, height, width) bool, best first, on the model's device.

        Raises:
            TypeError, ValueError: malformed inputs; the message names the entry.
        """
        if not self.training:
            return self.inference(batched_inputs)
        images = _images(batched_inputs)
        targets = [_target(x, f"batched_inputs[{i}]", self.predicts_masks) for i, x in enumerate(batched_inputs)]
        return super().forward(images, targets)

    def inference(
        self,
        batched_inputs: Sequence[dict[str, Any]],
        detected_instances: None = None,
        do_postprocess: bool = True,
    ) -> list[Any]:
        """As ``GeneralizedRCNN.inference``; without postprocessing, ``Instances`` in pixels of the model's images, with
        ``pred_masks`` (N, 1, 28, 28), soft maps of the boxes.

        Raises:
            RuntimeError: the model is in training.
            NotImplementedError: ``detected_instances``, which the native heads do not take.
        """
        if self.training:
            raise RuntimeError("inference needs the model in eval mode: call model.eval()")
        if detected_instances is not None:
            raise NotImplementedError(
                f"{type(self).__name__} takes no detected_instances: build the model without use_fast_step for them"
            )
        images = _images(batched_inputs)
        sizes = [tuple(image.shape[-2:]) for image in images]
        if not do_postprocess:
            return [_instances(*each) for each in zip(super().forward(images, paste=False), sizes, strict=True)]
        sizes = [(x.get("height", h), x.get("width", w)) for x, (h, w) in zip(batched_inputs, sizes, strict=True)]
        results = super().forward(images, output_sizes=sizes)
        return [{"instances": _instances(*each)} for each in zip(results, sizes, strict=True)]

    def preprocess_image(self, batched_inputs: Sequence[dict[str, Any]]) -> ImageList:
        """Normalized and padded images."""
        return self.preprocess(_images(batched_inputs))


class NativeGeneralizedRCNN(_InDetectron2, detection.GeneralizedRCNN):
    """The native ``GeneralizedRCNN``, its arguments and weights, as a meta-architecture of Detectron2."""


class NativeRetinaNet(_InDetectron2, detection.RetinaNet):
    """The native ``RetinaNet``, its arguments and weights, as a meta-architecture of Detectron2."""


def _images(batched_inputs: Sequence[dict[str, Any]]) -> list[torch.Tensor]:
    for i, x in enumerate(batched_inputs):
        if "image" not in x:
            raise ValueError(f"batched_inputs[{i}] has no 'image', only {', '.join(x) or 'nothing'}")
    return [x["image"] for x in batched_inputs]


def _target(x: dict[str, Any], name: str, with_masks: bool) -> dict[str, Any]:
    """An image's ground truth as the native detectors take it."""
    if "instances" not in x:
        raise ValueError(f"{name} has no 'instances', which training needs: use DatasetMapper(is_train=True)")
    instances = x["instances"]
    fields = instances.get_fields()
    if missing := [field for field in ("gt_boxes", "gt_classes") if field not in fields]:
        raise ValueError(f"{name}['instances'] has no {', '.join(missing)}, only {', '.join(fields) or 'nothing'}")
    boxes = instances.gt_boxes
    if not isinstance(boxes, Boxes) or isinstance(boxes, RotatedBoxes):
        raise TypeError(f"{name}['instances'].gt_boxes must be Boxes, got {type(boxes).__name__}")
    target = {"boxes": boxes.tensor, "labels": instances.gt_classes}
    if with_masks:
        target["masks"] = _masks(fields, name, len(boxes))
    return target


def _masks(fields: dict[str, Any], name: str, count: int) -> list[list[Any]] | torch.Tensor:
    name = f"{name}['instances'].gt_masks"
    if "gt_masks" not in fields:
        if count:
            raise ValueError(
                f"{name} is missing, which the mask head needs: use DatasetMapper(use_instance_mask=True) and "
                "annotations with a segmentation"
            )
        return []  # Detectron2's mapper sets no masks of an image without objects
    masks = fields["gt_masks"]
    if isinstance(masks, PolygonMasks):
        return masks.polygons
    if isinstance(masks, BitMasks):
        return masks.tensor
    raise TypeError(f"{name} must be PolygonMasks or BitMasks, got {type(masks).__name__}")


def _instances(result: dict[str, torch.Tensor], size: tuple[int, int]) -> Instances:
    """An image's detections as Detectron2's."""
    instances = Instances(
        size, pred_boxes=Boxes(result["boxes"]), scores=result["scores"], pred_classes=result["labels"]
    )
    if "masks" in result:
        instances.pred_masks = result["masks"]
    elif "mask_probabilities" in result:
        instances.pred_masks = result["mask_probabilities"].unsqueeze(1)
    return instances
