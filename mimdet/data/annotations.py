"""Reading COCO annotation files: checks, and conversion to records."""

import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .errors import DataError

logger = logging.getLogger(__name__)


def read_annotations(json_file: str) -> dict:
    """Content of an annotation file; raises DataError unless its lists of objects are there."""
    path = Path(json_file)
    if not path.is_file():
        raise DataError(f"annotation file not found: {json_file}. {where_to_point()}")
    if path.stat().st_size == 0:
        raise DataError(f"annotation file is empty: {json_file}. Copy or download it again")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"annotation file is not valid JSON: {json_file} ({error})") from None
    if not isinstance(content, dict):
        raise DataError(
            f"{json_file}: expected an object with images, annotations and categories, "
            f"found a {type(content).__name__} (a file of detection results?)"
        )
    required = {
        "images": ("id", "file_name", "height", "width"),
        "annotations": ("id", "image_id", "category_id", "bbox"),
        "categories": ("id", "name"),
    }
    for key, fields in required.items():
        if not isinstance(content.get(key), list):
            raise DataError(f"{json_file}: the list {key!r} is missing; COCO files have it at their top level")
        for position, entry in enumerate(content[key]):
            if not isinstance(entry, dict) or any(field not in entry for field in fields):
                raise DataError(f"{json_file}: {key}[{position}] must have {', '.join(fields)}, is {entry!r:.200}")
    for key in ("images", "categories"):
        seen = set()
        for entry in content[key]:
            if not isinstance(entry["id"], int) or entry["id"] in seen:
                raise DataError(f"{json_file}: id {entry['id']!r} in {key} is not an integer, or occurs twice")
            seen.add(entry["id"])
    return content


def where_to_point() -> str:
    """What to do about a path that does not exist."""
    root = os.environ.get("DETECTRON2_DATASETS")
    now = f"now {root!r}" if root else "not set, so 'datasets' in the current folder is used"
    return (
        "Give the dataset's json_file and image_root, or, for names such as coco_2017_val, set "
        f"$DETECTRON2_DATASETS to the folder that holds coco/ ({now})"
    )


def make_records(
    content: dict,
    json_file: str,
    image_root: str,
    category_ids: Sequence[int],
    allow_rle: bool,
    use_masks: bool = True,
) -> list[dict]:
    """One record (see CocoDataset) for every image, in the file's order.

    One warning sums up the instances left out. Raises DataError for annotations that contradict the file,
    and, unless `allow_rle`, for masks given as run lengths. Without `use_masks` nothing looks at masks.
    """
    records = {}
    for image in content["images"]:
        if not all(isinstance(image[side], int) and image[side] > 0 for side in ("height", "width")):
            raise DataError(
                f"{json_file}: image {image['id']} has height {image['height']!r}, width {image['width']!r}; "
                "both must be positive integers"
            )
        records[image["id"]] = {
            "image_id": image["id"],
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "boxes": [],
            "labels": [],
            **({"masks": []} if use_masks else {}),
        }
    _add_instances(records, content["annotations"], json_file, category_ids, allow_rle, use_masks)
    for record in records.values():
        record["boxes"] = np.array(record["boxes"], dtype=np.float64).reshape(-1, 4)
        record["labels"] = np.array(record["labels"], dtype=np.int64)
    return list(records.values())


def _add_instances(
    records: dict[int, dict],
    annotations: list[dict],
    json_file: str,
    category_ids: Sequence[int],
    allow_rle: bool,
    use_masks: bool,
) -> None:
    labels = {category_id: label for label, category_id in enumerate(category_ids)}
    bad_boxes, bad_masks, rle_masks = [], [], []
    instances = segmented = 0
    for annotation in annotations:
        where = f"{json_file}: annotation {annotation['id']} of image {annotation['image_id']}"
        if annotation["image_id"] not in records:
            raise DataError(f"{where} refers to an image that the file does not list")
        if annotation["category_id"] not in labels:
            raise DataError(f"{where} refers to the unknown category {annotation['category_id']}")
        if annotation.get("iscrowd"):
            continue
        segmentation = annotation.get("segmentation") if use_masks else None
        instances += 1
        segmented += bool(segmentation)
        box = _box(annotation["bbox"], where)
        if isinstance(segmentation, dict) and not allow_rle:
            raise DataError(f"{where} has a run-length encoded mask; training needs polygons, convert the masks")
        if box is None:
            bad_boxes.append(annotation["id"])
            continue
        record = records[annotation["image_id"]]
        if isinstance(segmentation, dict):
            rle_masks.append(annotation["id"])
            continue
        if use_masks:
            if not (polygons := _polygons(segmentation, where)):
                bad_masks.append(annotation["id"])
                continue
            record["masks"].append(polygons)
        record["boxes"].append(box)
        record["labels"].append(labels[annotation["category_id"]])
    if use_masks and instances and not segmented:
        raise DataError(
            f"{json_file}: no annotation has a segmentation; Mask R-CNN needs masks, as polygons. "
            "For a detector without masks, such as RetinaNet, set the dataset's use_masks=False"
        )
    skipped = {
        "with a box without area or not finite": bad_boxes,
        "without a polygon of at least 3 points": bad_masks,
        "with a run-length encoded mask": rle_masks,
    }
    report = [f"{len(ids)} {why} (annotations {_first(ids)})" for why, ids in skipped.items() if ids]
    if report:
        logger.warning(f"{json_file}: instances skipped: {'; '.join(report)}")


def _first(ids: list, count: int = 5) -> str:
    return ", ".join(map(str, ids[:count])) + (", ..." if len(ids) > count else "")


def _box(bbox, where: str) -> tuple[float, float, float, float] | None:
    """xyxy of COCO's x, y, width, height; None when it encloses nothing."""
    try:
        x, y, width, height = map(float, bbox)
    except (TypeError, ValueError):
        raise DataError(f"{where}: bbox must be [x, y, width, height], is {bbox!r}") from None
    if not math.isfinite(x + y + width + height) or width <= 0 or height <= 0:
        return None
    return x, y, x + width, y + height


def _polygons(segmentation, where: str) -> list[np.ndarray]:
    """The usable polygons of a segmentation; a missing one gives none."""
    try:
        polygons = [np.asarray(polygon, dtype=np.float64) for polygon in segmentation or ()]
    except (TypeError, ValueError):
        raise DataError(f"{where}: segmentation must be a list of polygons [x0, y0, x1, y1, ...]") from None
    return [p for p in polygons if p.ndim == 1 and p.size >= 6 and p.size % 2 == 0 and np.isfinite(p).all()]
