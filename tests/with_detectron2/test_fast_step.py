"""The native detectors behind Detectron2's interface, against Detectron2's own heads on the same backbone."""

import inspect
import json
from contextlib import ExitStack, suppress
from itertools import chain
from unittest import mock

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from support.no_sync import NoSync
from support.paths import ROOT
from torch.nn.utils.rnn import pad_sequence

from mimdet.bench.experiments.detectron2 import equal_tokens
from mimdet.bench.fake_gpu import backward, fake_gpu, to_fake_gpu
from mimdet.config import LazyCall as L
from mimdet.config.lazy import TARGET
from mimdet.detection.rpn import Proposals
from mimdet.testing import fixed_noise, tiny_config
from mimdet.testing.small import SIZES

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import detectron2.data.transforms as T
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.engine import SimpleTrainer
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.roi_heads import KRCNNConvDeconvUpsampleHead
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks, RotatedBoxes
from detectron2.utils.events import EventStorage
from support import detectron2_testing as d2

from mimdet.detectron2 import NativeGeneralizedRCNN, NativeRetinaNet, fast_step, use_fast_step

NAMES = ("mimdet_b_mask_rcnn", "mimdet_b_cascade_mask_rcnn", "mimdet_b_retinanet")
COUNTS = (3, 5)


def config(name="mimdet_b_mask_rcnn", *overrides):
    return d2.tiny(name, "model.backbone.bottom_up.encoder.dpr=0.0", *overrides)


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
    for mine, expected in zip(chain(*our_proposals), chain(*proposals), strict=True):
        # Nearly equal scores may change places.
        assert len(mine[0]) == len(expected[0])
        assert torch.cdist(expected[0], mine[0], p=torch.inf).amin(1).quantile(0.95) < 1e-3
    assert our_losses.keys() == losses.keys()
    for name, loss in losses.items():
        assert our_losses[name].item() == pytest.approx(loss.item(), rel=1e-5), name
    assert our_gradients.keys() == gradients.keys()
    # Rounding switches a ReLU near 0 here and there, which changes the gradients of the layers before it.
    errors = {name: gradient_error(our_gradients[name], gradients[name]) for name in gradients}
    assert np.quantile(list(errors.values()), 0.25) < 1e-4
    assert max(errors.values()) < 1e-2, errors
    d2.assert_same_detections(our_detections, detections, 1e-3, scores=1e-5, pixels=3, least=10)
    for mine, expected in zip(our_detections, detections, strict=True):
        assert mine.get_fields().keys() == expected.get_fields().keys()
        assert mine.image_size == expected.image_size
        assert not mine.has("pred_masks") or mine.pred_masks.dtype == expected.pred_masks.dtype


def gradient_error(actual, expected):
    """Relative; a gradient that is only rounding, of a bias before a norm, counts as one of norm 1."""
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-4)).item()


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
    results = []
    for model in detectors:
        model.load_state_dict(model.weights)
        with torch.no_grad():
            results.append([x["instances"] for x in model.eval()(inputs)])
    for expected, mine in zip(*results, strict=True):
        order = d2.matched(mine, expected, 5e-3)
        assert mine.image_size == expected.image_size in ((448, 960), (300, 900))
        assert not mine.has("pred_masks") or mine.pred_masks[order].shape == expected.pred_masks.shape


def test_inference_without_postprocessing(mask_rcnn):
    theirs, ours = pair("mimdet_b_mask_rcnn")
    with torch.no_grad():
        expected = theirs.eval().inference(d2.inputs(), do_postprocess=False)
        results = ours.eval().inference(d2.inputs(), do_postprocess=False)
    for one, other in zip(results, expected, strict=True):
        order = d2.matched(one, other, 1e-3)
        torch.testing.assert_close(one.pred_masks[order], other.pred_masks, atol=1e-4, rtol=0)
    with pytest.raises(NotImplementedError, match="takes no detected_instances: build the model without use_fast_step"):
        ours.inference(d2.inputs(), expected)
    with pytest.raises(RuntimeError, match=r"call model\.eval"):
        ours.train().inference(d2.inputs())


def test_large_scale_jitter_scales_by_one_factor():
    image = torch.nn.functional.pad(d2.inputs()[0]["image"], (0, 0, 0, 96))
    inputs, results = [{"image": image, "height": 448, "width": 640}], []
    for model in pair("mimdet_b_mask_rcnn", "model.lsj_postprocess=True"):
        with torch.no_grad():
            results.append(model.eval()(inputs)[0]["instances"])
    theirs, ours = results
    d2.assert_same_detections([ours], [theirs], 1e-3, pixels=3, least=5)


def images_of_the_sample():
    root = d2.folder("MIMDET_COCO_SAMPLE")
    content = json.loads((root / "annotations" / "instances_val2017.json").read_text())
    mapper = DatasetMapper(
        is_train=False, augmentations=[T.ResizeShortestEdge(128, 320)], image_format="RGB", use_instance_mask=True
    )
    records = content["images"][:4]
    inputs = [
        mapper({"file_name": str(root / "val2017" / r["file_name"]), "image_id": r["id"], **sizes(r)}) for r in records
    ]
    kept = {r["id"] for r in records}
    return inputs, {
        **content,
        "images": records,
        "annotations": [a for a in content["annotations"] if a["image_id"] in kept],
    }


def sizes(record):
    return {"height": record["height"], "width": record["width"]}


def evaluate(model, inputs, content, folder):
    """AP by Detectron2's evaluator against the ground truth ``content`` in COCO's format."""
    name = f"fast_step_{len(list(folder.iterdir()))}"
    file = folder / f"{name}.json"
    file.write_text(json.dumps(content))
    ids = [category["id"] for category in content["categories"]]
    MetadataCatalog.get(name).set(
        json_file=str(file),
        thing_dataset_id_to_contiguous_id={i: n for n, i in enumerate(ids)},
        thing_classes=[category["name"] for category in content["categories"]],
    )
    evaluator = COCOEvaluator(name, tasks=("bbox", "segm"), output_dir=str(folder / name), use_fast_impl=False)
    results = inference_on_dataset(model, [[x] for x in inputs], evaluator)
    rows = json.loads((folder / name / "coco_instances_results.json").read_text())
    return {task: results[task]["AP"] for task in ("bbox", "segm")}, rows


def test_ap_by_detectron2s_evaluator_on_the_sample(tmp_path):
    """Weights are random: AP on the annotations is nearly 0; on Detectron2's detections as ground truth it is 100."""
    inputs, content = images_of_the_sample()
    theirs, ours = pair("mimdet_b_mask_rcnn")
    expected, results = evaluate(theirs, inputs, content, tmp_path)
    actual, _ = evaluate(ours, inputs, content, tmp_path)
    assert actual == pytest.approx(expected, abs=1e-3)
    rows = [{**row, "id": i, "iscrowd": 0, "area": row["bbox"][2] * row["bbox"][3]} for i, row in enumerate(results, 1)]
    assert len(rows) > 20
    imitated = {**content, "annotations": rows}
    for model in (theirs, ours):
        for task, ap in evaluate(model, inputs, imitated, tmp_path)[0].items():
            assert ap > 99.9, (task, ap)


def test_steps_of_detectron2s_trainer(mask_rcnn):
    """Its SimpleTrainer needs no more than losses."""
    optimizer = torch.optim.SGD(mask_rcnn.parameters(), lr=1e-4)
    trainer = SimpleTrainer(
        mask_rcnn.train(), [batch("polygons"), batch("one_empty"), batch("all_empty")] * 2, optimizer
    )
    before = [p.clone() for p in mask_rcnn.parameters()]
    trainer.train(0, 4)
    latest = trainer.storage.latest()
    assert latest["loss_mask"][0] >= 0
    assert {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "total_loss"} <= latest.keys()
    assert sum(not torch.equal(a, b) for a, b in zip(before, mask_rcnn.parameters(), strict=True)) > 50


@pytest.mark.parametrize("name", NAMES)
def test_autocast_trains(name):
    d2.assert_autocast_trains(pair(name)[1], batch("one_empty"), rel=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_never_waits_for_the_gpu(name):
    ours = pair(name)[1].train()
    with fake_gpu(), NoSync():
        to_fake_gpu(ours)
        backward(sum(ours(batch("one_empty")).values()))


def test_attributes_that_tools_read(detectors):
    theirs, ours = detectors
    assert (ours.device, ours.input_format, ours.vis_period) == (theirs.device, "RGB", 0)
    images, expected = ours.preprocess_image(d2.inputs()), theirs.preprocess_image(d2.inputs())
    assert torch.equal(images.tensor, expected.tensor)
    assert images.image_sizes == expected.image_sizes == SIZES
    heads = ("head", "anchor_generator") if hasattr(ours, "head") else ("proposal_generator", "roi_heads")
    assert all(isinstance(getattr(ours, part), torch.nn.Module) for part in ("backbone", *heads))


@pytest.mark.parametrize(
    ("theirs", "ours", "losses"),
    [("mask_rcnn_fpn", "mask_rcnn", 5), ("cascade_rcnn", "mask_rcnn", 9), ("retinanet", "retinanet", 2)],
)
def test_five_lines_of_the_docs_in_a_config_of_detectron2(tmp_path, theirs, ours, losses):
    lines = (ROOT / "docs" / "detectron2.md").read_text().split("```python\n")[1].partition("```")[0]
    assert len([line for line in lines.splitlines() if line]) == 5
    lines = lines.replace("mimdet_b_mask_rcnn", f"mimdet_b_{ours}")
    cfg = LazyConfig.load(d2.beside_common(tmp_path, theirs, lines))
    assert cfg.dataloader.test.mapper.image_format == "RGB"
    model = d2.small(cfg)
    assert isinstance(model, (NativeGeneralizedRCNN, NativeRetinaNet))
    assert len(model.train()(d2.inputs())) == losses


def test_the_section_becomes_native_and_stays_so():
    cfg = config()
    use_fast_step(cfg.model)
    once = OmegaConf.to_yaml(cfg.model)
    use_fast_step(cfg.model)
    assert OmegaConf.to_yaml(cfg.model) == once
    assert cfg.model._target_ is NativeGeneralizedRCNN
    assert "detectron2.modeling" not in once
    assert cfg.model.backbone.bottom_up._target_.endswith("MIMDetBackbone")


def test_a_native_config_becomes_one_for_detectron2s_trainer():
    model = tiny_config("mimdet_b_mask_rcnn").model
    use_fast_step(model)
    assert isinstance(instantiate(model), NativeGeneralizedRCNN)


def test_what_detectron2_alone_has_goes_where_it_changes_nothing():
    """And what a config leaves out keeps Detectron2's default."""
    model = config().model
    model.vis_period = 0
    model.roi_heads.train_on_pred_boxes = False
    model.roi_heads.box_predictor.loss_weight = 1.0
    model.backbone.fuse_type = "sum"
    model.proposal_generator.box_reg_loss_type = "smooth_l1"
    model.backbone.top_block = L(LastLevelP6P7)(in_channels=16, out_channels=16)
    use_fast_step(model)
    assert "vis_period" not in model
    assert "loss_weight" not in model.roi_heads.box_predictor
    assert model.backbone.top_block.in_feature == "res5"


def test_shared_arguments_have_one_default_or_detectron2s_is_written():
    for theirs, ours in fast_step._counterparts().items():
        if not isinstance(theirs, type):
            continue
        node = OmegaConf.create(flags={"allow_objects": True})
        node.update({TARGET: theirs})
        conversion = fast_step._Conversion()
        with suppress(Exception):
            conversion._call(node, "x")
        for change in conversion.changes:
            change()
        empty = inspect.Parameter.empty
        mine = fast_step._parameters(ours)
        for key, parameter in fast_step._parameters(theirs).items():
            if key in mine and empty not in (parameter.default, mine[key].default):
                assert node.get(key, mine[key].default) == parameter.default, (theirs, key)


@pytest.mark.parametrize(
    ("norm", "name"),
    [
        (lambda c: NaiveSyncBatchNorm(c, stats_mode="N"), "naiveSyncBN_N"),  # as in the original's configs
        (lambda c: NaiveSyncBatchNorm(c), "naiveSyncBN"),
        (torch.nn.BatchNorm2d, "BN"),
        ("SyncBN", "naiveSyncBN_N"),  # it weighs every process by its rows
        ("GN", "GN"),
        (None, None),
    ],
)
def test_norms_of_heads(norm, name):
    model = config().model
    model.roi_heads.mask_head.conv_norm = norm
    use_fast_step(model)
    assert model.roi_heads.mask_head.conv_norm == name


class CustomHead(torch.nn.Module):
    """A head of a user."""


def test_all_parts_without_a_counterpart_are_named_and_nothing_changes():
    model = config().model
    model.vis_period = 20
    heads = model.roi_heads
    heads.box_head._target_ = CustomHead
    heads.box_predictor.use_fed_loss = True
    heads.box_predictor.box_reg_loss_type = "giou"
    heads.keypoint_head = L(KRCNNConvDeconvUpsampleHead)(num_keypoints=17)
    heads.mask_head.num_classes = 1
    heads.proposal_matcher._target_ = "my_project.Matcher"
    heads.mask_head.conv_norm = "FrozenBN"
    heads.box_pooler.pooler_type = "ROIAlign"
    model.proposal_generator.loss_weight = {"loss_rpn_cls": 1.0, "loss_rpn_loc": 2.0}
    model.backbone.bottom_up = L(ResNet)(stem=None)
    before = OmegaConf.to_yaml(model)
    with pytest.raises(ValueError, match="the native step has no counterpart of") as error:
        use_fast_step(model)
    lines = str(error.value).splitlines()
    for start in (
        "model.vis_period (20): NativeGeneralizedRCNN has no such argument",
        f"model.roi_heads.box_head ({__name__}.CustomHead): no native class",
        "model.roi_heads.box_predictor.use_fed_loss (True)",
        "model.roi_heads.box_predictor.box_reg_loss_type (giou)",
        "model.roi_heads.keypoint_head (detectron2.modeling.roi_heads.keypoint_head.KRCNNConvDeconvUpsampleHead)",
        "model.roi_heads.mask_head (",
        "model.roi_heads.mask_head.conv_norm (FrozenBN): the norms are BN",
        "model.roi_heads.box_pooler.pooler_type (ROIAlign): the pooler is ROIAlignV2",
        "model.proposal_generator.loss_weight",
        "model.roi_heads.proposal_matcher (my_project.Matcher): no native class",
        "model.backbone.bottom_up (detectron2.modeling.backbone.resnet.ResNet): no native class",
    ):
        assert sum(line.strip().startswith(start) for line in lines) == 1, (start, lines)
    assert len(lines) == 13
    assert "train without use_fast_step" in lines[-1]
    assert OmegaConf.to_yaml(model) == before


def test_a_detector_without_masks_has_no_counterpart():
    model = config().model
    for key in ("mask_in_features", "mask_pooler", "mask_head"):
        del model.roi_heads[key]
    with pytest.raises(ValueError, match=r"model.roi_heads \(.*StandardROIHeads\) without mask_head"):
        use_fast_step(model)


def test_what_is_not_a_model_section(mask_rcnn):
    for value, message in (
        (CfgNode({"MODEL": {}}), "a CfgNode of a YAML config"),
        (mask_rcnn, "a NativeGeneralizedRCNN that is built; call it on cfg.model before instantiate"),
        (config(), "a whole config; pass cfg.model"),
        (OmegaConf.create({"a": 1}), "a section without _target_"),
        ("mask_rcnn.py", "str; it needs the model section"),
    ):
        with pytest.raises(TypeError, match=f"use_fast_step got {message}"):
            use_fast_step(value)


def spoiled(**fields):
    """The first image's ground truth with other fields; None removes one."""
    inputs = batch("polygons")
    for name, value in fields.items():
        inputs[0]["instances"].remove(name) if value is None else inputs[0]["instances"]._fields.update({name: value})
    return inputs


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (lambda: [{"image": x["image"]} for x in d2.inputs()], r"batched_inputs\[0\] has no 'instances'"),
        (lambda: [{"file_name": "a.jpg"}], r"batched_inputs\[0\] has no 'image', only file_name"),
        (lambda: spoiled(gt_masks=None), r"gt_masks is missing.*use_instance_mask=True"),
        (lambda: spoiled(gt_masks=torch.zeros(3, 8, 8)), "gt_masks must be PolygonMasks or BitMasks, got Tensor"),
        (lambda: spoiled(gt_boxes=None), "has no gt_boxes, only gt_classes, gt_masks"),
        (lambda: spoiled(gt_boxes=RotatedBoxes(torch.zeros(3, 5))), "gt_boxes must be Boxes, got RotatedBoxes"),
        (lambda: spoiled(gt_masks=PolygonMasks([[np.zeros(6)]] * 2)), "3 boxes, labels of shape .*, 2 masks"),
        (lambda: spoiled(gt_masks=PolygonMasks([[np.full(6, np.nan)]] * 3)), r"\['masks'\]\[0\]\[0\] holds NaN"),
        (lambda: spoiled(gt_classes=torch.tensor([0, 1, 80])), "the model has classes 0..79"),
    ],
)
def test_malformed_inputs(mask_rcnn, inputs, message):
    with pytest.raises((TypeError, ValueError), match=message):
        mask_rcnn.train()(inputs())


def test_packed_detections_are_those_of_the_image_alone():
    cfg = config("mimdet_b_mask_rcnn", "model.backbone.bottom_up.batch_mode=packed")
    use_fast_step(cfg.model)
    model = instantiate(cfg.model).eval()
    d2.fill_module(model)
    inputs = d2.inputs()
    with torch.no_grad():
        together, alone = model(inputs), [model([x])[0] for x in inputs]
    assert inputs[0]["image"].shape != inputs[1]["image"].shape
    for actual, expected in zip(together, alone, strict=True):
        actual, expected = actual["instances"], expected["instances"]
        assert len(actual) == len(expected) > 0
        assert torch.equal(actual.pred_classes, expected.pred_classes)
        assert torch.allclose(actual.scores, expected.scores, atol=2e-5)
        assert (actual.pred_boxes.tensor - expected.pred_boxes.tensor).abs().max() <= 2e-3
