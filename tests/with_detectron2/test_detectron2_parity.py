"""The original MIMDet, run beside ours in Detectron2: same weights, same images, same random numbers.

Skipped without Detectron2 or without ``MIMDET_ORIGINAL``; ``test_parity.py`` compares with recordings everywhere.
"""

import json

import pytest
import torch
from support.paths import RECORDINGS
from support.relative_error import relative_error

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import detectron2.data.transforms as T
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetMapper
from detectron2.data.datasets import load_coco_json
from support import detectron2_testing as d2

from mimdet.detectron2.config import load_config


@pytest.fixture(scope="module")
def original():
    return d2.small(d2.original_config(), d2.ORIGINAL_SMALL)


@pytest.fixture(scope="module")
def switched(tmp_path_factory):
    cfg = load_config(d2.switched_config(tmp_path_factory.mktemp("configs")))
    return d2.small(cfg, d2.ORIGINAL_SMALL)


def on_meta(cfg):
    with torch.device("meta"):
        return instantiate(cfg.model)


@pytest.mark.parametrize("size", ["base", "large"])
def test_original_configs_build_with_imports_switched(tmp_path, size):
    state = on_meta(load_config(d2.switched_config(tmp_path, size))).state_dict()
    recorded = json.loads((RECORDINGS / f"mimdet_{size[0]}.json").read_text())
    assert {k: list(v.shape) for k, v in state.items()} == {k: shape for k, (shape, _) in recorded.items()}


def test_keys_shapes_and_order_are_the_originals(original, switched):
    assert [(k, v.shape) for k, v in switched.state_dict().items()] == [
        (k, v.shape) for k, v in original.state_dict().items()
    ]


def test_weights_go_both_ways(original, switched):
    """After ``fill_module`` all tensors are equal, also the computed position embeddings."""
    for (name, a), b in zip(original.state_dict().items(), switched.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    original.load_state_dict(switched.state_dict(), strict=True)
    switched.load_state_dict(original.state_dict(), strict=True)


def test_optimizer_groups_are_the_originals(original, switched):
    groups = []
    for cfg, model in ((d2.original_config(), original), (load_config(d2.BASE), switched)):
        cfg.optimizer.params.model = model
        names = {id(p): n for n, p in model.named_parameters()}
        of_model = instantiate(cfg.optimizer).param_groups
        groups.append([(g["lr"], g["weight_decay"], sorted(names[id(p)] for p in g["params"])) for g in of_model])
    assert groups[0] == groups[1]


def test_schedule_is_the_originals():
    cfgs = (d2.original_config(), load_config(d2.BASE))
    first, second = (instantiate(cfg.lr_multiplier) for cfg in cfgs)
    for where in (0.0, 0.001, 0.25 / 36, 0.5, 27 / 36, 0.8, 33 / 36, 0.99):
        assert first(where) == pytest.approx(second(where))
    for key in ("max_iter", "eval_period", "checkpointer.period", "ddp"):
        values = [LazyConfig.apply_overrides(cfg, []).train for cfg in cfgs]
        actual = [value[key.split(".")[0]] for value in values]
        actual = [g[key.split(".")[1]] if "." in key else g for g in actual]
        assert actual[0] == actual[1], key


def real_batch(names=("000000000790.jpg", "000000041888.jpg")):
    """Real images, resized as in ``RECIPE`` of the recordings, with their own ground truth."""
    root = d2.folder("MIMDET_COCO_SAMPLE")
    records = load_coco_json(
        str(root / "annotations" / "instances_val2017.json"), str(root / "val2017"), "coco_2017_val"
    )
    chosen = [next(r for r in records if r["file_name"].endswith(name)) for name in names]
    resize = T.ResizeShortestEdge(short_edge_length=224, max_size=1333)
    for record in chosen:
        record["annotations"] = [a for a in record["annotations"] if a.get("iscrowd", 0) == 0]
    return [
        DatasetMapper(is_train=True, augmentations=[resize], image_format="RGB", use_instance_mask=True)(record)
        for record in chosen
    ]


@pytest.mark.parametrize("images", ["synthetic", "coco"])
@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_outputs_are_the_originals(original, switched, ratio, images):
    batch = d2.inputs() if images == "synthetic" else real_batch()
    for model in (original, switched):
        d2.fill_module(model)  # statistics of norms that training moved
        d2.set_ratio(model, ratio)
    expected = d2.outputs(original, batch)
    report = compare(expected, d2.outputs(switched, batch, proposals=expected[-1]))
    print(ratio, images, {k: f"{v:.2g}" for k, v in report.items()})
    limits = {"loss": 1e-5, "features": 3e-6, "proposals": 5e-3, "boxes": 5e-3, "scores": 1e-4, "masks": 10}
    for name, value in report.items():
        assert value <= limits[name.split()[0]], (name, value)


def compare(expected, actual):
    """Distances of two models' outputs, by name."""
    features, proposals, results, losses, training = zip(expected, actual, strict=True)
    assert losses[0].keys() == losses[1].keys()
    report = {f"loss {k}": abs(losses[1][k] / losses[0][k] - 1).item() for k in losses[0]}
    report |= {f"features {k}": relative_error(features[1][k], features[0][k]) for k in features[0]}
    pairs = [*zip(*proposals, strict=True), *zip(*training, strict=True)]
    for i, (theirs, ours) in enumerate(pairs):
        a, b = theirs.proposal_boxes.tensor, ours.proposal_boxes.tensor
        assert a.shape == b.shape
        # One proposal in a hundred may differ: nearly equal scores change places, or NMS keeps the other.
        nearest = (a[:, None] - b[None]).abs().amax(2).amin(1)
        report[f"proposals {i}"] = nearest.quantile(0.99).item()
    for i, (theirs, ours) in enumerate(zip(*results, strict=True)):
        order = d2.matched(ours, theirs, 5e-3)
        assert len(order) > 10
        report[f"boxes {i}"] = (ours.pred_boxes.tensor[order] - theirs.pred_boxes.tensor).abs().max().item()
        report[f"scores {i}"] = (ours.scores[order] - theirs.scores).abs().max().item()
        report[f"masks {i}"] = (ours.pred_masks[order] != theirs.pred_masks).flatten(1).sum(1).max().item()
    return report
