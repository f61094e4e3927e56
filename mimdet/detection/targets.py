"""Checks of the images and targets that a caller hands to the detector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..kernels.tensors import is_fake


def check_images(images: Sequence[torch.Tensor]) -> None:
    """Every image must be a (3, H, W) uint8 or floating tensor.

    Raises:
        TypeError, ValueError: naming the image's index.
    """
    if isinstance(images, torch.Tensor) or not len(images):
        raise ValueError("images must be a non-empty list of (3, H, W) tensors")
    for i, image in enumerate(images):
        if not isinstance(image, torch.Tensor):
            raise TypeError(f"images[{i}] must be a tensor, got {type(image).__name__}")
        if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise ValueError(f"images[{i}] must be (3, H, W), RGB, got {tuple(image.shape)}")
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise TypeError(f"images[{i}] must be uint8 or floating, values 0..255, got {image.dtype}")


def check_targets(
    targets: Sequence[dict[str, Any]] | None, count: int, num_classes: int, with_masks: bool = True
) -> None:
    """Every image needs boxes (N, 4) of positive size, labels (N,) in range, and N masks if they are used.

    Values are checked only of CPU tensors: on a GPU the check would synchronize with the device, and fake tensors have
    none.

    Raises:
        ValueError: naming the image and the field.
    """
    if targets is None or len(targets) != count:
        got = "none" if targets is None else len(targets)
        raise ValueError(f"training needs targets for each of the {count} images, got {got}")
    for i, target in enumerate(targets):
        needed = ("boxes", "labels", "masks") if with_masks else ("boxes", "labels")
        if missing := [key for key in needed if key not in target]:
            raise ValueError(f"targets[{i}] has no {', '.join(missing)}")
        boxes, labels = target["boxes"], target["labels"]
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise ValueError(f"targets[{i}]['boxes'] must be (N, 4), got {tuple(boxes.shape)}")
        if labels.shape != boxes.shape[:1] or (with_masks and len(target["masks"]) != len(boxes)):
            masks = f", {len(target['masks'])} masks" if with_masks else ""
            raise ValueError(f"targets[{i}]: {len(boxes)} boxes, labels of shape {tuple(labels.shape)}{masks}")
        if _has_values_here(boxes):
            if not bool(boxes.isfinite().all()):
                raise ValueError(f"targets[{i}]['boxes'] holds NaN or infinity")
            sides = boxes[:, 2:] - boxes[:, :2]
            if bool((sides <= 0).any()):
                row = int((sides <= 0).any(dim=1).nonzero()[0])
                raise ValueError(f"targets[{i}]['boxes'][{row}] has no area: {boxes[row].tolist()} (x0, y0, x1, y1)")
        if _has_values_here(labels):
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= num_classes:
                raise ValueError(
                    f"targets[{i}]['labels'] are {low}..{high}, the model has classes 0..{num_classes - 1}: "
                    "set the config's num_classes"
                )


def _has_values_here(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and len(tensor) > 0 and not is_fake(tensor)
