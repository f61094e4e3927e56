"""Base class of the detectors: images in, losses or detections out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..modeling.shapes import ImageList
from ..polygons import PackedPolygons
from .assignment import clip_boxes, nonempty, scale_boxes
from .masks import paste_masks
from .passes import InferencePasses
from .targets import check_images, check_targets


class Detector(nn.Module):
    """Base of the detectors; a subclass has ``num_classes``, :meth:`compute_losses` and :meth:`detect`.

    Args:
        backbone: ``ImageList`` -> pyramid levels; has ``size_divisibility``.
        pixel_mean, pixel_std: of each channel, on the 0..255 scale, in the order of ``input_format``.
        input_format: only "RGB".
        inference: test-time ensemble over token samples; None evaluates once.

    Attributes:
        predicts_masks: whether detections have masks and training needs them.
        lsj_postprocess: whether detections return to the images by one factor for both axes.
    """

    predicts_masks = True
    lsj_postprocess = False

    def __init__(
        self,
        *,
        backbone: nn.Module,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "RGB",
        inference: InferencePasses | None = None,
    ):
        super().__init__()
        if input_format != "RGB":
            raise ValueError(f"input_format must be 'RGB', got {input_format!r}")
        self.backbone = backbone
        self.inference = inference or InferencePasses()
        self.register_buffer("pixel_mean", torch.tensor(list(pixel_mean)).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(list(pixel_std)).view(-1, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        """Device of the model's tensors."""
        return self.pixel_mean.device

    def compute_losses(
        self,
        features: dict[str, torch.Tensor],
        image_sizes: Sequence[tuple[int, int]],
        targets: Sequence[dict[str, Any]],
    ) -> dict[str, torch.Tensor]:
        """Losses of pyramid levels (B, C, H, W) and the ground truth of images of (height, width)."""
        raise NotImplementedError

    def detect(
        self, features: dict[str, torch.Tensor], image_sizes: Sequence[tuple[int, int]]
    ) -> list[dict[str, torch.Tensor]]:
        """Detections in pixels of the images as they entered the backbone; masks as ``mask_probabilities``."""
        raise NotImplementedError

    def preprocess(self, images: Sequence[torch.Tensor]) -> ImageList:
        """Normalize (3, H, W) images of 0..255 and batch them, zeros at the bottom and right."""
        check_images(images)
        tensors = [(i.to(self.device).to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std for i in images]
        batch = ImageList.from_tensors(tensors, self.backbone.size_divisibility)
        batch.tensor = batch.tensor.contiguous(memory_format=torch.channels_last)
        return batch

    def forward(
        self,
        images: Sequence[torch.Tensor],
        targets: Sequence[dict[str, Any]] | None = None,
        *,
        output_sizes: Sequence[tuple[int, int]] | None = None,
        paste: bool = True,
    ) -> dict[str, torch.Tensor] | list[dict[str, torch.Tensor]]:
        """Losses in training, detections in eval mode.

        Args:
            images: B tensors (3, H, W), RGB, 0..255, uint8 or float; sizes may differ.
            targets: in training, for each image ``boxes`` (N, 4) x0, y0, x1, y1 in pixels, ``labels`` (N,)
                int64 from 0 and, for detectors that predict them, ``masks``: N lists of COCO polygons, those as
                ``mimdet.polygons.PackedPolygons``, or (N, H, W) bool.
            output_sizes: in eval mode, (height, width) of each image that detections are scaled to; default: the
                sizes of ``images``.
            paste: in eval mode, False returns ``mask_probabilities`` (N, S, S), soft maps of the boxes, instead of
                masks; the caller pastes them a few at a time (``masks.paste_in_parts``).

        Returns:
            Training: scalar losses by name, to be added up.
            Eval: for each image ``boxes`` (N, 4), ``scores`` (N,), ``labels`` (N,) and, from detectors that
            predict them, ``masks`` (N, height, width) bool, best first.

        Raises:
            TypeError, ValueError: malformed images or targets; the message names the entry.
        """
        batch = self.preprocess(images)
        if self.training:
            check_targets(targets, len(batch), self.num_classes, self.predicts_masks)
            targets = [self._prepare(t, f"targets[{i}]") for i, t in enumerate(targets)]
            return self.compute_losses(self.backbone(batch), batch.image_sizes, targets)
        detections = self.inference(lambda **ratio: self.detect(self.backbone(batch, **ratio), batch.image_sizes))
        sizes = batch.image_sizes if output_sizes is None else output_sizes
        if len(sizes) != len(detections):
            raise ValueError(f"output_sizes must name one size for each of {len(detections)} images, got {len(sizes)}")
        return [
            self._resize(d, old, new, paste) for d, old, new in zip(detections, batch.image_sizes, sizes, strict=True)
        ]

    def _prepare(self, target: dict[str, Any], name: str) -> dict[str, Any]:
        """Boxes and labels on the device, polygons packed."""
        prepared = {
            **target,
            "boxes": target["boxes"].to(self.device, torch.float32),
            "labels": target["labels"].to(self.device, torch.int64),
        }
        if self.predicts_masks and not isinstance(target["masks"], (torch.Tensor, PackedPolygons)):
            prepared["masks"] = PackedPolygons.pack(target["masks"], f"{name}['masks']")
        return prepared

    @torch.no_grad()
    def _resize(
        self, detection: dict[str, torch.Tensor], old: tuple[int, int], new: tuple[int, int], paste: bool
    ) -> dict[str, torch.Tensor]:
        new = (int(new[0]), int(new[1]))
        if self.lsj_postprocess:
            scaled = detection["boxes"] * max(new[0] / old[0], new[1] / old[1])
        else:
            scaled = scale_boxes(detection["boxes"], old, new)
        boxes = clip_boxes(scaled, new)
        keep = nonempty(boxes)
        resized = {**{key: value[keep] for key, value in detection.items()}, "boxes": boxes[keep]}
        if paste and "mask_probabilities" in resized:
            resized["masks"] = paste_masks(resized.pop("mask_probabilities"), resized["boxes"], new)
        return resized
