"""The native detectors behind Detectron2's interface, against Detectron2's own heads on the same backbone."""

from contextlib import ExitStack
from unittest import mock

import numpy as np
import pytest
import torch
from support.relative_error import relative_error
from support.small_mimdet import SIZES
from torch.nn.utils.rnn import pad_sequence

from mimdet.bench.experiments.detectron2 import equal_tokens
from mimdet.config import LazyCall as L
from mimdet.detection.rpn import Proposals
from mimdet.testing import fixed_noise, tiny_overrides

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.engine import SimpleTrainer
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks, RotatedBoxes
from detectron2.utils.events import EventStorage
from support import detectron2_testing as d2

from mimdet.detectron2 import NativeGeneralizedRCNN, NativeRetinaNet, load_config, use_fast_step

NAMES = ("mimdet_b_mask_rcnn", "mimdet_b_cascade_mask_rcnn", "mimdet_b_retinanet")
COUNTS = (3, 5)


def config(name="mimdet_b_mask_rcnn", *overrides):
    tiny = [o.replace("=false", "=False") for o in tiny_overrides(name)]
    return load_config(f"detectron2/{name}", [*tiny, "model.backbone.bottom_up.encoder.dpr=0.0", *overrides])


def pair(name, *overrides):
    """Detectron2's detector and ours, with the same weights, which ``outputs`` restores."""
    cfg = config(name, *overrides)
    theirs = instantiate(cfg.model)
    d2.fill_module(theirs)
    if hasattr(theirs, "head"):
        theirs.head.cls_score.weight.data.mul_(0.1)  # else most scores are 1, and their order is that of rounding
    use_fast_step(cfg.model)
    ours = instantiate(cfg.model)
    for model in (theirs, ours):
        model.weights = {name: value.clone() for name, value in theirs.state_dict().items()}
        model.load_state_dict(model.weights, strict=True)
    return theirs, ours


@pytest.fixture(scope="module", params=NAMES)
def detectors(request):
    return pair(request.param)


@pytest.fixture
def mask_rcnn():
    return pair("mimdet_b_mask_rcnn")[1]


def batch(case):
    """Two images: with polygons, with bitmaps, and without objects in the first or in both, which then have no masks,
    as from Detectron2's mapper."""
    inputs = d2.inputs()
    empty = {"one_empty": [0], "all_empty": [0, 1]}.get(case, [])
    for i, x in enumerate(inputs):
        size = x["instances"].image_size
        if i in empty:
            none = torch.zeros(0, dtype=torch.int64)
            x["instances"] = Instances(size, gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=none)
        elif case == "bitmasks":
            x["instances"].gt_masks = BitMasks.from_polygon_masks(x["instances"].gt_masks, *size)
    return inputs


def outputs(model, inputs, shared=None):
    """Losses, gradients, detections and proposals; the ROI heads see the proposals ``shared``, if given.

    Tokens are drawn alike, and the first anchors and proposals are the candidates. The order of nearly equal scores
    depends on rounding, and so would the candidates that are drawn from them.
    """
    seen, native = [], isinstance(model, (NativeGeneralizedRCNN, NativeRetinaNet))

    def share(module, args, result):
        proposals, losses = result
        if not native:
            seen.append([(p.proposal_boxes.tensor, p.objectness_logits) for p in proposals])
            return None
        seen.append([(boxes[valid],) for boxes, valid in zip(*proposals, strict=True)])
        boxes = [boxes for boxes, _ in shared[len(seen) - 1]]
        slots = pad_sequence(boxes, batch_first=True)
        counts = torch.tensor([[len(b)] for b in boxes])
        return Proposals(slots, torch.arange(slots.shape[1]) < counts), losses

    model.load_state_dict(model.weights)  # statistics of norms move in training
    with ExitStack() as stack:
        stack.enter_context(equal_tokens())
        stack.enter_context(mock.patch.object(torch, "randperm", lambda n, **options: torch.arange(n, **options)))
        if hasattr(model, "proposal_generator"):
            handle = model.proposal_generator.register_forward_hook(share)
            stack.callback(handle.remove)
            if native:
                cells = sum(-(-224 // s) * -(-320 // s) for s in (4, 8, 16, 32, 64))
                slots = model.proposal_generator.post_nms_topk[0] + max(COUNTS)
                noise = {"anchors": torch.zeros(2, 3 * cells), "proposals": torch.zeros(2, slots)}
                stack.enter_context(fixed_noise(model, **noise))
        with torch.no_grad():
            detections = [x["instances"] for x in model.eval()(inputs)]
        with EventStorage(0):
            losses = model.train()(inputs)
    model.zero_grad()
    sum(losses.values()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return losses, gradients, detections, seen


@pytest.mark.parametrize("case", ["polygons", "bitmasks", "one_empty", "all_empty"])
def test_losses_gradients_and_detections_are_detectron2s(detectors, case):
    theirs, ours = detectors
    losses, gradients, detections, proposals = outputs(theirs, batch(case))
    our_losses, our_gradients, our_detections, our_proposals = outputs(ours, batch(case), proposals)
    assert our_losses.keys() == losses.keys()
    for name, loss in losses.items():
        assert our_losses[name].item() == pytest.approx(loss.item(), rel=1e-5), name
    assert our_gradients.keys() == gradients.keys()
    errors = {name: gradient_error(our_gradients[name], gradients[name]) for name in gradients}
    assert np.median(list(errors.values())) < 1e-4
    assert max(errors.values()) < 1e-2, errors  # rounding switches ReLUs near 0
    for mine, expected in zip(our_detections, detections, strict=True):
        order = d2.matched(d2.boxes_and_classes(mine), d2.boxes_and_classes(expected), 1e-3)
        assert len(order) > 10
        torch.testing.assert_close(mine.scores[order], expected.scores, atol=1e-5, rtol=0)
        assert mine.get_fields().keys() == expected.get_fields().keys()
        assert mine.image_size == expected.image_size
        if expected.has("pred_masks"):
            assert mine.pred_masks.dtype == expected.pred_masks.dtype
            assert (mine.pred_masks[order] != expected.pred_masks).flatten(1).sum(1).max() <= 3


def gradient_error(actual, expected):
    """Relative; a gradient that is only rounding, of a bias before a norm, counts as one of norm 1."""
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-4)).item()


def test_proposals_are_detectron2s(detectors):
    """Nearly equal scores may change places."""
    theirs, ours = detectors
    if not hasattr(ours, "proposal_generator"):
        pytest.skip("RetinaNet proposes nothing")
    proposals = outputs(theirs, batch("polygons"))[-1]
    own = outputs(ours, batch("polygons"), proposals)[-1]
    for mine, expected in zip(sum(own, []), sum(proposals, []), strict=True):
        assert len(mine[0]) == len(expected[0])
        assert torch.cdist(expected[0], mine[0], p=torch.inf).amin(1).quantile(0.95) < 1e-3


def test_weights_go_both_ways_through_detectron2s_checkpointer(detectors, tmp_path, caplog):
    theirs, ours = detectors
    for source, target in ((theirs, ours), (ours, theirs)):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.add_(torch.randn_like(parameter))
        DetectionCheckpointer(source, str(tmp_path)).save("model")
        DetectionCheckpointer(target).load(str(tmp_path / "model.pth"))
        assert source.state_dict().keys() == target.state_dict().keys()
        for name, value in source.state_dict().items():
            assert torch.equal(value, target.state_dict()[name]), name
    assert "not found" not in caplog.text


def test_results_are_of_height_and_width(detectors):
    """As Detectron2 scales them; without postprocessing they are those of the model's images."""
    inputs = [{**x, "height": 2 * x["height"], "width": 3 * x["width"]} for x in d2.inputs()]
    found = []
    for model in detectors:
        model.load_state_dict(model.weights)
        with torch.no_grad():
            found.append([x["instances"] for x in model.eval()(inputs)])
    for expected, mine in zip(*found, strict=True):
        order = d2.matched(d2.boxes_and_classes(mine), d2.boxes_and_classes(expected), 5e-3)
        assert mine.image_size == expected.image_size in ((448, 960), (300, 900))
        assert not mine.has("pred_masks") or mine.pred_masks[order].shape == expected.pred_masks.shape


def test_inference_without_postprocessing(mask_rcnn):
    theirs, ours = pair("mimdet_b_mask_rcnn")
    with torch.no_grad():
        expected = theirs.eval().inference(d2.inputs(), do_postprocess=False)
        results = ours.eval().inference(d2.inputs(), do_postprocess=False)
    for one, other in zip(results, expected, strict=True):
        order = d2.matched(d2.boxes_and_classes(one), d2.boxes_and_classes(other), 1e-3)
        torch.testing.assert_close(one.pred_masks[order], other.pred_masks, atol=1e-4, rtol=0)
    with pytest.raises(NotImplementedError, match="takes no detected_instances: build the model without use_fast_step"):
        ours.inference(d2.inputs(), expected)
    with pytest.raises(RuntimeError, match=r"call model\.eval"):
        ours.train().inference(d2.inputs())


def test_large_scale_jitter_scales_by_one_factor():
    found = []
    for model in pair("benchmarking_b_25ep") if False else pair("mimdet_b_mask_rcnn", "model.lsj_postprocess=True"):
        inputs = [
            {"image": torch.nn.functional.pad(d2.inputs()[0]["image"], (0, 0, 0, 96)), "height": 448, "width": 640}
        ]
        with torch.no_grad():
            found.append(model.eval()(inputs)[0]["instances"])
    expected, mine = found
    order = d2.matched(d2.boxes_and_classes(mine), d2.boxes_and_classes(expected), 1e-3)
    assert len(order) > 5
    assert (mine.pred_masks[order] != expected.pred_masks).flatten(1).sum(1).max() <= 3
