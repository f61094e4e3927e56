"""A COCO annotation file, completed to what the evaluation toolkits expect."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pycocotools.mask as mask_util

from ..data.annotations import first, is_finite, is_ignored, read_annotations, usable_polygons

logger = logging.getLogger(__name__)


def load_ground_truth(json_file: str | Path, use_masks: bool = True) -> tuple[dict[str, Any], bool]:
    """Read an annotation file for evaluation.

    What hand-made files often lack is filled in: ``iscrowd``, ``area``, and ids from 1 (the toolkits take 0 for "no
    match"). Detections in a region to ignore count neither for nor against; such are crowds, annotations with
    ``ignore``, and an object without a usable mask in a file where others have one. An annotation whose box is not
    finite is left out.

    Args:
        use_masks: False where boxes alone are scored: objects count then whether they have a mask or not.

    Returns:
        the file's content without what is not needed, and whether its objects have masks to be scored.

    Raises:
        DataError: a flaw of the file, as :func:`mimdet.data.annotations.read_annotations` finds it.
    """
    content = read_annotations(json_file, use_masks)
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    annotations, masks = [], []
    ignored, dropped = [], []
    for annotation in content["annotations"]:
        if not is_finite(annotation["bbox"]):
            dropped.append(annotation["id"])
            continue
        annotations.append(annotation)
        masks.append(_mask(annotation) if use_masks else None)
    has_masks = any(mask is not None for mask in masks)
    completed = []
    for number, (annotation, mask) in enumerate(zip(annotations, masks, strict=True), start=1):
        crowd = is_ignored(annotation)
        if has_masks and mask is None:
            ignored.append(annotation["id"])
            crowd, mask = True, [_outline(*annotation["bbox"])]
        area = annotation.get("area")
        completed.append(
            {
                "id": number,
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"],
                "bbox": annotation["bbox"],
                "iscrowd": int(crowd),
                "area": _area(annotation["bbox"], mask, sizes[annotation["image_id"]]) if area is None else area,
                **({} if mask is None else {"segmentation": mask}),
            }
        )
    for ids, what in (
        (ignored, "objects without a usable mask are ignored in the evaluation"),
        (dropped, "annotations whose box is not finite are left out of the evaluation"),
    ):
        if ids:
            logger.warning("%s: %d %s (annotations %s)", json_file, len(ids), what, first(ids))
    return {"info": {}, **content, "annotations": completed}, has_masks


def _mask(annotation: dict[str, Any]) -> dict[str, Any] | list[list[float]] | None:
    """The run-length encoded mask, or the polygons of at least three points; None without any."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        return segmentation
    polygons = usable_polygons(segmentation)
    if polygons and len(polygons) == len(segmentation):
        return segmentation  # as it is: lists of numbers again would take their time
    return [polygon.tolist() for polygon in polygons] or None


def _outline(x: float, y: float, width: float, height: float) -> list[float]:
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def _area(bbox: list[float], mask: dict[str, Any] | list[list[float]] | None, size: tuple[int, int]) -> float:
    if mask is None:
        return bbox[2] * bbox[3]
    if isinstance(mask, dict) and not isinstance(mask["counts"], list):
        return float(mask_util.area(mask))
    rle = mask_util.frPyObjects(mask, *size)
    return float(mask_util.area(mask_util.merge(rle) if isinstance(rle, list) else rle))
