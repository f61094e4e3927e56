"""Names of datasets and the paths of their files."""

import difflib
import os
from pathlib import Path

from .errors import DataError

# Category id -> name of COCO's 80 detection classes; the ids have gaps.
COCO_CATEGORIES = {
    1: "person",
    2: "bicycle",
    3: "car",
    4: "motorcycle",
    5: "airplane",
    6: "bus",
    7: "train",
    8: "truck",
    9: "boat",
    10: "traffic light",
    11: "fire hydrant",
    13: "stop sign",
    14: "parking meter",
    15: "bench",
    16: "bird",
    17: "cat",
    18: "dog",
    19: "horse",
    20: "sheep",
    21: "cow",
    22: "elephant",
    23: "bear",
    24: "zebra",
    25: "giraffe",
    27: "backpack",
    28: "umbrella",
    31: "handbag",
    32: "tie",
    33: "suitcase",
    34: "frisbee",
    35: "skis",
    36: "snowboard",
    37: "sports ball",
    38: "kite",
    39: "baseball bat",
    40: "baseball glove",
    41: "skateboard",
    42: "surfboard",
    43: "tennis racket",
    44: "bottle",
    46: "wine glass",
    47: "cup",
    48: "fork",
    49: "knife",
    50: "spoon",
    51: "bowl",
    52: "banana",
    53: "apple",
    54: "sandwich",
    55: "orange",
    56: "broccoli",
    57: "carrot",
    58: "hot dog",
    59: "pizza",
    60: "donut",
    61: "cake",
    62: "chair",
    63: "couch",
    64: "potted plant",
    65: "bed",
    67: "dining table",
    70: "toilet",
    72: "tv",
    73: "laptop",
    74: "mouse",
    75: "remote",
    76: "keyboard",
    77: "cell phone",
    78: "microwave",
    79: "oven",
    80: "toaster",
    81: "sink",
    82: "refrigerator",
    84: "book",
    85: "clock",
    86: "vase",
    87: "scissors",
    88: "teddy bear",
    89: "hair drier",
    90: "toothbrush",
}

# Name -> (annotation file, image folder), relative to `data_root()`.
_BUILTIN = {
    "coco_2017_train": ("coco/annotations/instances_train2017.json", "coco/train2017"),
    "coco_2017_val": ("coco/annotations/instances_val2017.json", "coco/val2017"),
    "shapes_train": ("shapes/annotations/instances_train.json", "shapes/train"),
    "shapes_val": ("shapes/annotations/instances_val.json", "shapes/val"),
}
_registered: dict[str, tuple[str, str]] = {}


def data_root() -> Path:
    """Folder of the built-in datasets: `$DETECTRON2_DATASETS`, else `datasets` in the current folder."""
    return Path(os.environ.get("DETECTRON2_DATASETS") or "datasets").expanduser()


def register(name: str, json_file: str | os.PathLike, image_root: str | os.PathLike) -> None:
    """Give a dataset in COCO format a name.

    Paths are taken as they are: a relative one starts at the current folder. Raises DataError when the name
    is already that of other files.
    """
    entry = (os.fspath(json_file), os.fspath(image_root))
    if name in _BUILTIN or _registered.get(name, entry) != entry:
        raise DataError(f"dataset name {name!r} is taken: it is that of {find(name)}; choose another name")
    _registered[name] = entry


def find(name: str) -> tuple[str, str]:
    """(annotation file, image folder) of a dataset; raises DataError for an unknown name.

    The files need not exist.
    """
    if name in _registered:
        return _registered[name]
    if name in _BUILTIN:
        json_file, image_root = _BUILTIN[name]
        return str(data_root() / json_file), str(data_root() / image_root)
    known = sorted([*_BUILTIN, *_registered])
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise DataError(
        f"unknown dataset {name!r}: {hint}Known: {', '.join(known)}. "
        "Use mimdet.data.register(name, json_file, image_root), or give json_file and image_root instead "
        "(--train-json and --train-images, --val-json and --val-images)"
    )
