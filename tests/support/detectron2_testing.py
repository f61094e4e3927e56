"""Helpers of the tests with Detectron2, which is not a dependency: their files begin with ``pytest.importorskip``.

``MIMDET_ORIGINAL`` names a checkout of the original MIMDet, and ``MIMDET_COCO_SAMPLE`` a folder in COCO's layout
(annotations/, train2017/, val2017/); tests that need one are skipped without it.
"""

import os
import re
import sys
from pathlib import Path

import detectron2
import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from support.fill_weights import fill_module

from mimdet.bench import equality
from mimdet.bench.experiments.detectron2 import equal_tokens, make_importable
from mimdet.detectron2.config import load_config
from mimdet.testing import tiny_overrides
from mimdet.testing.small import SIZES, SMALL, make_images, target

BASE = "configs/detectron2/mimdet_b_mask_rcnn.py"
_BASE = "mimdet_vit_base_mask_rcnn_fpn_sr_0p5_800_1333_4xdec_coco_3x.py"
_LARGE = "mimdet_vit_large_mask_rcnn_fpn_sr_0p5_800_1333_4xdec_coco_3x.py"


def spelled(overrides):
    """Native overrides as Detectron2 reads them."""
    return [override.replace("=false", "=False") for override in overrides]


# The original repeats the encoder's width and checkpointing in its decoder.
ORIGINAL_SMALL = [
    *spelled(SMALL),
    "model.backbone.bottom_up.decoder.embed_dim=192",
    "model.backbone.bottom_up.decoder.checkpointing=False",
]


def folder(variable):
    """The folder that an environment variable names; the test is skipped without it."""
    if variable not in os.environ:
        pytest.skip(f"{variable} is not set")
    return Path(os.environ[variable])


def original_config(size="base"):
    """The original's own config file, and the modules that it imports on the path."""
    root = folder("MIMDET_ORIGINAL")
    make_importable(root)
    return LazyConfig.load(str(root / "configs" / "mimdet" / (_BASE if size == "base" else _LARGE)))


def hide_the_original(monkeypatch):
    """Its modules cannot be imported until the test ends, though another test has put them on the path."""
    for name in [name for name in sys.modules if name.split(".")[0] == "models"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "models", None)


def switched_config(scratch, size="base"):
    """The original's config files with their imports switched to ours and nothing else changed, as a path."""
    root = folder("MIMDET_ORIGINAL") / "configs"
    for file in (*root.glob("*.py"), *root.glob("mimdet/*.py")):
        text = re.sub(
            r"^from models(\.modeling)? import", "from mimdet.detectron2 import", file.read_text(), flags=re.M
        )
        copy = scratch / file.relative_to(root)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(text)
    return str(scratch / "mimdet" / (_BASE if size == "base" else _LARGE))


def small(cfg, overrides=SMALL):
    """A config's model at the size of ``mimdet.testing.small`` and with its weights."""
    cfg = LazyConfig.apply_overrides(cfg, spelled(overrides))
    model = instantiate(cfg.model)
    fill_module(model)
    return model


def tiny(name, *overrides):
    """The Detectron2 config of a shipped name, at the size of ``tiny_config``."""
    return load_config(f"detectron2/{name}", [*spelled(tiny_overrides(name)), *overrides])


def beside_common(folder, model, text):
    """A config file beside Detectron2's own ``common``, with its ``model`` of that name and its data, then ``text``."""
    common = Path(detectron2.__file__).parents[1] / "configs" / "common"
    if not common.is_dir():
        pytest.skip("this Detectron2 comes without its configs/")
    (folder / "common").symlink_to(common)
    file = folder / "mine.py"
    file.write_text(f"from .common.models.{model} import model\nfrom .common.data.coco import dataloader\n{text}")
    return str(file)


def inputs(sizes=SIZES, counts=(3, 5)):
    """A batch of images with ground truth in Detectron2's format."""
    batch = []
    for i, (size, image) in enumerate(zip(sizes, make_images(sizes, seed=11), strict=True)):
        truth = target(21 + i, size, counts[i])
        instances = Instances(size)
        instances.gt_boxes = Boxes(truth["boxes"])
        instances.gt_classes = truth["labels"]
        instances.gt_masks = PolygonMasks([[np.asarray(q, np.float64) for q in m] for m in truth["masks"]])
        batch.append({"image": image, "height": size[0], "width": size[1], "instances": instances})
    return batch


def set_ratio(model, ratio):
    """One keep ratio for training and evaluation, as the original has it."""
    model.backbone.bottom_up.sample_ratio = model.backbone.bottom_up.inference_sample_ratio = ratio


def outputs(model, batch, proposals=None):
    """Features, proposals and results in eval mode, then losses in train mode and their proposals, each from one seed.

    In training the ROI heads see ``proposals`` instead of the model's: the order of nearly equal scores depends on
    rounding, and so would the candidates drawn from them.
    """
    seen = {}
    hooks = [
        model.backbone.bottom_up.register_forward_hook(lambda m, a, out: seen.update(features=out)),
        model.proposal_generator.register_forward_hook(lambda m, a, out: seen.update(proposals=out[0])),
    ]
    torch.manual_seed(0)
    with equal_tokens(), torch.no_grad():
        results = model.eval()(batch)
    evaluated = seen["features"], seen["proposals"], [r["instances"] for r in results]
    if proposals is not None:
        hooks.append(model.proposal_generator.register_forward_hook(lambda m, a, out: (proposals, out[1])))
    torch.manual_seed(0)
    with equal_tokens(), torch.no_grad(), EventStorage(0):
        losses = model.train()(batch)
    for hook in hooks:
        hook.remove()
    return *evaluated, losses, seen["proposals"]


def fields(detections):
    """Detections under the native names; ``Instances`` have others."""
    if isinstance(detections, dict):
        return detections
    values = {name.removeprefix("pred_"): value for name, value in detections.get_fields().items()}
    return values | {"boxes": values["boxes"].tensor, "labels": values["classes"]}


def matched(actual, expected, tolerance):
    """``equality.matched``, of detections that must match."""
    pairs = [(each["boxes"], each["labels"]) for each in map(fields, (actual, expected))]
    order = equality.matched(*pairs, tolerance)
    assert order is not None, pairs
    return order


def assert_same_detections(results, expected, tolerance=5e-3, scores=1e-4, pixels=10, least=20):
    """Of each image, native or ``Instances``; those with nearly equal scores may change places."""
    for ours, theirs in zip(map(fields, results), map(fields, expected), strict=True):
        order = matched(ours, theirs, tolerance)
        assert len(order) > least
        torch.testing.assert_close(ours["scores"][order], theirs["scores"], atol=scores, rtol=0)
        assert ("masks" in ours) == ("masks" in theirs)
        if "masks" in theirs:
            assert (ours["masks"][order] != theirs["masks"]).flatten(1).sum(1).max() <= pixels


def assert_autocast_trains(model, batch, rel):
    """Mixed precision as on a GPU, in the dtype that a CPU has for it."""
    losses = {}
    for enabled in (False, True):
        torch.manual_seed(0)
        with EventStorage(0), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses[enabled] = sum(model.train()(batch).values())
    losses[True].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model.zero_grad()
    assert losses[True].item() == pytest.approx(losses[False].item(), rel=rel)
