"""Benchmarking-ViT beside the original: set MIMDET_ORIGINAL to its checkout, with Detectron2 importable."""

import os
import sys
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support.fill_weights import fill_module, image
from support.relative_error import relative_error

from mimdet.bench.experiments.detectron2 import make_importable
from mimdet.data import FixedSizeCrop, ResizeScale
from mimdet.data.transforms import clip_targets, mask_boxes
from mimdet.modeling import BenchmarkingViTDet
from mimdet.testing.small_benchmarking import SMALL, loss, small_input

ORIGINAL = os.environ.get("MIMDET_ORIGINAL")
pytestmark = pytest.mark.skipif(not ORIGINAL, reason="MIMDET_ORIGINAL does not name a checkout of the original")


@pytest.fixture(scope="module")
def original():
    """``original(name)`` is the original's module."""
    make_importable(ORIGINAL)
    yield import_module
    sys.path.remove(ORIGINAL)
    for name in [name for name in sys.modules if name.partition(".")[0] == "models"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "changes",
    [{}, {"init_values": 0.5, "beit_qkv_bias": True, "zero_pos_embed": True}],
    ids=["default", "beit"],
)
def test_features_and_gradients(original, changes):
    theirs = original("models.benchmarking").BenchmarkingViTDet(**{**SMALL, **changes})
    ours = BenchmarkingViTDet(**{**SMALL, **changes})
    torch.testing.assert_close(ours.pos_embed, theirs.pos_embed, rtol=0, atol=1e-5)
    fill_module(theirs)
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.output_shape().keys() == theirs.output_shape().keys()
    images = SimpleNamespace(tensor=small_input())
    features = [model.eval()(images) for model in (ours, theirs)]
    for maps in features:
        loss(maps).backward()
    for name, expected in features[1].items():
        assert relative_error(features[0][name], expected) <= 3e-6, name
    for (name, actual), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert relative_error(actual.grad, expected.grad) <= 2e-5, name


@pytest.mark.parametrize("scale", [0.13, 0.7, 1.3, 1.99])
def test_large_scale_jitter(original, monkeypatch, scale):
    transforms = original("detectron2.data.transforms")
    masks = original("detectron2.structures.masks")
    pixels = image(31, 90, 120).astype(np.uint8).transpose(1, 2, 0).copy()
    polygons = [np.array([10.0, 5, 100, 20, 60, 85]), np.array([70.0, 10, 118, 12, 110, 80, 75, 70])]
    share = 0.37
    monkeypatch.setattr(np.random, "uniform", lambda low, high: scale if high == 2.0 else share)
    moves = transforms.AugmentationList(
        [transforms.ResizeScale(0.1, 2.0, 128, 128), transforms.FixedSizeCrop((128, 128))]
    )
    aug_input = transforms.AugInput(pixels)
    applied = moves(aug_input)
    # Detectron2 changes its argument in place.
    moved = [applied.apply_polygons([polygon.copy().reshape(-1, 2)]) for polygon in polygons]
    left = masks.PolygonMasks([[part.reshape(-1) for part in parts] for parts in moved])
    expected = [b for b in left.get_bounding_boxes().tensor.tolist() if np.isfinite(b).all()]

    generator = SimpleNamespace(uniform=lambda low, high: scale, random=lambda: share)
    targets = {
        "boxes": mask_boxes([[p] for p in polygons]),
        "labels": np.arange(2),
        "masks": [[p] for p in polygons],
    }
    resized = Image.fromarray(pixels)
    for augment in (ResizeScale(0.1, 2.0, 128, 128), FixedSizeCrop((128, 128))):
        resized, targets = augment(resized, targets, generator)
    np.testing.assert_array_equal(np.asarray(resized), aug_input.image)
    kept = clip_targets(targets, 128, 128)
    np.testing.assert_allclose(mask_boxes(kept["masks"]), expected, atol=1e-4)
