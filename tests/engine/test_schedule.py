import json

import pytest
from omegaconf import OmegaConf
from support.paths import RECORDINGS

from mimdet.config import apply_overrides, override_keys
from mimdet.engine import CosineParamScheduler, MultiStepParamScheduler, WarmupParamScheduler, scale_to_batch_size

GOLDEN = json.loads((RECORDINGS / "lr_schedule.json").read_text())
EXACT = 1e-12


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_multipliers_are_those_of_the_original(name):
    golden = GOLDEN[name]
    if golden["milestones"]:
        inner = MultiStepParamScheduler([1, 0.1, 0.01], golden["milestones"], golden["max_iter"])
    else:
        inner = CosineParamScheduler(1.0, 0.0)
    schedule = WarmupParamScheduler(inner, golden["warmup_length"], golden["warmup_factor"])
    multipliers = {i: schedule(int(i) / golden["max_iter"]) for i in golden["multiplier"]}
    assert multipliers == pytest.approx(golden["multiplier"], rel=EXACT, abs=1e-15)


@pytest.mark.parametrize("max_iter", [12, 36, 72, 999, 67500, 270000, 67499])
def test_steps_fall_at_their_share_of_any_length(max_iter):
    schedule = MultiStepParamScheduler([1, 0.1, 0.01], [50625, 61875], 67500)
    for iteration in range(0, max_iter, max(1, max_iter // 1000)):
        expected = 1 if iteration * 67500 < 50625 * max_iter else 0.1 if iteration * 67500 < 61875 * max_iter else 0.01
        assert schedule(iteration / max_iter) == expected, iteration


@pytest.mark.parametrize("max_iter", [22, 100, 46093])
def test_every_milestone_is_met_despite_rounding(max_iter):
    for milestone in range(1, max_iter):
        schedule = MultiStepParamScheduler([1, 0.1], [milestone], max_iter)
        assert schedule(milestone / max_iter) == 0.1, milestone
        assert schedule((milestone - 1) / max_iter) == 1, milestone


@pytest.mark.parametrize(
    ("values", "milestones", "message"),
    [
        ([1, 0.1], [5, 8], "2 milestones need 3 values"),
        ([1, 0.1, 0.01], [8, 5], "must increase"),
        ([1, 0.1], [10], "stay below num_updates=10"),
    ],
    ids=["count", "order", "beyond-the-end"],
)
def test_malformed_steps_are_refused(values, milestones, message):
    with pytest.raises(ValueError, match=message):
        MultiStepParamScheduler(values, milestones, 10)


def test_warmup_of_a_whole_training_is_refused():
    with pytest.raises(ValueError, match=r"warmup_length=1.0"):
        WarmupParamScheduler(CosineParamScheduler(1, 0), 1.0, 0.0)


def config(batch=64):
    return OmegaConf.create(
        {
            "dataloader": {"train": {"total_batch_size": batch}},
            "optimizer": {"params": {"base_lr": "${..lr}"}, "lr": 8e-5},
            "train": {
                "reference_batch_size": 64,
                "max_iter": 67500,
                "eval_period": 1875,
                "checkpointer": {"period": 1875, "max_to_keep": 100},
            },
        }
    )


def figures(cfg):
    train = cfg.train
    return cfg.optimizer.params.base_lr, train.max_iter, train.checkpointer.period, train.eval_period


def test_batch_16_quarters_the_rate_and_quadruples_the_iterations():
    cfg = config(16)
    lines = scale_to_batch_size(cfg)
    assert figures(cfg) == pytest.approx((2e-5, 270000, 7500, 7500), rel=EXACT)
    assert "16 images instead of 64" in lines[0]
    assert lines[1:] == [
        "  optimizer.lr = 2e-05 (was 8e-05)",
        "  train.max_iter = 270000 (was 67500)",
        "  train.checkpointer.period = 7500 (was 1875)",
        "  train.eval_period = 7500 (was 1875)",
    ]


def test_reference_batch_changes_nothing():
    cfg = config(64)
    assert scale_to_batch_size(cfg) == []
    assert figures(cfg) == (8e-5, 67500, 1875, 1875)


def test_scaling_twice_is_scaling_once():
    cfg = config(128)
    scale_to_batch_size(cfg)
    once = figures(cfg)
    assert scale_to_batch_size(cfg) == []
    assert figures(cfg) == once == pytest.approx((1.6e-4, 33750, 938, 938), rel=EXACT)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.max_iter=500", (2e-5, 500, 7500, 7500)),
        ("optimizer.lr=0.001", (1e-3, 270000, 7500, 7500)),
        ("train.checkpointer={period: 10}", (2e-5, 270000, 10, 7500)),
        ("train.eval_period=0", (2e-5, 270000, 7500, 0)),
    ],
    ids=["max-iter", "lr", "parent-node", "evaluation-off"],
)
def test_overridden_keys_stay(override, expected):
    overrides = ["dataloader.train.total_batch_size=16", override]
    cfg = apply_overrides(config(), overrides)
    scale_to_batch_size(cfg, override_keys(overrides))
    assert figures(cfg) == pytest.approx(expected, rel=EXACT)


def test_periods_never_reach_zero():
    cfg = config(64 * 10**6)
    scale_to_batch_size(cfg)
    assert figures(cfg)[1:] == (1, 1, 1)
