"""A COCO annotation file, completed to what the evaluation toolkits expect."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pycocotools.mask as mask_util

from ..data.errors import DataError

logger = logging.getLogger(__name__)


def load_ground_truth(json_file: str | Path, use_masks: bool = True) -> tuple[dict[str, Any], bool]:
    """Read an annotation file for evaluation.

    What hand-made files often lack is filled in: ``iscrowd``, ``area``, and unique ids from 1 (the toolkits
    take 0 for "no match"). An object without a usable mask, in a file where others have one, becomes a region
    to ignore, as a crowd is: detections there count neither for nor against.

    Args:
        use_masks: False where boxes alone are scored: objects count then whether they have a mask or not.

    Returns:
        the file's content, and whether its objects have masks to be scored.

    Raises:
        DataError: an annotation has no box, or belongs to no image of the file.
    """
    content = json.loads(Path(json_file).read_text(encoding="utf-8"))
    content.setdefault("info", {})
    images = {image["id"]: image for image in content["images"]}
    annotations = content["annotations"]
    has_masks = use_masks and any(_has_mask(annotation) for annotation in annotations)
    ignored = []
    for number, annotation in enumerate(annotations, start=1):
        where = f"{json_file}: annotation {annotation.get('id')} of image {annotation.get('image_id')}"
        if annotation.get("image_id") not in images:
            raise DataError(f"{where}: there is no such image in the file")
        if len(annotation.get("bbox") or ()) != 4:
            raise DataError(f"{where}: 'bbox' must be [x, y, width, height]")
        annotation["iscrowd"] = int(annotation.get("iscrowd", 0))
        if has_masks and not _has_mask(annotation):
            ignored.append(annotation.get("id"))
            annotation["iscrowd"] = 1
            annotation["segmentation"] = [_outline(*annotation["bbox"])]
        annotation["id"] = number
        if "area" not in annotation:
            annotation["area"] = _area(annotation, images[annotation["image_id"]])
    if ignored:
        logger.warning(
            "%s: %d objects without a usable mask are ignored in the evaluation (annotations %s)",
            json_file,
            len(ignored),
            ", ".join(map(str, ignored[:5])) + (", ..." if len(ignored) > 5 else ""),
        )
    return content, has_masks


def _has_mask(annotation: dict[str, Any]) -> bool:
    """Whether there is a run-length encoded mask, or a polygon of at least three points."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        return True
    return any(len(polygon) >= 6 for polygon in segmentation or ())


def _outline(x: float, y: float, width: float, height: float) -> list[float]:
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def _area(annotation: dict[str, Any], image: dict[str, Any]) -> float:
    if not _has_mask(annotation):
        return annotation["bbox"][2] * annotation["bbox"][3]
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, dict) and not isinstance(segmentation["counts"], list):
        return float(mask_util.area(segmentation))
    rle = mask_util.frPyObjects(segmentation, image["height"], image["width"])
    return float(mask_util.area(mask_util.merge(rle) if isinstance(rle, list) else rle))
