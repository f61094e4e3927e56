"""Base class of the detectors: images in, losses or detections out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..kernels.tensors import to_device, to_device_together, to_host_together, zero_padding
from ..modeling.shapes import ImageList
from .assignment import clip_boxes, nonempty
from .masks import paste_masks
from .passes import InferencePasses
from .slots import Detections, GroundTruth
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
        moves_data: :meth:`forward` moves images and targets to the device, and results to the CPU if asked.
    """

    predicts_masks = True
    lsj_postprocess = False
    moves_data = True

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
        self.passes = inference or InferencePasses()
        self.register_buffer("pixel_mean", torch.tensor(list(pixel_mean)).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(list(pixel_std)).view(-1, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        """Device of the model's tensors."""
        return self.pixel_mean.device

    def compute_losses(
        self, features: dict[str, torch.Tensor], sizes: torch.Tensor, truth: GroundTruth
    ) -> dict[str, torch.Tensor]:
        """Losses of pyramid levels (B, C, H, W) and the ground truth of images of ``sizes`` (B, 2), height and
        width."""
        raise NotImplementedError

    def detect(self, features: dict[str, torch.Tensor], sizes: torch.Tensor) -> Detections:
        """Detections in pixels of the images as they entered the backbone."""
        raise NotImplementedError

    def preprocess(self, images: Sequence[torch.Tensor]) -> ImageList:
        """Normalize (3, H, W) images of 0..255 and batch them, zeros at the bottom and right."""
        check_images(images)
        batch = ImageList.from_tensors(self._on_one_device(images), self.backbone.size_divisibility)
        (pixels,) = to_device_together([batch.tensor], self.device)
        pixels = (pixels.to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std
        batch = ImageList(pixels, batch.image_sizes)
        if any(size != pixels.shape[2:] for size in batch.image_sizes):
            batch.tensor = zero_padding(pixels, batch.sizes)
        batch.tensor = batch.tensor.contiguous(memory_format=torch.channels_last)
        return batch

    def _on_one_device(self, images: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Images of one dtype on the CPU, if all are, else on the detector's device."""
        place = torch.device("cpu") if all(i.device.type == "cpu" for i in images) else self.device
        dtype = images[0].dtype if len({i.dtype for i in images}) == 1 else self.pixel_mean.dtype
        return [i.to(place, dtype, non_blocking=True) for i in images]

    def forward(
        self,
        images: Sequence[torch.Tensor],
        targets: Sequence[dict[str, Any]] | None = None,
        *,
        output_sizes: Sequence[tuple[int, int]] | None = None,
        paste: bool = True,
        to_host: bool = False,
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
            to_host: in eval mode, the results of each image go to the CPU in one copy, and masks are pasted there.

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
            truth = GroundTruth.from_targets(targets, self.device, self.predicts_masks)
            return self.compute_losses(self.backbone(batch), batch.sizes, truth)
        new = batch.image_sizes if output_sizes is None else [(int(h), int(w)) for h, w in output_sizes]
        if len(new) != len(batch):
            raise ValueError(f"output_sizes must name one size for each of {len(batch)} images, got {len(new)}")
        detections = self.passes(
            lambda **ratio: self.detect(self.backbone(batch, **ratio), batch.sizes), self.num_classes
        )
        results = self._resize(detections, batch.image_sizes, new).tolist()
        if to_host:
            results = [dict(zip(r, to_host_together(list(r.values())), strict=True)) for r in results]
        if not paste:
            return results
        return [self._paste(result, size) for result, size in zip(results, new, strict=True)]

    @torch.no_grad()
    def _resize(
        self, detections: Detections, old: Sequence[tuple[int, int]], new: Sequence[tuple[int, int]]
    ) -> Detections:
        """Detections in pixels of images of size ``new``, without those that are empty there."""
        scales = [(w1 / w0, h1 / h0) for (h0, w0), (h1, w1) in zip(old, new, strict=True)]
        if self.lsj_postprocess:
            scales = [(max(scale),) * 2 for scale in scales]
        numbers = to_device([(*s, *s, *size) for s, size in zip(scales, new, strict=True)], self.device, torch.float32)
        boxes = clip_boxes(detections.boxes * numbers[:, None, :4], numbers[:, 4:])
        return detections._replace(boxes=boxes, valid=detections.valid & nonempty(boxes))

    @staticmethod
    def _paste(result: dict[str, torch.Tensor], size: tuple[int, int]) -> dict[str, torch.Tensor]:
        if "mask_probabilities" in result:
            result["masks"] = paste_masks(result.pop("mask_probabilities"), result["boxes"], size)
        return result
