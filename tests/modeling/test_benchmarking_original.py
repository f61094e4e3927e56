"""Benchmarking-ViT beside the original: set MIMDET_ORIGINAL to its checkout, with Detectron2 importable."""

import os
import sys
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support.fill_weights import fill_module, gradient, image
from support.relative_error import relative_error
from support.slots import detections_of
from support.small_benchmarking import SMALL, loss, small_input

from mimdet.bench.experiments.detectron2 import make_importable
from mimdet.data import FixedSizeCrop, ResizeScale
from mimdet.data.transforms import clip_targets, mask_boxes
from mimdet.detection import GeneralizedRCNN
from mimdet.modeling import BenchmarkingViTDet

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


@pytest.mark.parametrize("sincos", [True, False])
def test_mae_weights(original, tmp_path, sincos):
    width = SMALL["embed_dim"]
    make = original("models.benchmarking").BenchmarkingViTDet
    state = {k: v for k, v in make(**SMALL).state_dict().items() if k.startswith(("patch_embed.", "blocks."))}
    state |= {"cls_token": torch.zeros(1, 1, width), "pos_embed": torch.randn(1, 197, width)}
    state |= {"norm.weight": torch.ones(width), "norm.bias": torch.ones(width)}
    torch.save({"model": state}, tmp_path / "mae.pth")
    options = {**SMALL, "sincos_pos_embed": sincos, "pretrained": str(tmp_path / "mae.pth")}
    ours, theirs = (build(**options).state_dict() for build in (BenchmarkingViTDet, make))
    for name, expected in theirs.items():
        if not name.startswith("ms_adaptor."):
            torch.testing.assert_close(ours[name], expected, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("new", [(75, 100), (300, 200), (333, 1000)], ids=str)
def test_postprocess(original, new):
    structures = original("detectron2.structures")
    corners = torch.from_numpy(gradient(5, (40, 2, 2))).abs() * 60
    boxes = torch.cat([corners.amin(1), corners.amax(1)], dim=1)
    masks = torch.from_numpy(gradient(6, (40, 28, 28))).sigmoid()
    detection = {"boxes": boxes, "scores": torch.rand(40), "labels": torch.arange(40), "mask_probabilities": masks}
    model = SimpleNamespace(lsj_postprocess=True, device=torch.device("cpu"))
    (ours,) = GeneralizedRCNN._resize(model, detections_of([detection]), [(128, 128)], [new]).tolist()
    ours = GeneralizedRCNN._paste(ours, new)
    instances = structures.Instances(
        (128, 128), pred_boxes=structures.Boxes(boxes.clone()), pred_classes=torch.arange(40), pred_masks=masks[:, None]
    )
    theirs = original("models.modeling.postprocessing").detector_postprocess(instances, *new)
    assert len(theirs) < 40
    assert torch.equal(ours["labels"], theirs.pred_classes)
    torch.testing.assert_close(ours["boxes"], theirs.pred_boxes.tensor)
    assert (ours["masks"] != theirs.pred_masks).flatten(1).sum(1).max() <= 10


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
