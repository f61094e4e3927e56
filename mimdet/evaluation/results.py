"""Detections in COCO's results format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pycocotools.mask as mask_util
import torch
from torchvision.ops import box_convert


def to_coco_results(
    result: Mapping[str, torch.Tensor], image_id: int, category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """One image's detections as COCO results.

    Args:
        result: ``boxes`` (N, 4) xyxy in pixels of the original image, ``scores`` (N,), ``labels`` (N,) int64
            and, optionally, ``masks`` (N, height, width) bool, or an iterable of its parts, see :func:`encode_masks`.
        image_id: id of the image in its dataset.
        category_ids: the dataset's category id of each label.

    Returns:
        N dicts with ``image_id``, ``category_id``, ``bbox`` (x, y, width, height), ``score`` and, when there
        are masks, ``segmentation`` (compressed RLE whose ``counts`` is a str, so that it is valid JSON).

    Raises:
        ValueError: a label has no category.
    """
    boxes = box_convert(result["boxes"].detach().cpu().double(), "xyxy", "xywh")
    labels = result["labels"].tolist()
    if labels and not 0 <= min(labels) <= max(labels) < len(category_ids):
        raise ValueError(
            f"image {image_id}: labels run from {min(labels)} to {max(labels)}, but the dataset has "
            f"{len(category_ids)} categories; set the model's num_classes to that"
        )
    detections = [
        {"image_id": image_id, "category_id": int(category_ids[label]), "bbox": box, "score": score}
        for label, box, score in zip(labels, boxes.tolist(), result["scores"].tolist(), strict=True)
    ]
    if "masks" in result:
        for detection, rle in zip(detections, encode_masks(result["masks"]), strict=True):
            detection["segmentation"] = rle
    return detections


def encode_masks(masks: torch.Tensor | Iterable[torch.Tensor]) -> list[dict[str, Any]]:
    """Masks (N, height, width), bool, as N compressed RLEs ``{"size": [height, width], "counts": str}``.

    Tensors of an iterable are encoded one by one, so that not all masks are in memory at once.
    """
    if not isinstance(masks, torch.Tensor):
        return [rle for part in masks for rle in encode_masks(part)]
    # pycocotools needs Fortran order, as RLE runs down the columns: transpose on the masks' device
    columns = masks.detach().to(torch.uint8).transpose(1, 2).contiguous().cpu().numpy().transpose(2, 1, 0)
    return [{**rle, "counts": rle["counts"].decode("ascii")} for rle in mask_util.encode(columns)]
