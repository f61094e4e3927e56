"""``mimdet bench detectron2``: on tiny detectors of ours in the place of Detectron2's, and on the original."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torchvision

from mimdet.bench import measure, operations, workload
from mimdet.bench.compare import compare
from mimdet.bench.experiments import detectron2
from mimdet.bench.operations import Dispatches
from mimdet.bench.plot import plot
from mimdet.bench.readme import render
from mimdet.bench.row import Results
from mimdet.engine.model import build_model
from mimdet.testing import tiny_config


@pytest.fixture
def options(tmp_path):
    return partial(
        detectron2.Options, device="cpu", original=tmp_path, output=tmp_path / "f.json", size=(64, 64), rounds=3
    )


@pytest.fixture
def fakes(monkeypatch):
    """Detectors that ``build`` returns, with equal weights: all are ours, tiny."""
    setting = workload.Setting(device="cpu", size=(64, 64))
    cfg = tiny_config("mimdet_b_mask_rcnn")
    images, targets = workload.random_batch(1, setting.size, cfg.model.roi_heads.num_classes, "cpu")
    detectors = {}
    for name in ("original", "ours-detectron2", "ours-fast-step", "ours"):
        model = build_model(cfg, pretrained=False)
        workload.bottom_up(model).inference_sample_ratio = 0.5
        forward = partial(detectron2._run_ours, model, images, targets)
        detectors[name] = detectron2.Detector(model, forward, workload.idle_optimizer(model))
    detectron2.equalize(detectors)
    monkeypatch.setattr(detectron2, "build", lambda options: detectors)
    monkeypatch.setattr(workload, "peak_bytes", lambda step, device: 2**20)  # the profiler takes seconds
    return detectors


def test_rows_of_steps_and_components(fakes, options, tmp_path, capsys):
    implementations = ("ours", "original-sdpa")
    chosen = options(implementations=implementations)
    results = detectron2.run(chosen)
    rows = Results.read(chosen.output).rows
    assert rows == results.rows
    assert all(len(row["samples_ms"]) == 3 and row["experiment"] == "detectron2" for row in rows)
    steps = [row for row in rows if row["component"] == detectron2.STEP]
    trained = [row for row in steps if row["mode"] == "train"]
    assert [row["implementation"] for row in trained] == list(implementations)
    assert all(row["activation_mib"] > 0 and row["allocated_mib"] > 0 for row in trained)
    assert all(row["count"] > 500 and row["waits"] == 0 for row in trained)
    for mode in ("train", "inference"):
        present = {row["component"] for row in rows if row["mode"] == mode and row["implementation"] == "ours"}
        assert set(detectron2.COMPONENTS) <= present
    assert {"forward", "backward"} <= {row.get("direction") for row in rows if row["component"] == "pyramid"}
    assert "ours vs original-sdpa" in capsys.readouterr().out
    assert "| train, mask head, backward |" in render(results)
    plot(results, tmp_path / "f.png")
    assert len(compare(results, results)) == len(rows)


@pytest.fixture
def clock(monkeypatch):
    """Advance a simulated clock, which by itself moves by a microsecond."""
    now = [0.0]

    def advance(seconds):
        now[0] += seconds

    def look():
        advance(1e-6)
        return now[0]

    for module in (operations, measure):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=look))
    return advance


def test_a_slow_part_is_seen_in_its_component(fakes, options, clock):
    model = fakes["ours"].model
    model.proposal_generator.rpn_head.register_forward_hook(lambda *_: clock(1.0), prepend=True)
    predict = model.proposal_generator.predict_proposals
    model.proposal_generator.predict_proposals = lambda *args: (clock(2.0), predict(*args))[1]

    def slow_backward(module, args, logits):
        if logits.requires_grad:
            logits.grad_fn.register_hook(lambda *_: clock(4.0))

    model.roi_heads.mask_head.register_forward_hook(slow_backward)
    chosen = options(implementations=("ours", "original-sdpa-no-checkpoint"), modes=("train",))
    slow = {"RPN head, forward": 1000, "RPN proposals, forward": 2000, "whole step": 7000}
    slow[f"{detectron2.BACKWARD}, backward"] = 4000
    for row in detectron2.run(chosen).rows:
        place = ", ".join(row[name] for name in ("component", "direction") if name in row)
        expected = slow.get(place, 0) if row["implementation"] == "ours" else 0
        assert row["p50_ms"] == pytest.approx(expected, abs=50), row


def wrong_weights(model):
    model.roi_heads.box_head.fc1.weight.data *= 1.1


def wrong_masks(model):
    model.roi_heads.mask_head.register_forward_hook(lambda m, a, logits: logits if m.training else -logits)


def wrong_proposals(model):
    generator, real = model.proposal_generator, model.proposal_generator.predict_proposals

    def moved(*args):
        proposals = real(*args)
        return proposals._replace(boxes=proposals.boxes + 1)

    generator.predict_proposals = moved


def wrong_gradient(model):
    model.backbone.bottom_up.encoder.blocks[0].mlp.fc1.weight.register_hook(lambda gradient: 2 * gradient)


@pytest.mark.parametrize(
    ("name", "spoil", "difference"),
    [
        ("ours", wrong_weights, "loss_cls: relative error"),
        ("ours-detectron2", wrong_masks, "image 0: a mask differs by"),
        ("ours", wrong_proposals, "proposals are more than 0.01 pixels away"),
        ("ours-fast-step", wrong_gradient, "gradient of backbone: relative error"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_differs_is_not_timed(fakes, options, name, spoil, difference):
    spoil(fakes[name].model)
    chosen = options(rounds=0, modes=("inference",))
    with pytest.raises(ValueError, match=f"{name} differs from the original, so nothing was timed: .*{difference}"):
        detectron2.run(chosen)
    assert not chosen.output.exists()


def test_nothing_to_compare(fakes, options):
    for detector in fakes.values():
        detector.model.roi_heads.box_predictor.test_score_thresh = 1.0
    with pytest.raises(ValueError, match="the original detects nothing"):
        detectron2.run(options())


def test_beside_the_original(options, capsys):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from support import detectron2_testing as d2

    heads = (
        "model.proposal_generator.post_nms_topk=[40,20]",
        "model.roi_heads.batch_size_per_image=32",
        "model.roi_heads.box_head.conv_dims=[16]",
        "model.roi_heads.mask_head.conv_dims=[16,16]",
    )
    overrides = (*d2.ORIGINAL_SMALL, *heads)
    chosen = options(original=d2.folder("MIMDET_ORIGINAL"), overrides=overrides, size=(128, 160), modes=("train",))
    results = detectron2.run(chosen)
    seen = {(row["implementation"], row["component"]) for row in results.rows if row["mode"] == "train"}
    missing = [(i, c) for i in detectron2.IMPLEMENTATIONS for c in detectron2.COMPONENTS if (i, c) not in seen]
    assert not missing
    assert torch.isfinite(torch.tensor([row["p50_ms"] for row in results.rows])).all()
    steps = {row["implementation"]: row for row in results.rows if row["component"] == detectron2.STEP}
    assert [steps[name]["waits"] for name in ("ours", "ours-fast-step")] == [0, 0]
    assert min(steps[name]["waits"] for name in ("ours-detectron2", "original-sdpa")) > 20
    assert steps["ours-fast-step"]["count"] == pytest.approx(steps["ours"]["count"], rel=0.05)


@pytest.mark.parametrize(
    ("run", "operations", "waits"),
    [
        (lambda x: x + 1, 1, 0),
        (lambda x: x.view(4).t(), 0, 0),
        (lambda x: x.sum().item(), 2, 1),
        (lambda x: x.nonzero(), 1, 1),
        (lambda x: x[x > 0], 2, 1),
        (lambda x: x[torch.tensor([0])], 1, 0),
        (lambda x: x.index_put_((x > 0,), torch.zeros(())), 3, 0),
        (lambda x: torchvision.ops.nms(x.new_ones(1, 4), x.new_ones(1), 0.5), 3, 1),
    ],
)
def test_operations_and_waits(run, operations, waits):
    x = torch.arange(4.0)
    with Dispatches() as counted:
        run(x)
    assert (counted.operations, counted.waits) == (operations, waits)
