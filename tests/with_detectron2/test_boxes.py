"""Ground-truth boxes bitwise against Detectron2's, from the annotation to the tensor."""

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import detectron2.data.transforms as T
from detectron2.data.detection_utils import (
    annotations_to_instances,
    filter_empty_instances,
    transform_instance_annotations,
)
from detectron2.structures import BoxMode

from mimdet.data import FixedSizeCrop, RandomCrop, RandomFlip, ResizeShortestEdge
from mimdet.data.records import make_records
from mimdet.data.transforms import clip_targets, mask_boxes


def annotations(rng, height, width, count):
    """Boxes in COCO's two decimals, some over the edge, some very small, and their outlines."""
    records = []
    for number in range(count):
        x, y = rng.uniform(-20, (width - 1, height - 1))
        # the smallest vanish in float32 far from the origin
        w, h = rng.uniform(1, 200, 2) if number % 4 else 10.0 ** rng.uniform(-7, 0, 2)
        x, y, w, h = (round(float(v), 2 if number % 4 else 9) for v in (x, y, w, h))
        outline = [x, y, x + w, y, x + w, y + h, x, y + h]
        records.append({"id": number, "image_id": 1, "category_id": 1, "bbox": [x, y, w, h], "segmentation": [outline]})
    return [a for a in records if min(a["bbox"][2:]) > 0]


def ours_and_theirs(kind, seed):
    """The pixels' new size, our augmentations with their generator, and Detectron2's transforms for the same."""
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(300, 700, 2))
    chains = {
        "nothing": ([], list),
        "flips": (
            [RandomFlip(prob=1.0), RandomFlip(horizontal=False, vertical=True, prob=1.0)],
            lambda: [T.HFlipTransform(width), T.VFlipTransform(height)],
        ),
        "resize": ([ResizeShortestEdge(480, 1333)], lambda: [_resize(height, width, 480, 1333)]),
        "resize and crop": (
            [RandomFlip(prob=1.0), ResizeShortestEdge(500), RandomCrop("absolute_range", (384, 600)),
             ResizeShortestEdge(800, 1333)],
            lambda: [T.HFlipTransform(width), *_crop(height, width, seed)],
        ),
        "fixed size": (
            [ResizeShortestEdge(500), FixedSizeCrop((450, 450))],
            lambda: [_resize(height, width, 500, None), *_fixed(height, width, seed)],
        ),
    }  # fmt: skip
    augmentations, transforms = chains[kind]
    return height, width, augmentations, T.TransformList(transforms())


def _resize(height, width, length, longest):
    return T.ResizeTransform(height, width, *ResizeShortestEdge.output_size(height, width, length, longest))


def _window_rng(seed):
    """A generator in the state in which the crop of a chain draws: flip and resize draw one number each."""
    rng = np.random.default_rng(seed)
    rng.random()
    rng.integers(500, 501)
    return rng


def _crop(height, width, seed):
    first = _resize(height, width, 500, None)
    x, y, w, h = RandomCrop("absolute_range", (384, 600)).window(first.new_h, first.new_w, _window_rng(seed))
    return [first, T.CropTransform(x, y, w, h), _resize(h, w, 800, 1333)]


def _fixed(height, width, seed):
    first = _resize(height, width, 500, None)
    rng = np.random.default_rng(seed)
    rng.integers(500, 501)
    share = rng.random()
    x, y = (round(share * max(0, side - 450)) for side in (first.new_w, first.new_h))
    return [T.CropTransform(x, y, 450, 450, first.new_w, first.new_h)]


@pytest.mark.parametrize(
    ("kind", "recompute"),
    [
        *((kind, False) for kind in ("nothing", "flips", "resize", "resize and crop", "fixed size")),
        ("fixed size", True),
    ],
)
def test_boxes_are_those_of_detectron2(kind, recompute):
    compared = 0
    for seed in range(8):
        height, width, augmentations, transforms = ours_and_theirs(kind, seed)
        records = annotations(np.random.default_rng(seed), height, width, 40)
        image = {"id": 1, "file_name": "a.jpg", "height": height, "width": width}
        (record,), _ = make_records({"images": [image], "annotations": records}, "", [1])

        rng, pixels = np.random.default_rng(seed), Image.new("RGB", (width, height))
        targets = {key: record[key] for key in ("boxes", "labels", "masks")}
        targets["labels"] = np.arange(len(targets["boxes"]))
        for augmentation in augmentations:
            pixels, targets = augmentation(pixels, targets, rng)
        if recompute:
            targets["boxes"] = mask_boxes(targets["masks"])
        ours = clip_targets(targets, pixels.width, pixels.height)

        size = (pixels.height, pixels.width)
        theirs = [
            transform_instance_annotations(
                {**a, "category_id": number, "bbox_mode": BoxMode.XYWH_ABS}, transforms, size
            )
            for number, a in enumerate(records)
        ]  # fmt: skip
        instances = annotations_to_instances(theirs, size)
        if recompute:
            instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        instances = filter_empty_instances(instances)

        assert ours["boxes"].dtype == np.float32
        np.testing.assert_array_equal(ours["boxes"], instances.gt_boxes.tensor.numpy())
        assert ours["labels"].tolist() == instances.gt_classes.tolist()
        compared += len(instances)
    assert compared > 100
