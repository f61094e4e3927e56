"""COCO annotation files as a torch Dataset, and their images."""

import contextlib
import io
import logging
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from torch.utils.data import Dataset

from . import catalog
from .annotations import first, is_ignored, read_annotations, refuse, where_to_point
from .errors import DataError
from .records import make_records, missing_files

logger = logging.getLogger(__name__)


class CocoDataset(Dataset):
    """The images of a COCO annotation file, each as a record; the mapper reads the pixels.

    A record is a dict: `image_id` int, `file_name` str (full path), `height`, `width` int, `boxes` float64
    (N, 4) xyxy pixels, `labels` int64 (N,) from 0, `masks` list of N lists of polygons (flat float64 arrays
    x0, y0, x1, y1, ...; absent without `use_masks`). Annotations with `iscrowd` or `ignore` are left out.

    Args:
        names: name of a known or registered dataset.
        json_file, image_root: paths, which replace those of `names`; without `names` both are needed.
        filter_empty: drop images without a usable instance. A run-length encoded mask is then an error,
            as augmentation needs polygons; otherwise the instance is left out of the records.
        use_masks: False for detectors without masks: masks are neither needed nor checked.

    Attributes:
        name, json_file, image_root: str.
        classes: names by label, in order of category id. category_ids: label -> id in the file.
        records: the records, a read-only sequence.
        sizes: int64 array (images, 2) of height and width.
        coco: the pycocotools object of the whole file, read at first use.

    Raises DataError for missing, empty or malformed files, naming file, annotation and field, and for images whose
    file does not exist. Image files are not opened: `mimdet check-data --decode` does that.
    """

    def __init__(
        self,
        names: str | None = None,
        json_file: str | os.PathLike | None = None,
        image_root: str | os.PathLike | None = None,
        filter_empty: bool = True,
        use_masks: bool = True,
    ):
        split = read_split(names, json_file, image_root, filter_empty, use_masks)
        self.use_masks = use_masks
        self.name, self.json_file, self.image_root = split.name, split.json_file, split.image_root
        self.classes = [category["name"] for category in split.categories]
        self.category_ids = [category["id"] for category in split.categories]
        skipped = [f"{len(ids)} {cause} (annotations {first(ids)})" for cause, ids in split.skipped.items()]
        if skipped:
            logger.warning(f"{self.json_file}: instances skipped: {'; '.join(skipped)}")
        records = split.records
        if len(records) < len(split.images):
            dropped = len(split.images) - len(records)
            logger.info(f"{self.name}: dropped {dropped} of {len(split.images)} images, which have no instance")
        self.sizes = np.array([(record["height"], record["width"]) for record in records], dtype=np.int64)
        self.records = _PackedList(records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        return self.records[index]

    @cached_property
    def coco(self) -> COCO:
        """pycocotools object of the whole file, crowds included, `iscrowd` and `area` filled in."""
        content = read_annotations(self.json_file, self.use_masks)
        # pycocotools cannot rasterize a missing mask; __init__ has reported these annotations.
        content["annotations"] = [a for a in content["annotations"] if a.get("segmentation") or not self.use_masks]
        for annotation in content["annotations"]:
            annotation["iscrowd"] = int(is_ignored(annotation))
        coco = COCO()
        coco.dataset = content
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        for annotation in content["annotations"]:
            if annotation.get("area") is None and annotation.get("segmentation"):
                annotation["area"] = float(mask_utils.area(coco.annToRLE(annotation)))
            elif annotation.get("area") is None:
                annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        return coco

    def __getstate__(self) -> dict:
        # Pickling for loader workers: they do not need the evaluator's copy of the file.
        return {key: value for key, value in self.__dict__.items() if key != "coco"}


@dataclass(frozen=True)
class Split:
    """A dataset's annotation file, read and checked.

    Attributes:
        name, json_file, image_root: str.
        categories: in order of id, and so of label. images, annotations: the file's lists.
        records: those of the used images, see CocoDataset.
        skipped: ids of the unusable instances by cause.
    """

    name: str
    json_file: str
    image_root: str
    categories: list[dict]
    images: list[dict]
    annotations: list[dict]
    records: list[dict]
    skipped: dict[str, list[int]]


def read_split(
    names: str | None = None,
    json_file: str | os.PathLike | None = None,
    image_root: str | os.PathLike | None = None,
    filter_empty: bool = True,
    use_masks: bool = True,
    report: Callable[[str], None] = refuse,
) -> Split:
    """Read and check the annotation file of a CocoDataset with these arguments.

    Each problem goes to `report`, which by default raises DataError; if it returns, the rest is still read. A
    file that cannot be read at all raises DataError, whatever `report` is.
    """
    name, json_file, image_root = _locate(names, json_file, image_root)
    content = read_annotations(json_file, use_masks, need_polygons=filter_empty, report=report)
    if not content["categories"]:
        report(f"{json_file}: the file lists no category")
    objects = [annotation for annotation in content["annotations"] if not is_ignored(annotation)]
    if use_masks and objects and not any(annotation.get("segmentation") for annotation in objects):
        report(
            f"{json_file}: no annotation has a segmentation; Mask R-CNN needs masks, as polygons. "
            "For a detector without masks, such as RetinaNet, set the dataset's use_masks=False"
        )
    categories = sorted(content["categories"], key=lambda category: category["id"])
    records, skipped = make_records(content, image_root, [category["id"] for category in categories], use_masks)
    if filter_empty:
        records = [record for record in records if len(record["labels"])]
    if not records:
        report(f"{json_file}: no image {'with a usable instance ' * filter_empty}in this file")
    if not Path(image_root).is_dir():
        report(f"image folder not found: {image_root}. {where_to_point()}")
    elif missing := missing_files(records):
        report(
            f"{len(missing)} of {len(records)} image files of {json_file} do not exist: "
            f"{first([repr(file) for file in missing])}. Correct the dataset's image_root, or copy the images there"
        )
    return Split(name, json_file, image_root, categories, content["images"], content["annotations"], records, skipped)


class _PackedList(Sequence):
    """Read-only list in one array of pickles: forked workers share its memory without copies."""

    def __init__(self, items: Sequence):
        pickles = [pickle.dumps(item, protocol=5) for item in items]
        self._ends = np.cumsum([0, *map(len, pickles)])
        self._bytes = np.frombuffer(b"".join(pickles), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int):
        index = range(len(self))[index]
        return pickle.loads(memoryview(self._bytes[self._ends[index] : self._ends[index + 1]]))


def _locate(names, json_file, image_root) -> tuple[str, str, str]:
    """(name, annotation file, image folder) from the arguments of CocoDataset."""
    if names is not None and not isinstance(names, str):
        raise DataError(f"names must be one dataset name, got {names!r}")
    if json_file is None or image_root is None:
        if names is None:
            raise DataError("a dataset needs either names, or both json_file and image_root")
        known_file, known_root = catalog.find(names)
        name = names if json_file is None else Path(json_file).stem
        return name, _expanded(json_file or known_file), _expanded(image_root or known_root)
    return Path(json_file).stem, _expanded(json_file), _expanded(image_root)


def _expanded(path: str | os.PathLike) -> str:
    return os.path.expanduser(os.fspath(path))


def read_image(record: dict) -> Image.Image:
    """The record's image in RGB, with its EXIF orientation applied.

    Raises DataError when the file is missing, cannot be decoded, has more than 8 bits a channel, or differs
    from the record's height and width.
    """
    path = record["file_name"]
    name = f"{path} (image id {record['image_id']})"
    if not os.path.isfile(path):
        raise DataError(f"image not found: {name}. Correct the dataset's image_root, or copy the image there")
    try:
        with Image.open(path) as image:
            mode = image.mode
            ImageOps.exif_transpose(image, in_place=True)
            image = image.convert("RGB")
    except Exception as error:  # decoders of broken files raise errors of many types
        raise DataError(
            f"image cannot be read: {name} is damaged or of an unknown format ({error}). "
            "Replace the file, or take its image out of the annotation file"
        ) from None
    if mode == "F" or mode.startswith("I"):
        raise DataError(f"image {name} has more than 8 bits a channel (mode {mode}). Convert it to 8 bits")
    if image.size != (record["width"], record["height"]):
        raise DataError(
            f"image {name} is {image.width}x{image.height} (width x height, EXIF orientation applied), but "
            f"{record['width']}x{record['height']} in the annotation file. Correct the one or the other"
        )
    return image
