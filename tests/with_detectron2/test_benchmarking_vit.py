"""Benchmarking-ViT inside Detectron2, and beside the original's own configs where ``MIMDET_ORIGINAL`` names them."""

import json

import numpy as np
import pytest
import torch
from support.paths import RECORDINGS
from support.relative_error import relative_error

from mimdet.testing.small_benchmarking import SMALL

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import LazyConfig, instantiate
from detectron2.data.transforms import AugInput
from detectron2.modeling import Backbone
from omegaconf import OmegaConf
from support import detectron2_testing as d2

from mimdet.config import load
from mimdet.detectron2.config import load_config

EPOCHS = (25, 50, 100)
SIZES = [(128, 128), (128, 128)]
# Without stochastic depth, whose numbers the original draws in another order.
SHRUNKEN = [f"model.backbone.bottom_up.{key}={value}" for key, value in {**SMALL, "drop_path_rate": 0.0}.items()]


def original_config(epochs):
    root = d2.folder("MIMDET_ORIGINAL")
    d2.original_config()  # puts its modules on the path
    return LazyConfig.load(str(root / f"configs/benchmarking/benchmarking_mask_rcnn_base_FPN_{epochs}ep_LSJ_mae.py"))


@pytest.fixture(scope="module")
def model():
    return d2.small(load_config("configs/detectron2/benchmarking_b_25ep.py"), SHRUNKEN)


def test_backbone_is_a_detectron2_backbone(model):
    bottom_up = model.backbone.bottom_up
    assert isinstance(bottom_up, Backbone)
    assert bottom_up.padding_constraints == {"size_divisibility": 32}
    shapes = {name: (s.channels, s.stride) for name, s in bottom_up.output_shape().items()}
    assert shapes == {"s0": (64, 4), "s1": (64, 8), "s2": (64, 16), "s3": (64, 32)}
    assert model.lsj_postprocess


@pytest.mark.parametrize("epochs", EPOCHS)
def test_full_size(epochs):
    cfg = load_config(f"configs/detectron2/benchmarking_b_{epochs}ep.py")
    with torch.device("meta"):
        model = instantiate(cfg.model)
    recorded = json.loads((RECORDINGS / "benchmarking_b.json").read_text())
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == {k: shape for k, (shape, _) in recorded.items()}
    cfg.optimizer.params.model = model
    assert len(instantiate(cfg.optimizer).param_groups) == 2
    assert instantiate(cfg.lr_multiplier)(0.5) == pytest.approx(0.5)


def test_native_weights_give_the_same_detections(model):
    native = instantiate(load("configs/benchmarking_b_25ep.py", [o.replace("=True", "=true") for o in SHRUNKEN]).model)
    native.load_state_dict(model.state_dict(), strict=True)
    batch = d2.inputs(SIZES)
    sizes = [(90, 128), (200, 100)]
    for entry, (height, width) in zip(batch, sizes, strict=True):
        entry.update(height=height, width=width)
    with torch.no_grad():
        expected = native.eval()([x["image"] for x in batch], output_sizes=sizes)
        results = model.eval()(batch)
    d2.assert_same_detections([x["instances"] for x in results], expected)


def test_augmentations_give_squares():
    side = 96
    cfg = load_config("configs/detectron2/benchmarking_b_25ep.py", [f"model.backbone.bottom_up.img_size={side}"])
    for split in ("train", "test"):
        mapper = instantiate(cfg.dataloader[split].mapper)
        augmentations = getattr(mapper.augmentations, "augs", mapper.augmentations)
        data = AugInput(np.zeros((40, 60, 3), np.uint8))
        for augmentation in augmentations:
            augmentation(data)
        assert data.image.shape == (side, side, 3)
        assert split == "test" or mapper.recompute_boxes


@pytest.mark.parametrize("epochs", EPOCHS)
def test_settings_are_the_originals(epochs):
    ours, theirs = load_config(f"configs/detectron2/benchmarking_b_{epochs}ep.py"), original_config(epochs)
    for key in (
        "optimizer.lr",
        "optimizer.betas",
        "optimizer.weight_decay",
        "optimizer.params.weight_decay_norm",
        "optimizer.params.overrides",
        "train.max_iter",
        "train.checkpointer",
        "train.eval_period",
        "train.ddp",
        "dataloader.train.total_batch_size",
        "dataloader.train.mapper",
        "dataloader.test.mapper",
        "lr_multiplier",
        "model",
    ):
        actual, expected = (_plain(OmegaConf.select(cfg, key)) for cfg in (ours, theirs))
        if isinstance(expected, dict):
            shared = {name: value for name, value in actual.items() if name in expected}
            assert shared == expected, key
        else:
            assert actual == pytest.approx(expected), key


def test_whole_detector_of_the_original(model):
    theirs = d2.small(original_config(25), [*SHRUNKEN, "model.backbone.bottom_up.pretrained=''"])
    model.load_state_dict(theirs.state_dict(), strict=True)
    batch = d2.inputs(SIZES)
    want_features, _, want_results, want_losses, proposals = d2.outputs(theirs, batch)
    features, _, results, losses, _ = d2.outputs(model, batch, proposals)
    for name, expected in want_losses.items():
        assert losses[name].item() == pytest.approx(expected.item(), rel=1e-5), name
    for name, expected in want_features.items():
        assert relative_error(features[name], expected) <= 3e-6, name
    d2.assert_same_detections(results, want_results)


def _plain(node):
    """A config's values: calls by class name, without keys that only one side has."""
    if OmegaConf.is_config(node):
        node = OmegaConf.to_container(node, resolve=True)
    if isinstance(node, dict):
        left_out = ("pretrained", "recompute", "conv_norm", "norm", "input_shape")
        return {key: _plain(value) for key, value in node.items() if key not in left_out}
    if isinstance(node, (list, tuple)):
        return [_plain(value) for value in node]
    if callable(node) or (isinstance(node, str) and node.startswith(("detectron2.", "mimdet.", "fvcore.", "configs."))):
        return (node if isinstance(node, str) else node.__name__).rsplit(".", 1)[-1]
    return node
