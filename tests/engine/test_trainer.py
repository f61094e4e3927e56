import json
import os
import random
import signal

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from support.engine_fakes import LOSSES, FakeDetector, fake_config

from mimdet.checkpoint.read import CheckpointError, read_checkpoint
from mimdet.config import apply_overrides, from_yaml, load
from mimdet.engine import NonFiniteLossError, TrainingInterrupted, train, trainer
from mimdet.engine.resume import get_random_state, isolated_random, set_random_state
from mimdet.engine.runtime import build_fabric
from mimdet.engine.step import TrainStep


def run(tmp_path, name, *overrides, resume=False, overwrite=False, **options):
    cfg = apply_overrides(fake_config(tmp_path / name, **options), overrides)
    return train(cfg, resume=resume, overrides=overrides, overwrite=overwrite)


def losses(folder):
    """{iteration: losses, exactly} and {iteration: box AP} from metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = {line["iteration"]: [line[name] for name in LOSSES] for line in lines if "total_loss" in line}
    return steps, {line["iteration"]: line["bbox/AP"] for line in lines if "bbox/AP" in line}


def weights(path):
    return {key: value.clone() for key, value in read_checkpoint(path)["model"].items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]), key


@pytest.fixture
def act(monkeypatch):
    """act(n, f) calls f() in the detector's n-th training step of the test."""
    plan, count = {}, iter(range(10**6))
    forward = FakeDetector.forward

    def patched(self, *args, **kwargs):
        if self.training:
            plan.get(next(count), lambda: None)()
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(FakeDetector, "forward", patched)
    return plan.__setitem__


def test_a_run_leaves_what_it_promises(tmp_path, capsys):
    metrics = run(tmp_path, "a")
    folder = tmp_path / "a"
    steps, aps = losses(folder)
    assert sorted(steps) == list(range(6))
    assert sorted(aps) == [1, 3, 5]
    assert metrics["bbox"]["AP"] == aps[5]
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("events"))
    expected = [
        ".lock",
        "config.yaml",
        "last_checkpoint",
        "log.txt",
        "metrics.jsonl",
        "model_0000002.pth",
        "model_final.pth",
    ]
    assert names == expected
    checkpoint = read_checkpoint(folder / "model_final.pth")
    assert checkpoint["iteration"] == 5
    assert checkpoint["meta"]["classes"] == ["cat", "dog"]
    assert checkpoint["meta"]["category_ids"] == [10, 20]
    assert checkpoint["meta"]["config"] == (folder / "config.yaml").read_text()
    assert from_yaml(checkpoint["meta"]["config"]).model.roi_heads.num_classes == 2
    assert "num_classes = 2 (was 80), from the dataset: cat, dog" in capsys.readouterr().out


def test_the_same_seed_repeats_and_another_does_not(tmp_path):
    run(tmp_path, "a")
    run(tmp_path, "b")
    run(tmp_path, "c", "train.seed=4")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a")[0][0] != losses(tmp_path / "c")[0][0]


def test_learning_rates_follow_the_schedule(tmp_path):
    run(tmp_path, "a", max_iter=8)
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates == pytest.approx([0, 0.005, 0.01, 0.01, 0.01, 0.01, 0.001, 0.001])
    groups = read_checkpoint(tmp_path / "a" / "model_final.pth")["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([0.002, 0.002]), "others learn at twice the base"


@pytest.mark.parametrize(
    ("stop_after", "overrides"),
    [
        (3, ()),
        (4, ()),
        (5, ()),
        (5, ("dataloader.train._target_=support.engine_fakes.drawing_loader",)),
        (5, ("dataloader.train.num_workers=1",)),
    ],
    ids=["at-checkpoint", "at-evaluation", "between", "loader-draws", "worker"],
)
def test_resuming_repeats_the_uninterrupted_run_bit_for_bit(tmp_path, act, stop_after, overrides):
    """Token sampling, batch-norm statistics, Adam's moments, data order; evaluations before and after."""
    run(tmp_path, "whole", *overrides, max_iter=8)
    act(8 + stop_after - 1, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(TrainingInterrupted):
        run(tmp_path, "parts", *overrides, max_iter=8)
    random.seed(999)
    np.random.seed(999)
    torch.manual_seed(999)
    run(tmp_path, "parts", *overrides, max_iter=8, resume=True)
    assert_same(weights(tmp_path / "whole" / "model_final.pth"), weights(tmp_path / "parts" / "model_final.pth"))
    steps, aps = losses(tmp_path / "parts")
    whole_steps, whole_aps = losses(tmp_path / "whole")
    assert steps == whole_steps
    due = stop_after - 1
    assert aps == {i: ap for i, ap in whole_aps.items() if i != due}, "the evaluation due at the stop is left out"
    final = [read_checkpoint(tmp_path / name / "model_final.pth") for name in ("whole", "parts")]
    for a, b in zip(*(f["optimizer"]["state"].values() for f in final), strict=True):
        assert_same(a, b)


def test_evaluation_changes_nothing_in_training(tmp_path):
    run(tmp_path, "often", "train.eval_period=1")
    run(tmp_path, "never", "dataloader.evaluator=null")
    assert losses(tmp_path / "often")[0] == losses(tmp_path / "never")[0]
    assert_same(weights(tmp_path / "often" / "model_final.pth"), weights(tmp_path / "never" / "model_final.pth"))
    assert losses(tmp_path / "never")[1] == {}


def test_a_crash_resumes_from_the_last_checkpoint(tmp_path, act):
    run(tmp_path, "whole", max_iter=8)

    def crash():
        raise MemoryError("simulated")

    act(8 + 4, crash)
    with pytest.raises(MemoryError):
        run(tmp_path, "parts", max_iter=8)
    steps = losses(tmp_path / "parts")[0]
    assert sorted(steps) == [0, 1, 2, 3]
    run(tmp_path, "parts", max_iter=8, resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["sigint", "sigterm"])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, act, capsys, signum):
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    act(3, lambda: os.kill(os.getpid(), signum))
    with pytest.raises(TrainingInterrupted) as caught:
        run(tmp_path, "a")
    assert caught.value.code == 128 + signum
    assert caught.value.checkpoint == tmp_path / "a" / "model_0000003.pth"
    assert read_checkpoint(caught.value.checkpoint)["iteration"] == 3
    assert sorted(losses(tmp_path / "a")[0]) == [0, 1, 2, 3]
    assert "--resume" in capsys.readouterr().out
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_nan_stops_with_loss_images_and_last_checkpoint(tmp_path):
    with pytest.raises(NonFiniteLossError) as caught:
        run(tmp_path, "a", "model.nan_from=4")
    message = str(caught.value)
    assert "iteration 4: loss_mask is nan, on the images 1" in message
    assert message.count(".jpg)") == 2
    assert f"Last good checkpoint: {tmp_path / 'a' / 'model_0000002.pth'}" in message
    assert message in (tmp_path / "a" / "log.txt").read_text()
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "a" / "model_0000002.pth").values())


def test_broken_weights_are_never_saved(tmp_path, monkeypatch):
    """A gradient overflows at a checkpoint's iteration, whose losses are still finite."""
    forward = FakeDetector.forward

    def overflowing(self, images, targets=None, output_sizes=None):
        if self.training and self.calls == 2:
            self.stem[0].weight.register_hook(lambda gradient: gradient * float("inf"))
        return forward(self, images, targets, output_sizes)

    monkeypatch.setattr(FakeDetector, "forward", overflowing)
    with pytest.raises(NonFiniteLossError, match="iteration 2: the gradient is NaN or infinite, on the images 1"):
        run(tmp_path, "a")
    assert not list((tmp_path / "a").glob("*.pth"))


def test_a_broken_step_is_the_last_that_changes_weights(tmp_path, monkeypatch):
    """Also where its losses are read two steps later, as on a GPU."""
    monkeypatch.setattr(trainer, "_UNREAD_STEPS", {"cpu": 2})
    seen = []
    step = TrainStep.__call__

    def spy(self, *arguments):
        report = step(self, *arguments)
        seen.append([p.detach().clone() for p in self.parameters])
        return report

    monkeypatch.setattr(TrainStep, "__call__", spy)
    with pytest.raises(NonFiniteLossError, match="iteration 2: loss_mask is nan, on the images 1"):
        run(tmp_path, "a", "model.nan_from=2", "train.checkpointer.period=100", "train.eval_period=0")
    assert len(seen) == 5, "two more steps began"
    assert not torch.equal(seen[0][0], seen[1][0])
    for weights_ in seen[2:]:
        assert all(torch.equal(a, b) for a, b in zip(weights_, seen[1], strict=True))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_that_cannot_skip_does_not_see_a_broken_step(tmp_path, optimizer):
    parameter = torch.nn.Parameter(torch.ones(2))
    fabric = build_fabric(fake_config(tmp_path / "a").train)
    instance = optimizer([parameter], lr=0.1, foreach=False)
    model, wrapped = fabric.setup(Loss(parameter), instance)
    step = TrainStep(fabric, model, wrapped)
    sample = {"image": torch.ones(3, 4, 4), "image_id": 7, "file_name": "a.jpg", "targets": {}}
    assert step([sample]).read(0)[0] == {"loss": 2.0}
    before = parameter.detach().clone()
    model.module.factor = float("inf")
    with pytest.raises(NonFiniteLossError, match=r"iteration 1: loss is inf, on the images 7 \(a.jpg\)"):
        step([sample]).read(1)
    model.module.factor = 1.0
    step([sample])
    assert torch.equal(parameter, before)


class Loss(torch.nn.Module):
    def __init__(self, parameter):
        super().__init__()
        self.parameter, self.factor = parameter, 1.0

    def forward(self, images, targets):
        return {"loss": self.parameter.sum() * self.factor}


@pytest.mark.parametrize("stop_after", [3, 5])
def test_losses_read_late_are_the_same(tmp_path, act, monkeypatch, stop_after):
    """Also around a stop, a checkpoint and an evaluation."""
    run(tmp_path, "whole", max_iter=8)
    monkeypatch.setattr(trainer, "_UNREAD_STEPS", {"cpu": 2})
    act(8 + stop_after - 1, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(TrainingInterrupted):
        run(tmp_path, "parts", max_iter=8)
    run(tmp_path, "parts", max_iter=8, resume=True)
    assert losses(tmp_path / "parts")[0] == losses(tmp_path / "whole")[0]
    assert_same(weights(tmp_path / "whole" / "model_final.pth"), weights(tmp_path / "parts" / "model_final.pth"))


def test_a_loader_that_ends_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r"dataloader\.train ended before iteration 3: .* must be endless"):
        run(tmp_path, "a", "dataloader.train._target_=support.engine_fakes.short_loader")


def test_resuming_a_finished_run_only_evaluates(tmp_path, act):
    first = run(tmp_path, "a")
    act(6, lambda: pytest.fail("it trained on"))
    assert run(tmp_path, "a", resume=True)["bbox"]["AP"] == first["bbox"]["AP"]


def test_resuming_with_more_iterations_goes_on(tmp_path):
    run(tmp_path, "a")
    run(tmp_path, "a", max_iter=9, resume=True)
    assert sorted(losses(tmp_path / "a")[0]) == list(range(9))
    assert read_checkpoint(tmp_path / "a" / "model_final.pth")["iteration"] == 8


@pytest.mark.parametrize(("resume", "level"), [(True, "WARNING "), ("auto", "")])
def test_resuming_nothing_starts_from_the_beginning(tmp_path, capsys, resume, level):
    run(tmp_path, "a", resume=resume)
    assert f" {level}nothing to resume: no checkpoint in {tmp_path / 'a'}." in capsys.readouterr().out.replace(",", " ")
    assert sorted(losses(tmp_path / "a")[0]) == list(range(6))


def test_resuming_without_a_pointer_never_starts_over(tmp_path, capsys):
    run(tmp_path, "a", max_iter=5)
    whole = losses(tmp_path / "a")[0]
    for name in ("model_final.pth", "last_checkpoint"):
        (tmp_path / "a" / name).unlink()
    capsys.readouterr()
    run(tmp_path, "a", max_iter=5, resume=True)
    out = capsys.readouterr().out
    assert "WARNING" in out
    assert f"taking the newest checkpoint, {tmp_path / 'a' / 'model_0000002.pth'}" in out
    assert " 3/5 " not in out
    assert losses(tmp_path / "a")[0] == whole


def test_resuming_says_what_orders_the_data_otherwise(tmp_path, capsys):
    run(tmp_path, "a")
    capsys.readouterr()
    run(tmp_path, "a", max_iter=7, resume=True)
    assert "in the run to resume" not in capsys.readouterr().out
    run(tmp_path, "a", "train.seed=4", max_iter=8, batch_size=4, resume=True)
    out = capsys.readouterr().out
    assert "WARNING train.seed is 4, but 3 in the run to resume" in out
    assert "WARNING dataloader.train.total_batch_size is 4, but 2 in the run to resume" in out


def test_resuming_takes_rates_and_decay_from_the_config(tmp_path):
    run(tmp_path, "a")
    run(tmp_path, "a", "optimizer.lr=0.5", "optimizer.params.weight_decay=0.25", max_iter=8, resume=True)
    groups = read_checkpoint(tmp_path / "a" / "model_final.pth")["optimizer"]["param_groups"]
    assert sorted({group["weight_decay"] for group in groups}) == [0.0, 0.25]
    assert [group["lr"] for group in groups] == pytest.approx([0.1, 0.1])


def test_resuming_reads_no_mae_file(tmp_path, monkeypatch):
    built = []
    init = FakeDetector.__init__

    def spy(self, roi_heads, nan_from=None, pretrained=None):
        built.append(pretrained)
        init(self, roi_heads, nan_from, pretrained)

    monkeypatch.setattr(FakeDetector, "__init__", spy)
    run(tmp_path, "a", "mae_checkpoint.path=mae.pth")
    run(tmp_path, "a", "mae_checkpoint.path=mae.pth", resume=True)
    assert built == ["mae.pth", None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dataloader.train.dataset.classes": ["cat", "cow"], "dataloader.test.dataset.classes": ["cat", "cow"]},
            r"trained for other classes \(2: cat, dog\)",
        ),
        ({"model._target_": "test_trainer.WiderDetector"}, "of another shape"),
        ({"optimizer.params._target_": "test_trainer.one_group"}, "its optimizer state does not fit"),
    ],
    ids=["classes", "model", "optimizer"],
)
def test_a_refused_resume_writes_nothing(tmp_path, changes, message):
    run(tmp_path, "a")
    before = contents(tmp_path / "a")
    cfg = fake_config(tmp_path / "a")
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value)
    with pytest.raises(CheckpointError, match=message):
        train(cfg, resume=True)
    assert contents(tmp_path / "a") == before


class WiderDetector(FakeDetector):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.stem[0] = torch.nn.Conv2d(3, 5, 3, stride=2)


def one_group(model, **options):
    return list(model.stem.parameters())


def test_resuming_bare_weights_is_refused(tmp_path):
    run(tmp_path, "a")
    torch.save({"model": weights(tmp_path / "a" / "model_final.pth")}, tmp_path / "a" / "model_final.pth")
    with pytest.raises(CheckpointError, match=r"no optimizer, iteration, random, meta.*train.init_checkpoint"):
        run(tmp_path, "a", resume=True)


def test_a_saved_config_trains_and_resumes_as_the_python_config(tmp_path, monkeypatch):
    monkeypatch.setattr("mimdet.config.loader.checked", lambda cfg: cfg)  # the fakes are no parts of shipped configs
    run(tmp_path, "a", "train.checkpointer.period=2", max_iter=4)
    text = (tmp_path / "a" / "config.yaml").read_text()
    assert "torch.optim.adamw.AdamW" in text, "a name that is no attribute of its package"
    train(load(tmp_path / "a" / "config.yaml", [f"train.output_dir={tmp_path / 'b'}"]))
    expected = weights(tmp_path / "a" / "model_final.pth")
    assert_same(weights(tmp_path / "b" / "model_final.pth"), expected)

    (tmp_path / "b" / "model_final.pth").unlink()
    (tmp_path / "b" / "last_checkpoint").write_text("model_0000001.pth")
    train(load(tmp_path / "b" / "config.yaml"), resume=True)
    assert_same(weights(tmp_path / "b" / "model_final.pth"), expected)
    assert "resuming from" in (tmp_path / "b" / "log.txt").read_text()


def test_init_checkpoint_ignore_keeps_the_fresh_head(tmp_path):
    run(tmp_path, "a")
    three = [f"dataloader.{part}.dataset.classes=[a,b,c]" for part in ("train", "test")]
    init = f"train.init_checkpoint={tmp_path}/a/model_final.pth"
    with pytest.raises(CheckpointError, match=r"roi_heads\.predictor\.weight: checkpoint \(2, 4\), model \(3, 4\)"):
        run(tmp_path, "b", *three, init)
    run(tmp_path, "b", *three, init, "train.init_checkpoint_ignore=[roi_heads.predictor.*]", "optimizer.lr=0.0")
    a, b = weights(tmp_path / "a" / "model_final.pth"), weights(tmp_path / "b" / "model_final.pth")
    assert torch.equal(a["stem.0.weight"], b["stem.0.weight"])
    assert b["roi_heads.predictor.weight"].shape == (3, 4)


def test_a_number_of_classes_given_against_the_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"num_classes=7 was given, but the dataset has 2 classes: cat, dog"):
        run(tmp_path, "a", "model.roi_heads.num_classes=7")


def test_different_classes_in_training_and_test_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"2 classes \(cat, dog\), the test set 2 \(dog, cat\)"):
        run(tmp_path, "a", "dataloader.test.dataset.classes=[dog,cat]")


def test_the_callers_config_is_not_changed(tmp_path):
    cfg = fake_config(tmp_path / "a", batch_size=2)
    cfg.train.reference_batch_size = 4
    before = OmegaConf.to_container(cfg, resolve=False)
    train(cfg)
    assert OmegaConf.to_container(cfg, resolve=False) == before


def test_the_batch_scales_the_schedule_and_says_so(tmp_path):
    run(tmp_path, "a", "dataloader.train.total_batch_size=4", "train.eval_period=100", max_iter=6, batch_size=2)
    log = (tmp_path / "a" / "log.txt").read_text()
    assert "batch of 4 images instead of 2" in log
    assert "train.max_iter = 3 (was 6)" in log
    assert "train.eval_period = 100, as overridden" in log
    assert sorted(losses(tmp_path / "a")[0]) == [0, 1, 2]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_earlier_run_is_not_replaced_unless_asked(tmp_path, capsys):
    run(tmp_path, "a")
    before = contents(tmp_path / "a")
    with pytest.raises(FileExistsError, match=r"holds an earlier run \(model_final\.pth\): --resume .* --overwrite"):
        run(tmp_path, "a")
    assert contents(tmp_path / "a") == before
    capsys.readouterr()
    run(tmp_path, "a", "train.checkpointer.period=100", overwrite=True)
    out = capsys.readouterr().out
    assert "--overwrite: deleted the earlier run" in out
    assert "model_0000002.pth, model_final.pth, metrics.jsonl, events" in out
    assert not (tmp_path / "a" / "model_0000002.pth").exists()
    assert sorted(losses(tmp_path / "a")[0]) == list(range(6))
    assert len(list((tmp_path / "a").glob("events*"))) == 1


def test_overwriting_spares_the_weights_it_starts_from(tmp_path):
    run(tmp_path, "a")
    before = contents(tmp_path / "a")
    with pytest.raises(ValueError, match=r"would delete train\.init_checkpoint=.*model_final\.pth"):
        run(tmp_path, "a", f"train.init_checkpoint={tmp_path}/a/model_final.pth", overwrite=True)
    assert contents(tmp_path / "a") == before


def test_resuming_and_overwriting_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match=r"--resume .* --overwrite"):
        run(tmp_path, "a", resume=True, overwrite=True)


def test_clipping_bounds_the_update(tmp_path):
    cfg = fake_config(tmp_path, max_iter=2)
    cfg.optimizer._target_ = "torch.optim.SGD"
    del cfg.optimizer["betas"]
    cfg.optimizer.lr = 0.01
    cfg.lr_multiplier.warmup_length = 0.0
    cfg.optimizer.params.weight_decay = 0.0
    cfg.optimizer.weight_decay = 0.0
    moved = {}
    for limit in (1e-3, None):
        cfg.train.clip_grad_norm = limit
        cfg.train.output_dir = str(tmp_path / str(limit))
        cfg.train.checkpointer.period = 1
        train(cfg)
        first, last = (weights(tmp_path / str(limit) / n) for n in ("model_0000000.pth", "model_final.pth"))
        parameters = [key for key in first if "running" not in key and "num_batches" not in key]
        moved[limit] = sum(((first[k] - last[k]) ** 2).sum() for k in parameters).sqrt().item()
    assert moved[1e-3] == pytest.approx(1e-3 * 2 * 0.01, rel=1e-2), "the largest norm x multiplier x rate"
    assert moved[None] > 10 * moved[1e-3]


@pytest.mark.parametrize("drawn", [random.random, np.random.rand, lambda: torch.rand(2).tolist()])
def test_random_states_come_back(drawn):
    random.gauss(0, 1)
    np.random.randn()
    with isolated_random():
        inside = drawn()
    assert drawn() == inside
    state = get_random_state()
    expected = [drawn(), random.gauss(0, 1), np.random.randn()]
    set_random_state(state)
    assert [drawn(), random.gauss(0, 1), np.random.randn()] == expected


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP on Windows")
def test_a_hangup_that_nohup_ignores_does_not_stop(tmp_path, act):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        act(1, lambda: os.kill(os.getpid(), signal.SIGHUP))
        run(tmp_path, "a", max_iter=3)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert sorted(losses(tmp_path / "a")[0]) == [0, 1, 2]


def changed_state(checkpoint, key):
    checkpoint[key] = {
        "iteration": -3,
        "random": [{"python": 1}],
        "meta": ["cat", "dog"],
        "optimizer": checkpoint["optimizer"] | {"state": {0: 5}},
    }[key]


def broken_moments(checkpoint, key):
    next(iter(checkpoint["optimizer"]["state"].values()))[key][-1] = float("nan")


def smaller_moments(checkpoint, key):
    for state in checkpoint["optimizer"]["state"].values():
        state[key] = torch.zeros(2)


@pytest.mark.parametrize(
    ("change", "key", "message"),
    [
        (changed_state, "iteration", "its iteration cannot be of a training"),
        (changed_state, "random", "its random cannot be of a training"),
        (changed_state, "meta", "its meta cannot be of a training"),
        (changed_state, "optimizer", "its optimizer state does not fit"),
        (broken_moments, "exp_avg_sq", "exp_avg_sq holds NaN"),
        (smaller_moments, "exp_avg", r"exp_avg is \(2,\) for a parameter of"),
        (smaller_moments, "exp_avg_sq", r"exp_avg_sq is \(2,\) for a parameter of"),
    ],
)
def test_a_state_of_another_program_is_refused_before_anything_is_written(tmp_path, change, key, message):
    """The fused AdamW would write beyond a smaller moment, and end the process."""
    run(tmp_path, "a", max_iter=2)
    checkpoint = torch.load(tmp_path / "a/model_final.pth", weights_only=False)
    change(checkpoint, key)
    torch.save(checkpoint, tmp_path / "a/model_final.pth")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    with pytest.raises(CheckpointError, match=rf"cannot resume from .*model_final\.pth: .*{message}"):
        run(tmp_path, "a", max_iter=4, resume=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
