"""Read COCO annotation files and check every entry."""

import json
import os
import reprlib
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .errors import DataError

MAX_SIDE = 1_000_000  # pixels of an image side; pycocotools needs gigabytes for longer outlines
MAX_AREA = 2**31 - 1  # pixels of an image: pycocotools counts them in 32 bits
_FINITE = 1e30  # well inside float32
_REQUIRED = {
    "categories": ("id", "name"),
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
}
_NUMBERS = frozenset({int, float})  # types of JSON's numbers; bool is not among them
_UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # Unicode's control characters, lone surrogates, separators of lines

_repr = reprlib.Repr()  # shortens long and deep values
_repr.maxstring = _repr.maxother = 100
_repr.maxdict = 8


def refuse(problem: str) -> None:
    """Raise DataError: the default of ``report``."""
    raise DataError(problem)


def read_annotations(
    json_file: str | os.PathLike,
    use_masks: bool = True,
    need_polygons: bool = False,
    report: Callable[[str], None] = refuse,
) -> dict[str, list[dict]]:
    """The lists `categories`, `images` and `annotations` of a file, every entry checked.

    Each problem goes to `report` as a sentence that names file, entry and field; if `report` returns, the entry is
    left out. An unusable instance, such as a box without area, is no problem: COCO's files have some, and
    `make_records` leaves them out.

    A box wholly outside its image is a problem: the file's coordinates or image sizes are wrong, and probably not only
    there. A box that crosses an edge is clipped later.

    Args:
        use_masks: check the masks; otherwise they are ignored.
        need_polygons: masks of objects must be polygons, as augmentation needs them.

    Raises DataError when the file is missing, empty or not JSON, or one of its lists is missing.
    """
    content = _parse(json_file)
    names: set[str] = set()
    categories, category_ids = _sift(content, "categories", json_file, report, lambda c: _category_error(c, names))
    images, image_ids = _sift(content, "images", json_file, report, _image_error)
    sizes = {image["id"]: (image["height"], image["width"]) for image in images}

    def annotation_error(annotation: dict) -> str | None:
        error = _reference_error(annotation, image_ids, category_ids)
        error = error or _box_error(annotation, sizes.get(annotation["image_id"]))
        if error is None and use_masks:
            error = _mask_error(annotation, sizes.get(annotation["image_id"]), need_polygons)
        return error and f"annotation {annotation['id']} of image {_repr.repr(annotation['image_id'])}{error}"

    annotations, _ = _sift(content, "annotations", json_file, report, annotation_error)
    used = {category["id"] for category in categories}
    # annotations of an image or category that was left out are left out too
    annotations = [a for a in annotations if a["image_id"] in sizes and a["category_id"] in used]
    return {"categories": categories, "images": images, "annotations": annotations}


def where_to_point() -> str:
    """Advice for an error about a path that does not exist."""
    root = os.environ.get("DETECTRON2_DATASETS")
    now = f"now {root!r}" if root else "not set, so 'datasets' in the current folder is used"
    return (
        "Give the dataset's json_file and image_root, or, for names such as coco_2017_val, set "
        f"$DETECTRON2_DATASETS to the folder that holds coco/ ({now})"
    )


def is_ignored(annotation: dict) -> bool:
    """Whether an annotation marks a region to ignore rather than an object.

    It does with `iscrowd`, or with `ignore`, which some tools write instead. Detectron2 refuses files with `ignore`;
    pycocotools overwrites it with `iscrowd`, so such a region would count as an object.
    """
    return bool(annotation.get("iscrowd") or annotation.get("ignore"))


def is_box(bbox: list) -> bool:
    """Whether x, y, width, height are finite and enclose an area."""
    return is_finite(bbox) and bbox[2] > 0 and bbox[3] > 0


def is_finite(bbox: list) -> bool:
    """Whether float32 can hold all four numbers; JSON's integers may be larger."""
    x, y, width, height = bbox
    return (
        -_FINITE < x < _FINITE and -_FINITE < y < _FINITE and -_FINITE < width < _FINITE and -_FINITE < height < _FINITE
    )


def usable_polygons(segmentation: list | None) -> list[np.ndarray]:
    """Polygons, flat float64, of at least three points, all within `MAX_SIDE`; none for a missing mask."""
    polygons = []
    for polygon in segmentation or ():
        try:
            points = np.array(polygon, dtype=np.float64)
        except OverflowError:  # an integer beyond all floats
            continue
        if points.size >= 6 and points.size % 2 == 0 and (np.abs(points) <= MAX_SIDE).all():  # False for NaN
            polygons.append(points)
    return polygons


def first(values: list) -> str:
    """The first five of a list, for a message."""
    return ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")


def _parse(json_file: str | os.PathLike) -> dict:
    path = Path(json_file)
    if not path.is_file():
        raise DataError(f"annotation file not found: {json_file}. {where_to_point()}")
    if path.stat().st_size == 0:
        raise DataError(f"annotation file is empty: {json_file}. Copy or download it again")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"annotation file is not valid JSON: {json_file} ({error})") from None
    except RecursionError:
        raise DataError(f"annotation file is nested too deeply: {json_file} is not in COCO's format") from None
    if not isinstance(content, dict):
        raise DataError(
            f"{json_file}: expected an object with images, annotations and categories, "
            f"found a {type(content).__name__} (a file of detection results?)"
        )
    for key in _REQUIRED:
        if not isinstance(content.get(key), list):
            raise DataError(f"{json_file}: the list {key!r} is missing; COCO files have it at their top level")
    return content


def _sift(
    content: dict, key: str, json_file: str | os.PathLike, report: Callable[[str], None], find_error: Callable
) -> tuple[list[dict], set[int]]:
    """The valid entries of a list, and the ids of all."""
    required = set(_REQUIRED[key])
    valid, ids = [], set()
    for position, entry in enumerate(content[key]):
        if type(entry) is not dict or not entry.keys() >= required:
            lacking = [field for field in _REQUIRED[key] if type(entry) is not dict or field not in entry]
            error = f"{key}[{position}] must have {', '.join(lacking)}, is {_repr.repr(entry)}"
        elif type(entry["id"]) is not int or abs(entry["id"]) >= 2**63 or entry["id"] in ids:
            error = f"id {_repr.repr(entry['id'])} in {key} is not an integer of 64 bits, or occurs twice"
        else:
            ids.add(entry["id"])
            error = find_error(entry)
        if error is None:
            valid.append(entry)
        else:
            report(f"{json_file}: {error}")
    return valid, ids


def _is_printable(text: str) -> bool:
    return not any(unicodedata.category(character) in _UNPRINTABLE for character in text)


def _category_error(category: dict, names: set[str]) -> str | None:
    where, name = f"category {category['id']}", category["name"]
    if type(name) is not str or not name.strip():
        return f"{where}: name must be a text that is not empty, is {_repr.repr(name)}"
    if not _is_printable(name):
        return f"{where}: name {_repr.repr(name)} has a line break or another character that cannot be drawn"
    if name in names:
        return f"{where}: name {_repr.repr(name)} occurs twice; give each category another name"
    names.add(name)
    return None


def _image_error(image: dict) -> str | None:
    where, name, height, width = f"image {image['id']}", image["file_name"], image["height"], image["width"]
    if type(name) is not str or not name or not _is_printable(name):
        return f"{where}: file_name must be the name of a file, is {_repr.repr(name)}"
    if not all(type(side) is int and 0 < side <= MAX_SIDE for side in (height, width)) or height * width > MAX_AREA:
        return (
            f"{where} has height {_repr.repr(height)}, width {_repr.repr(width)}; both must be positive integers, "
            f"at most {MAX_SIDE}, and {MAX_AREA} multiplied"
        )
    return None


def _reference_error(annotation: dict, image_ids: set[int], category_ids: set[int]) -> str | None:
    for field, known, kind in (("image_id", image_ids, "an image"), ("category_id", category_ids, "a category")):
        value = annotation[field]
        if type(value) is not int:
            return f": {field} must be an integer, is {_repr.repr(value)}"
        if value not in known:
            return f" refers to {kind} that the file does not list ({field} {_repr.repr(value)})"
    for field in ("iscrowd", "ignore"):
        if annotation.get(field) not in (None, 0, 1):
            return f": {field} must be 0 or 1, is {_repr.repr(annotation[field])}"
    return None


def _box_error(annotation: dict, size: tuple[int, int] | None) -> str | None:
    bbox, area = annotation["bbox"], annotation.get("area")
    if not (type(bbox) is list and len(bbox) == 4 and _NUMBERS.issuperset(map(type, bbox))):
        return f": bbox must be [x, y, width, height] in numbers, is {_repr.repr(bbox)}"
    if area is not None and not (type(area) in _NUMBERS and 0 <= area < _FINITE):
        return f": area must be a number, 0 or more, is {_repr.repr(area)}"
    if size is not None and is_box(bbox) and not is_ignored(annotation):
        x, y, width, height = bbox
        if x >= size[1] or y >= size[0] or x + width <= 0 or y + height <= 0:
            return (
                f": bbox {_repr.repr(bbox)} is wholly outside its image of {size[1]}x{size[0]} (width x height); "
                "correct the box (x, y of the upper left corner, width, height, in pixels), or delete the annotation"
            )
    return None


def _mask_error(annotation: dict, size: tuple[int, int] | None, need_polygons: bool) -> str | None:
    segmentation = annotation.get("segmentation")
    if type(segmentation) is dict:
        if need_polygons and not is_ignored(annotation):
            return " has a run-length encoded mask; training needs polygons, convert the masks"
        return None if size is None else _run_length_error(segmentation, size)
    if segmentation is not None and not (
        type(segmentation) is list and all(type(p) is list and _NUMBERS.issuperset(map(type, p)) for p in segmentation)
    ):
        return f": segmentation must be a list of polygons [x0, y0, x1, y1, ...], is {_repr.repr(segmentation)}"
    return None


def _run_length_error(segmentation: dict, size: tuple[int, int]) -> str | None:
    """Check a mask before pycocotools reads it: its C code does not."""
    mask_size, counts = segmentation.get("size"), segmentation.get("counts")
    if not (type(mask_size) is list and all(type(side) is int for side in mask_size) and tuple(mask_size) == size):
        return f": size of the run-length encoded mask must be its image's, {list(size)}, is {_repr.repr(mask_size)}"
    runs = _text_runs(counts) if type(counts) is str else counts
    if not (type(runs) is list and all(type(run) is int and run >= 0 for run in runs)):
        return f": counts of the run-length encoded mask are malformed: {_repr.repr(counts)}"
    if sum(runs) != size[0] * size[1]:
        return f": counts of the run-length encoded mask cover {sum(runs)} pixels, its image has {size[0] * size[1]}"
    return None


def _text_runs(text: str) -> list[int] | None:
    """The run lengths in COCO's compressed text; None when it is malformed.

    Each number is written in digits of five bits, lowest first, as characters from "0" on: bit 5 says that more
    follow, bit 4 of the last is the sign. From the fourth on, a number is the difference to the run two before.
    """
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.int64) - ord("0")
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    ends = np.flatnonzero((codes & 32) == 0) + 1
    starts = np.concatenate([[0], ends[:-1]])
    digits = ends - starts
    if digits.max() > 7:  # 35 bits: no run is that long
        return None
    values = np.add.reduceat((codes & 31) << 5 * (np.arange(len(codes)) - np.repeat(starts, digits)), starts)
    values -= ((codes[ends - 1] & 16) > 0) * (1 << 5 * digits)
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return values.tolist()
