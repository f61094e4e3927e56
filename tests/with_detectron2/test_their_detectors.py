"""The Detectron2 configs of Cascade and RetinaNet against the native ones: same weights, same results."""

import pytest
import torch
from support.paths import CONFIGS

from mimdet.config import instantiate, load
from mimdet.testing import tiny_config
from mimdet.testing.small import SIZES, target

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import instantiate as their_instantiate
from detectron2.utils.events import EventStorage
from support import detectron2_testing as d2

from mimdet.detectron2.config import load_config

OTHER_DETECTORS = ("mimdet_b_cascade_mask_rcnn", "mimdet_l_cascade_mask_rcnn", "mimdet_b_retinanet")

ABLATIONS = [f"ablations/{path.stem}" for path in sorted((CONFIGS / "detectron2" / "ablations").glob("*.py"))]


def test_every_ablation_has_a_counterpart_but_the_passes_which_are_native_alone():
    native = {f"ablations/{path.stem}" for path in (CONFIGS / "ablations").glob("*.py")}
    assert native - set(ABLATIONS) == {"ablations/table4_ensemble"}


@pytest.mark.parametrize("name", ["mimdet_b_mask_rcnn", "mimdet_l_mask_rcnn", *OTHER_DETECTORS, *ABLATIONS])
def test_full_size_has_the_native_keys(name):
    with torch.device("meta"):
        native = instantiate(load(f"configs/{name}.py").model)
        theirs = their_instantiate(load_config(f"configs/detectron2/{name}.py").model)
    ours, others = ({k: v.shape for k, v in m.state_dict().items()} for m in (native, theirs))
    assert ours == others


@pytest.mark.parametrize("name", OTHER_DETECTORS)
def test_both_forms_agree(name):
    native = instantiate(tiny_config(name).model)
    theirs = their_instantiate(d2.tiny(name).model)
    heads = theirs.head if name.endswith("retinanet") else theirs.roi_heads
    assert type(heads).__module__.startswith("detectron2.modeling.")
    d2.fill_module(native)
    theirs.load_state_dict(native.state_dict(), strict=True)
    batch = d2.inputs()
    with torch.no_grad():
        expected = native.eval()([x["image"] for x in batch])
        results = [x["instances"] for x in theirs.eval()(batch)]
    d2.assert_same_detections(results, expected, least=10)


@pytest.mark.parametrize("name", OTHER_DETECTORS)
def test_losses_of_a_training_step(name):
    """Detectron2 draws other proposals, so only names and finiteness are compared."""
    model = their_instantiate(d2.tiny(name).model)
    with EventStorage(0):
        losses = model.train()(d2.inputs())
    sum(losses.values()).backward()
    native = instantiate(tiny_config(name).model).train()
    truth = [target(21 + i, size, count) for i, (size, count) in enumerate(zip(SIZES, (3, 5), strict=True))]
    assert losses.keys() == native([x["image"] for x in d2.inputs()], truth).keys()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
