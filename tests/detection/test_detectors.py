"""Small counterparts of the shipped detectors, the ablations' too, from training to a drawing."""

import json

import pytest
import torch
from PIL import Image
from support.paths import CONFIGS

from mimdet.checkpoint.read import read_checkpoint
from mimdet.config import LazyCall, instantiate, load, to_yaml
from mimdet.data import RandomFlip, ResizeShortestEdge
from mimdet.data.synthetic import CLASSES, generate_shapes
from mimdet.engine import evaluate_only, train
from mimdet.predict import Predictor, predict_files
from mimdet.testing import tiny_config
from mimdet.testing.small import make_images, target

OTHER_DETECTORS = ("mimdet_b_cascade_mask_rcnn", "mimdet_l_cascade_mask_rcnn", "mimdet_b_retinanet")
DETECTORS = ("mimdet_b_mask_rcnn", *OTHER_DETECTORS)
ABLATIONS = sorted(f"ablations/{path.stem}" for path in (CONFIGS / "ablations").glob("*.py"))


def test_only_the_detector_differs_between_configs():
    cascade, plain = (load(f"configs/mimdet_l{kind}_mask_rcnn.py") for kind in ("_cascade", ""))
    dense, base = (load(f"configs/mimdet_b_{kind}.py") for kind in ("retinanet", "mask_rcnn"))
    assert to_yaml(cascade.model.backbone) == to_yaml(plain.model.backbone)
    assert to_yaml(cascade.optimizer) == to_yaml(plain.optimizer)
    assert to_yaml(dense.model.backbone.bottom_up) == to_yaml(base.model.backbone.bottom_up)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Generated images; ``instances_*.json`` with masks and ``boxes_*.json`` without."""
    root = generate_shapes(tmp_path_factory.mktemp("data") / "shapes", 4, 2, (64, 96))
    for split in ("train", "val"):
        content = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
        for annotation in content["annotations"]:
            del annotation["segmentation"], annotation["area"]
        (root / "annotations" / f"boxes_{split}.json").write_text(json.dumps(content))
    return root


def counterpart_on_shapes(name, shapes, output_dir):
    cfg = tiny_config(name)
    kind = "boxes" if name.endswith("retinanet") else "instances"
    for part, split in ((cfg.dataloader.train, "train"), (cfg.dataloader.test, "val")):
        part.dataset.json_file = str(shapes / "annotations" / f"{kind}_{split}.json")
        part.dataset.image_root = str(shapes / split)
        part.num_workers = 0
        part.mapper.augmentations = [LazyCall(ResizeShortestEdge)(short_edge_length=64, max_size=96)]
    cfg.dataloader.train.mapper.augmentations.append(LazyCall(RandomFlip)(horizontal=True))
    cfg.dataloader.train.total_batch_size = cfg.train.reference_batch_size = 2
    cfg.train.update(output_dir=str(output_dir), max_iter=2, device="cpu", log_period=1)
    return cfg


def names_of_losses(name):
    if name.endswith("retinanet"):
        return {"loss_cls", "loss_box_reg"}
    stages = [f"_stage{stage}" for stage in range(3)] if "cascade" in name else [""]
    of_boxes = {f"loss_{kind}{stage}" for kind in ("cls", "box_reg") for stage in stages}
    return {"loss_rpn_cls", "loss_rpn_loc", "loss_mask", *of_boxes}


@pytest.mark.parametrize("name", [*DETECTORS, *ABLATIONS])
def test_counterpart_trains_saves_loads_and_evaluates(name, shapes, tmp_path):
    cfg = counterpart_on_shapes(name, shapes, tmp_path / "run")
    cfg.train.init_checkpoint = ""
    trained = train(cfg)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [{k: v for k, v in line.items() if k.startswith("loss_")} for line in lines if "total_loss" in line]
    assert [set(each) for each in losses] == [names_of_losses(name)] * 2
    assert all(value is not None for each in losses for value in each.values()), "None is written for NaN"
    weights = tmp_path / "run" / "model_final.pth"
    scored = evaluate_only(load(tmp_path / "run" / "config.yaml", [f"train.init_checkpoint={weights}"]))
    tasks = {"bbox"} if name.endswith("retinanet") else {"bbox", "segm"}
    assert {task for task in scored if not task.endswith("_per_class")} == tasks
    if cfg.model.inference.ratio is None:  # else each evaluation draws its own samples
        assert str(scored) == str(trained)
    if name in OTHER_DETECTORS:
        assert_predicts(weights, shapes, tmp_path / "out", "segm" in tasks)


def assert_predicts(weights, shapes, output, with_masks):
    predictor = Predictor(None, weights, device="cpu", score_threshold=0.0)
    assert predictor.classes == list(CLASSES)
    content = read_checkpoint(weights)["model"]
    assert all(torch.equal(value, content[key]) for key, value in predictor.model.state_dict().items())
    # An untrained detector has no score above its threshold.
    for predicting in (predictor.model, *getattr(getattr(predictor.model, "roi_heads", None), "box_predictor", ())):
        predicting.test_score_thresh = 0.0
    report = predict_files([shapes / "val"], output, predictor, progress=False)
    assert len(report.drawings) == 2
    assert Image.open(report.drawings[0]).mode == "RGB"
    detections = json.loads(report.predictions.read_text())
    assert len(detections) > 20
    assert all(("segmentation" in each) == with_masks for each in detections)


@pytest.mark.parametrize("name", DETECTORS)
def test_every_parameter_learns_under_autocast(name):
    """DDP needs gradients of all parameters, also for an image without objects."""
    model = instantiate(tiny_config(name).model).train()
    truth = target(5, (64, 96), 2)
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": []}
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(make_images([(64, 96), (48, 64)]), [truth, empty])
    assert all(loss.dtype == torch.float32 and bool(loss.isfinite()) for loss in losses.values())
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(("name", "mode"), [("mimdet_b_mask_rcnn", "packed"), ("mimdet_b_retinanet", "canvas")])
def test_twenty_steps_twice_from_one_seed_are_the_same_bits(name, mode, shapes, tmp_path):
    weights = []
    for run in ("first", "second"):
        cfg = counterpart_on_shapes(name, shapes, tmp_path / run)
        cfg.model.backbone.bottom_up.batch_mode = mode
        cfg.train.update(max_iter=20)
        cfg.dataloader.evaluator = None
        train(cfg)
        weights.append(torch.load(tmp_path / run / "model_final.pth", weights_only=True)["model"])
    assert [key for key in weights[0] if not torch.equal(weights[0][key], weights[1][key])] == []
