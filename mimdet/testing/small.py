"""A shrunken MIMDet that keeps every part, and inputs for it."""

import numpy as np
import torch

from ..config import instantiate, load
from .weights import fill_module, image, polygons

SMALL = [
    "model.backbone.bottom_up.encoder.embed_dim=192",
    "model.backbone.bottom_up.encoder.depth=3",
    "model.backbone.bottom_up.encoder.num_heads=3",
    "model.backbone.bottom_up.encoder.dpr=0.0",
    "model.backbone.bottom_up.encoder.img_size=320",
    "model.backbone.bottom_up.encoder.checkpointing=false",
    "model.backbone.bottom_up.decoder.decoder_embed_dim=128",
    "model.backbone.bottom_up.decoder.depth=2",
    "model.backbone.bottom_up.decoder.num_heads=4",
    "model.backbone.bottom_up._out_feature_channels=[48,96,128,128]",
]
SIZES = [(224, 320), (150, 300)]


def small_config(*overrides):
    """The Base config at the size of the recordings in ``recordings/original_small.npz``."""
    return load("configs/mimdet_b_mask_rcnn.py", [*SMALL, *overrides])


def small_model(*overrides):
    """The small model with the recordings' weights."""
    model = instantiate(small_config(*overrides).model)
    fill_module(model)
    return model


def normalized(images):
    """Images as the backbone takes them."""
    mean = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
    std = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    return [(i - mean) / std for i in images]


def make_images(sizes=SIZES, seed=1):
    """Float images of 0..255, seeds counting up."""
    return [torch.from_numpy(image(seed + i, h, w)) for i, (h, w) in enumerate(sizes)]


def target(seed, size, count):
    """Ground truth of ``count`` star-shaped instances."""
    shapes = polygons(seed, *size, count)
    boxes = [[min(p[0::2]), min(p[1::2]), max(p[0::2]), max(p[1::2])] for p, _ in shapes]
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor([c for _, c in shapes], dtype=torch.int64),
        "masks": [[np.array(p)] for p, _ in shapes],
    }
