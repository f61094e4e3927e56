"""COCO annotation files as a torch Dataset, and the pictures behind them."""

import contextlib
import io
import logging
import os
import pickle
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from torch.utils.data import Dataset

from . import catalog
from .annotations import make_records, read_annotations, where_to_point
from .errors import DataError

logger = logging.getLogger(__name__)


class CocoDataset(Dataset):
    """The images of a COCO annotation file, each as a record (the picture itself is read by the mapper).

    A record is a dict: `image_id` int, `file_name` str (full path), `height`, `width` int, `boxes` float64
    (N, 4) xyxy pixels, `labels` int64 (N,) from 0, `masks` list of N lists of polygons (flat float64 arrays
    x0, y0, x1, y1, ...; absent without `use_masks`). Crowd annotations are left out of it.

    Args:
        names: name of a known or registered dataset.
        json_file, image_root: paths, which replace those of `names`; both are needed without it.
        filter_empty: drop images without a usable instance. Instances whose mask is run-length encoded are
            then an error, for augmentation needs polygons; otherwise only the records go without them.
        use_masks: False for detectors without masks: annotations need none, and instances count whatever mask
            they have.

    Attributes:
        name, json_file, image_root: str.
        classes: names by label, in order of category id. category_ids: label -> id in the file.
        records: the records, a read-only sequence.
        sizes: int64 array (images, 2) of height and width.
        coco: the pycocotools object of the whole file, read at first use.

    Raises DataError for missing, empty or malformed files, naming file, image and annotation.
    """

    def __init__(
        self,
        names: str | None = None,
        json_file: str | os.PathLike | None = None,
        image_root: str | os.PathLike | None = None,
        filter_empty: bool = True,
        use_masks: bool = True,
    ):
        self.use_masks = use_masks
        self.name, self.json_file, self.image_root = _locate(names, json_file, image_root)
        content = read_annotations(self.json_file)
        if not Path(self.image_root).is_dir():
            raise DataError(f"image folder not found: {self.image_root}. {where_to_point()}")
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self.classes = [category["name"] for category in categories]
        self.category_ids = [category["id"] for category in categories]
        records = make_records(content, self.json_file, self.image_root, self.category_ids, not filter_empty, use_masks)
        if filter_empty:
            usable = [record for record in records if len(record["labels"])]
            if len(usable) < len(records):
                dropped = len(records) - len(usable)
                logger.info(f"{self.name}: dropped {dropped} of {len(records)} images, which have no instance")
            records = usable
        if not records:
            raise DataError(f"{self.json_file}: no image {'with a usable instance ' * filter_empty}in this file")
        self.sizes = np.array([(record["height"], record["width"]) for record in records], dtype=np.int64)
        self.records = _PackedList(records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        return self.records[index]

    @cached_property
    def coco(self) -> COCO:
        """pycocotools object of the whole file, crowds included, `iscrowd` and `area` filled in."""
        content = read_annotations(self.json_file)
        # The evaluator cannot rasterise an absent mask; these were reported when the dataset was made.
        content["annotations"] = [a for a in content["annotations"] if a.get("segmentation") or not self.use_masks]
        for annotation in content["annotations"]:
            annotation.setdefault("iscrowd", 0)
        coco = COCO()
        coco.dataset = content
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        for annotation in content["annotations"]:
            if "area" not in annotation and annotation.get("segmentation"):
                annotation["area"] = float(mask_utils.area(coco.annToRLE(annotation)))
            elif "area" not in annotation:
                annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        return coco

    def __getstate__(self) -> dict:
        # Loader workers have no use for the evaluator's copy of the file.
        return {key: value for key, value in self.__dict__.items() if key != "coco"}


class _PackedList(Sequence):
    """Read-only list kept as one array of pickles, which forked workers share without copying."""

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
        return name, os.fspath(json_file or known_file), os.fspath(image_root or known_root)
    return Path(json_file).stem, os.fspath(json_file), os.fspath(image_root)


def read_image(record: dict) -> Image.Image:
    """The record's picture in RGB, turned as its EXIF orientation says.

    Raises DataError when the file is missing, cannot be decoded, has more than 8 bits a channel, or differs
    from the record's height and width.
    """
    path = record["file_name"]
    name = f"{path} (image id {record['image_id']})"
    if not os.path.isfile(path):
        raise DataError(f"picture not found: {name}. Correct the dataset's image_root, or copy the picture there")
    try:
        with Image.open(path) as image:
            mode = image.mode
            ImageOps.exif_transpose(image, in_place=True)
            image = image.convert("RGB")
    except Exception as error:  # decoders of broken files raise errors of many types
        raise DataError(
            f"picture cannot be read: {name} is damaged or of an unknown format ({error}). "
            "Replace the file, or take its image out of the annotation file"
        ) from None
    if mode == "F" or mode.startswith("I"):
        raise DataError(f"picture {name} has more than 8 bits a channel (mode {mode}). Convert it to 8 bits")
    if image.size != (record["width"], record["height"]):
        raise DataError(
            f"picture {name} is {image.width}x{image.height} (width x height, EXIF orientation applied), but "
            f"{record['width']}x{record['height']} in the annotation file. Correct the one or the other"
        )
    return image
