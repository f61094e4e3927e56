"""Records of a dataset's images from a checked annotation file."""

import os
from collections.abc import Sequence

import numpy as np

from .annotations import is_box, is_ignored, usable_polygons


def make_records(
    content: dict[str, list[dict]], image_root: str, category_ids: Sequence[int], use_masks: bool = True
) -> tuple[list[dict], dict[str, list[int]]]:
    """One record (see CocoDataset) for every image, in the file's order, and the instances left out.

    x + width and y + height are added in float32, as in Detectron2, then stored as float64. An exact sum differs in
    the last bit: IoU ties break, and other anchors become positive.

    Args:
        content: result of `read_annotations`.
        use_masks: records have `masks`, and instances need one.

    Returns:
        the records, and the ids of the annotations left out by the cause, which continues "3 instances ...".
    """
    labels = {category_id: label for label, category_id in enumerate(category_ids)}
    records = {
        image["id"]: {
            "image_id": image["id"],
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "boxes": [],
            "labels": [],
            **({"masks": []} if use_masks else {}),
        }
        for image in content["images"]
    }
    bad_boxes, bad_masks, rle_masks = [], [], []
    for annotation in content["annotations"]:
        if is_ignored(annotation):
            continue
        if not is_box(annotation["bbox"]):
            bad_boxes.append(annotation["id"])
            continue
        record = records[annotation["image_id"]]
        if use_masks:
            segmentation = annotation.get("segmentation")
            if isinstance(segmentation, dict):
                rle_masks.append(annotation["id"])
                continue
            if not (polygons := usable_polygons(segmentation)):
                bad_masks.append(annotation["id"])
                continue
            record["masks"].append(polygons)
        record["boxes"].append(annotation["bbox"])
        record["labels"].append(labels[annotation["category_id"]])
    for record in records.values():
        boxes = np.array(record["boxes"], dtype=np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        record["boxes"] = boxes.astype(np.float64)
        record["labels"] = np.array(record["labels"], dtype=np.int64)
    skipped = {
        "with a box without area or not finite": bad_boxes,
        "without a polygon of at least 3 points, all finite": bad_masks,
        "with a run-length encoded mask": rle_masks,
    }
    return list(records.values()), {cause: ids for cause, ids in skipped.items() if ids}


def missing_files(records: Sequence[dict]) -> list[str]:
    """`file_name` of the records whose file does not exist.

    It lists each folder once, which is faster than a query for each file. Names that are not listed are queried, as
    a file system may accept another spelling, such as another case.
    """
    listings: dict[str, set[str]] = {}
    missing = []
    for record in records:
        folder, name = os.path.split(record["file_name"])
        if folder not in listings:
            listings[folder] = _names(folder)
        if name not in listings[folder] and not os.path.isfile(record["file_name"]):
            missing.append(record["file_name"])
    return missing


def _names(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}  # not a dangling link
    except (OSError, ValueError):  # missing, not readable, or an invalid name
        return set()
