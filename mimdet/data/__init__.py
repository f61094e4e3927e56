"""Datasets in COCO format, augmentations and loaders."""

from .catalog import COCO_CATEGORIES, register
from .coco import CocoDataset, read_image
from .errors import DataError
from .loader import build_detection_test_loader, build_detection_train_loader
from .mapper import DatasetMapper
from .sampler import AspectRatioBatchSampler, TrainingSampler
from .transforms import (
    AugmentationList,
    FixedSizeCrop,
    RandomApply,
    RandomCrop,
    RandomFlip,
    ResizeScale,
    ResizeShortestEdge,
)

__all__ = [
    "COCO_CATEGORIES",
    "AspectRatioBatchSampler",
    "AugmentationList",
    "CocoDataset",
    "DataError",
    "DatasetMapper",
    "FixedSizeCrop",
    "RandomApply",
    "RandomCrop",
    "RandomFlip",
    "ResizeScale",
    "ResizeShortestEdge",
    "TrainingSampler",
    "build_detection_test_loader",
    "build_detection_train_loader",
    "read_image",
    "register",
]
