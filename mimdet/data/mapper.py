"""Dataset records -> samples of a model."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torchvision.transforms.v2 import functional as F

from ..polygons import PackedPolygons
from .coco import read_image
from .errors import DataError
from .transforms import AugmentationList, clip_targets, mask_boxes


class DatasetMapper:
    """Reads a record's image, augments it and its instances, and converts them to tensors.

    Called as `mapper(record, rng) -> sample`, with a record of CocoDataset and a numpy Generator, the only
    source of randomness. A sample is a dict: `image` uint8 (3, H, W); `image_id` int; `file_name` str;
    `height`, `width` int, the image's before augmentation; and, when `is_train`, `targets`: `boxes` float32
    (N, 4) xyxy pixels of `image`, `labels` int64 (N,), and, when `use_instance_mask`, `masks`, N lists of
    polygons (flat float64 arrays) as `PackedPolygons`. N may be 0.

    Args:
        image_format: order of the channels, "RGB" or "BGR".
        recompute_boxes: fit the boxes to the augmented masks; needs `use_instance_mask`.

    Raises DataError, which names the file, for an image that is missing, damaged, of another size than in the record,
    or that an augmentation fails on, and for a record without masks where they are needed.
    """

    def __init__(
        self,
        is_train: bool,
        augmentations: Sequence[Callable],
        image_format: str = "RGB",
        use_instance_mask: bool = True,
        recompute_boxes: bool = False,
    ):
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format must be 'RGB' or 'BGR', got {image_format!r}")
        if recompute_boxes and not use_instance_mask:
            raise ValueError("recompute_boxes fits boxes to masks: set use_instance_mask too")
        self.is_train = is_train
        self.augmentations = AugmentationList(augmentations)
        self.image_format = image_format
        self.use_instance_mask = use_instance_mask
        self.recompute_boxes = recompute_boxes

    def __call__(self, record: dict, rng: np.random.Generator) -> dict:
        image = read_image(record)
        targets = None
        if self.is_train:
            keys = ("boxes", "labels", "masks") if self.use_instance_mask else ("boxes", "labels")
            if self.use_instance_mask and "masks" not in record:
                raise DataError(
                    f"image {record['image_id']} comes without masks: set the mapper's use_instance_mask=False, as the "
                    "dataset's use_masks is"
                )
            targets = {key: record[key] for key in keys}
        try:
            image, targets = self.augmentations(image, targets, rng)
            if targets is not None:
                if self.recompute_boxes:
                    targets = {**targets, "boxes": mask_boxes(targets["masks"])}
                targets = clip_targets(targets, image.width, image.height)
                if "masks" in targets:
                    targets["masks"] = PackedPolygons.pack(targets["masks"])
        except Exception as error:  # augmentations may be custom code and raise any type
            raise DataError(
                f"image {record['file_name']} (image id {record['image_id']}), {record['width']}x{record['height']} "
                f"(width x height), cannot be augmented: {type(error).__name__}: {error}"
            ) from error
        pixels = F.pil_to_tensor(image)
        sample = {
            "image": pixels if self.image_format == "RGB" else pixels.flip(0),
            **{key: record[key] for key in ("image_id", "file_name", "height", "width")},
        }
        if targets is not None:
            targets["boxes"] = torch.from_numpy(targets["boxes"])
            targets["labels"] = torch.from_numpy(targets["labels"])
            sample["targets"] = targets
        return sample
