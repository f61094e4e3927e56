"""COCO annotation files for evaluation, with all fields that the toolkits need."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pycocotools.mask as mask_util

from ..data.annotations import first, is_finite, is_ignored, read_annotations, usable_polygons

logger = logging.getLogger(__name__)


def load_ground_truth(json_file: str | Path, use_masks: bool = True) -> tuple[dict[str, Any], bool]:
    """Read an annotation file for evaluation.

    Missing fields are added: ``iscrowd``, ``area``, and ids from 1 (for the toolkits, 0 means "no match"). Detections
    in an ignored region are neither true nor false positives. Ignored are crowds, annotations with ``ignore``, and
    objects without a usable mask in a file where others have one. Annotations with a box that is not finite are left
    out.

    Args:
        use_masks: False where boxes alone are scored: objects then need no mask.

    Returns:
        the file's content, and whether its objects have masks.

    Raises:
        DataError: an error in the file; see :func:`mimdet.data.annotations.read_annotations`.
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
    """The run-length encoded mask, or the polygons of at least three points; None if there is neither."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        return segmentation
    polygons = usable_polygons(segmentation)
    if polygons and len(polygons) == len(segmentation):
        return segmentation  # all polygons are usable: no conversion needed
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
