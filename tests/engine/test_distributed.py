"""Two CPU processes under torchrun, started once for all scenarios."""

import json
import os
import subprocess
import sys

import pytest
from support.paths import TESTS

SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from support.engine_fakes import FakeDetector, FakeEvaluator, LOSSES, fake_config
from mimdet.checkpoint.read import read_checkpoint
from mimdet.engine import Checkpointer, NonFiniteLossError, TrainingInterrupted, evaluate_only, train, trainer
from mimdet.engine import weight_casts

root, rank = Path(sys.argv[1]), int(os.environ["RANK"])
results, models, seen, plan = {}, [], [], {}
init, forward = FakeDetector.__init__, FakeDetector.forward

def remember(self, *args, **kwargs):
    init(self, *args, **kwargs)
    models.append(self)

def spy(self, images, targets=None, output_sizes=None):
    if self.training:
        plan.get(self.calls, lambda: None)()
    out = forward(self, images, targets, output_sizes)
    if self.training:
        seen.append([len(images), out["loss_cls"].item(), images[0].sum().item()])
    return out

FakeDetector.__init__, FakeDetector.forward = remember, spy

def config(name, max_iter=6):
    return fake_config(root / name, max_iter=max_iter, batch_size=4)

metrics = train(config("whole"))
results["metrics"] = sorted(metrics)
results["evaluated"] = FakeEvaluator.log[-1:]
results["parameters"] = [p.sum().item() for p in models[-1].parameters()]
results["seen"] = list(seen)

save, latest = Checkpointer.save, Checkpointer.latest

def slow_save(*args):
    time.sleep(0.3)
    return save(*args)

def interrupted(name):
    try:
        train(config(name))
    except TrainingInterrupted as stop:
        return [stop.code, stop.checkpoint.name, stop.checkpoint.exists()]

Checkpointer.save = slow_save
if rank == 1:
    plan[3] = lambda: os.kill(os.getpid(), signal.SIGTERM)
results["interrupted"] = interrupted("parts")
plan.clear()
Checkpointer.save = save

torch.manual_seed(1234)
if rank == 1:
    Checkpointer.latest = lambda self: None  # as on a network file system that does not list the last save yet
train(config("parts"), resume=True)
Checkpointer.latest = latest
results["resumed"] = [p.sum().item() for p in models[-1].parameters()]

if rank == 1:
    plan[2] = lambda: setattr(models[-1], "nan_from", 2)
try:
    train(config("nan"))
except NonFiniteLossError as error:
    results["nan"] = str(error)
plan.clear()

trainer._UNREAD_STEPS = {"cpu": 2}  # as on a GPU
late = config("late", max_iter=12)
late.train.eval_period, late.train.checkpointer.period = 0, 100
if rank == 1:
    plan[3] = lambda: os.kill(os.getpid(), signal.SIGTERM)
try:
    train(late)
except TrainingInterrupted as stop:
    results["late"] = [stop.code, stop.checkpoint.name, stop.checkpoint.exists()]
plan.clear()
trainer._UNREAD_STEPS = {}

process = FakeEvaluator.process

def signalled(*args):
    process(*args)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)

FakeEvaluator.process = signalled
results["interrupted_evaluation"] = interrupted("evaluating")
FakeEvaluator.process = process

weight_casts._GROUP = 1  # elements: each weight is a group, and a bucket
learn, groups = weight_casts.WeightCasts.learn, []

def remember_groups(self, loss):
    learn(self, loss)
    groups.append(len(self._groups))

for name, learning in (("mixed", remember_groups), ("mixed_by_autocast", lambda self, loss: None)):
    weight_casts.WeightCasts.learn = learning
    cfg = config(name, max_iter=4)
    cfg.train.amp.dtype = "bf16"
    cfg.train.ddp.bucket_cap_mb = 0.0001
    train(cfg)
    results[name] = [p.tolist() for p in models[-1].parameters()]
results["groups"] = groups

cfg = config("evaluation")
cfg.train.init_checkpoint = str(root / "whole" / "model_final.pth")
results["evaluate_only"] = sorted(evaluate_only(cfg))
results["generators"] = len(read_checkpoint(root / "whole" / "model_final.pth")["random"])
(root / f"rank{rank}.json").write_text(json.dumps(results))
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """(folder, results of rank 0, results of rank 1)"""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(folder / "script.py"), str(folder)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.terminate()  # SIGTERM, not SIGKILL: torchrun ends its workers
            output, _ = process.communicate(timeout=60)
            pytest.fail(f"the processes wait for each other: {output[-5000:]}")
    assert process.returncode == 0, output[-5000:]
    return folder, *(json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1))


def lines(folder, name):
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def test_ranks_share_the_batch_and_end_with_equal_parameters(ranks):
    _, a, b = ranks
    assert [images for images, *_ in a["seen"] + b["seen"]] == [2] * 12
    assert {image for *_, image in a["seen"]}.isdisjoint(image for *_, image in b["seen"])
    assert a["parameters"] == b["parameters"]


def test_ranks_stop_together_at_the_step_in_which_all_have_read_the_request(ranks):
    folder, a, b = ranks
    assert a["late"][1:] == b["late"][1:] == ["model_0000005.pth", True]
    assert [line["iteration"] for line in lines(folder, "late")] == list(range(6))


def test_logged_losses_are_means_over_ranks(ranks):
    folder, a, b = ranks
    logged = [line["loss_cls"] for line in lines(folder, "whole") if "loss_cls" in line]
    means = [(x[1] + y[1]) / 2 for x, y in zip(a["seen"], b["seen"], strict=True)]
    assert logged == pytest.approx(means, rel=1e-6)


def test_weights_cast_in_groups_get_the_gradients_of_autocast(ranks):
    folder, a, b = ranks
    assert a["groups"] == b["groups"] == [4] * 4
    assert a["mixed"] == b["mixed"] == a["mixed_by_autocast"]
    ours, autocasts = (
        [line["total_loss"] for line in lines(folder, name) if "total_loss" in line]
        for name in ("mixed", "mixed_by_autocast")
    )
    assert ours == autocasts
    assert len(ours) == 4


def test_evaluation_covers_each_image_once_and_reports_on_rank_0(ranks):
    _, a, b = ranks
    assert a["evaluated"] == [5]
    assert b["evaluated"] == []
    assert a["metrics"] == a["evaluate_only"] == ["bbox", "bbox_per_class"]
    assert b["metrics"] == b["evaluate_only"] == []


def test_a_signal_to_one_rank_stops_both_at_the_same_step(ranks):
    _, a, b = ranks
    assert a["interrupted"] == b["interrupted"] == [143, "model_0000003.pth", True]


def test_a_signal_to_one_rank_during_evaluation_stops_both(ranks):
    _, a, b = ranks
    assert a["interrupted_evaluation"] == b["interrupted_evaluation"] == [143, "model_0000001.pth", True]


def test_resuming_repeats_the_uninterrupted_run_bit_for_bit(ranks):
    folder, a, b = ranks
    assert a["generators"] == 2
    assert a["resumed"] == b["resumed"] == a["parameters"]
    whole, parts = (
        [line["total_loss"] for line in lines(folder, name) if "total_loss" in line] for name in ("whole", "parts")
    )
    assert whole == parts
    assert len(whole) == 6


def test_a_nan_on_one_rank_stops_both_and_is_explained_where_it_is(ranks):
    _, a, b = ranks
    assert "loss_mask is nan, on the images 1" in b["nan"]
    assert "not finite on another process" in a["nan"]
    assert "model_0000" not in b["nan"], "no checkpoint was saved before iteration 2"
