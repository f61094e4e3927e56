"""Impossible values raise an error with key and remedy before anything is built."""

import re

import pytest
from omegaconf import OmegaConf
from support.engine_fakes import fake_config

from mimdet.config import apply_overrides, check_config, load, to_yaml
from mimdet.config.checks import CHECKS
from mimdet.engine import evaluate_only, train

WHOLE = "a whole number of at least"
BAD = {
    "train.max_iter": (
        ["abc", "2.5", "null", "-3", "0", "true", "[1]", "9e4", "'5'", "1000000000000"],
        f"{WHOLE} 1 and at most",
    ),
    "optimizer.lr": (["fast", "-1", ".nan", ".inf", "null"], "a number of at least 0"),
    "train.log_period": (["0", "-1", "x", "null"], f"{WHOLE} 1"),
    "train.checkpointer.max_to_keep": (["two", "0", "-1"], f"{WHOLE} 1, or null for all"),
    "train.checkpointer.period": (["-1", "x", "1.5"], f"{WHOLE} 1, or 0 or null for never"),
    "train.eval_period": (["-1", "often"], f"{WHOLE} 1, or 0 or null for never"),
    "train.seed": (["abc", "-1", "1.0", "99999999999999999999"], f"{WHOLE} 0"),
    "train.output_dir": (["null", "5", "", "' '", "[a]"], "the path of a folder"),
    "train.init_checkpoint": (["5", "[a]"], "text .*, or null"),
    "train.init_checkpoint_ignore": (["roi_heads.*", "[1]", "{a: b}"], r"a list of patterns, such as \[roi_heads"),
    "train.clip_grad_norm": (["-1", "0", "x"], "a number above 0, or null"),
    "train.amp.enabled": (["maybe", "1"], "true or false"),
    "train.amp": (["null", "5"], "a section with keys of its own"),
    "train.checkpointer": (["null", "5"], "a section with keys of its own"),
    "train.device": (["0", "null", "gpu", "cuda:x", "[cpu]"], "auto, cpu, cuda, cuda:1 or mps"),
    "train.amp.dtype": (["half", "null", "16"], "auto, bf16 or fp16"),
    "train.ddp": (["abc", "5", "[]"], "a section with keys of its own, or null"),
    "train.ddp.find_unused_parameters": (["abc", "1", "null"], "true or false"),
    "lr_multiplier.scheduler": (["abc", "null", "{}"], "a section with _target_"),
    "optimizer.params.skip_list": (["null", "abc", "[1]"], "a list of names"),
    "dataloader.train.total_batch_size": (["0", "two", "-2", "null", "1000000000"], f"{WHOLE} 1"),
    "dataloader.train.num_workers": (["-1", "all", "100000"], f"{WHOLE} 0"),
    "dataloader.test.num_workers": (["-1", "all"], f"{WHOLE} 0"),
    "dataloader.test.batch_size": (["0", "all"], f"{WHOLE} 1"),
    "dataloader.train.seed": (["abc", "-1", ".nan", "null"], f"{WHOLE} 0"),
    "dataloader.train.dataset": (["abc", "null", "-1", "[1]", "{}", "true"], "a section with _target_"),
    "dataloader.train.mapper": (["abc", "null", "{}"], "a section with _target_"),
    "dataloader.test": (["abc", "0", "[]"], "a section with keys of its own, or null"),
    "dataloader.evaluator": (["abc", "0", "{}"], "a section with _target_, or null"),
    "optimizer": (["adam", "null", "{}"], "a section with _target_"),
    "optimizer.params": (["all", "null", "{}"], "a section with _target_"),
    "dataloader.train.dataset.names": (["5", "[a]", "true"], "text .*, or null"),
    "dataloader.train.mapper.is_train": (["false", "1", "null"], "true"),
    "dataloader.evaluator.output_dir": (["5", "[]"], "the path of a folder, or null"),
    "dataloader.train.aspect_ratio_grouping": (["1", "yes, please", "null"], "true or false"),
    "dataloader.train.dataset.filter_empty": (["1", "null"], "true or false"),
    "dataloader.test.dataset.use_masks": (["some", "0"], "true or false"),
    "dataloader.train.mapper.image_format": (["rgb", "3", "null"], "RGB or BGR"),
    "dataloader.evaluator.max_dets_per_image": (["0", "many", ".inf", "99999999999"], f"{WHOLE} 1"),
    "optimizer.weight_decay": (["-1", "x", ".nan", "null", "true", "[1]"], "a number of at least 0"),
    "optimizer.betas": (["0.9", "[0.9]", "[0.9,1]", "[-1,0.5]", "[a,b]", "null", "[.nan,0.5]"], "a list of 2 numbers"),
    "optimizer.params.base_lr": (["-1", "x", "null"], "a number of at least 0"),
    "optimizer.params.weight_decay": (["-1", "x", "null"], "a number of at least 0"),
    "optimizer.params.weight_decay_norm": (["-1", "x"], "a number of at least 0, or null"),
    "optimizer.params.multiplier": (["0", "-1", "x", "null"], "a number above 0"),
    "lr_multiplier.warmup_factor": (["-1", "x", ".inf", "null"], "a number of at least 0"),
    "lr_multiplier.scheduler.values": (["1", "[]", "[-1]", "[x]", "[.nan]", "null"], "a list of numbers"),
    "lr_multiplier.scheduler.milestones": (["1", "[0]", "[1.5]", "[x]", "null"], "a list of whole numbers"),
    "lr_multiplier.scheduler.num_updates": (["0", "1.5", "x", "null"], f"{WHOLE} 1"),
    "lr_multiplier.warmup_length": (["1", "-0.1", "long"], "a number of at least 0 and below 1"),
    "model.roi_heads.num_classes": (["0", "many"], f"{WHOLE} 1"),
    "model.backbone.bottom_up.sample_ratio": (["0", "1.1", "-0.5", "half", "null"], "a number above 0 and at most 1"),
    "model.backbone.bottom_up.inference_sample_ratio": (["0", "2", "half"], "a number above 0 and at most 1"),
    "model.inference.passes": (["0", "many"], f"{WHOLE} 1"),
    "model.inference.ratio": (["0", "1.5", "x"], "a number above 0 and at most 1, or null"),
}
GOOD = [
    "train.checkpointer.period=null", "train.checkpointer.period=0", "train.eval_period=0", "train.eval_period=null",
    "train.checkpointer.max_to_keep=null", "train.clip_grad_norm=null", "train.clip_grad_norm=1", "optimizer.lr=0",
    "optimizer.lr=1", "optimizer.lr=8e-5", "train.init_checkpoint=null", "train.init_checkpoint_ignore=null",
    "train.init_checkpoint_ignore=[]", "train.init_checkpoint_ignore=[roi_heads.*]", "train.seed=0",
    "train.output_dir=2024-01-05", "train.output_dir='5'", "dataloader.test=null", "dataloader.train.num_workers=0",
    "model.inference=null", "model.backbone.bottom_up.sample_ratio=1", "train.ddp=null",
]  # fmt: skip


@pytest.fixture(scope="module")
def base():
    return to_yaml(load("mimdet_b_mask_rcnn"))


@pytest.mark.parametrize("key", BAD)
def test_a_bad_value_is_named_with_what_it_must_be(base, key):
    values, what = BAD[key]
    cfg = OmegaConf.create(base)
    for value in values:
        apply_overrides(cfg, [f"{key}={value}"])
        with pytest.raises(ValueError, match=rf"^config: {re.escape(key)}=.*: must be {what}"):
            check_config(cfg)


def test_good_values_pass(base):
    cfg = OmegaConf.create(base)
    for override in GOOD:
        check_config(apply_overrides(cfg, [override]))


def test_every_check_is_of_a_key_that_a_shipped_config_has():
    configs = [load(name) for name in ("mimdet_b_mask_rcnn", "mimdet_b_retinanet", "benchmarking_b_25ep")]
    for key in CHECKS:
        section, _, last = key.rpartition(".")
        holders = [OmegaConf.select(cfg, section) if section else cfg for cfg in configs]
        assert any(holder is not None and last in holder for holder in holders), key


def test_all_bad_values_are_told_at_once(base):
    cfg = apply_overrides(OmegaConf.create(base), ["train.max_iter=abc", "optimizer.lr=fast"])
    with pytest.raises(ValueError, match=r"^config: ") as caught:
        check_config(cfg)
    assert str(caught.value).splitlines() == [
        "config: train.max_iter='abc': must be a whole number of at least 1 and at most 1000000000",
        "optimizer.lr='fast': must be a number of at least 0",
    ]


@pytest.mark.parametrize("key", ["train.log_period", "dataloader.train.mapper.augmentations.0.prob"])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("${no.such.key}", "Interpolation key 'no.such.key' not found"),
        ("${env:HOME}", "Unsupported interpolation type env"),
        ("${oc.env:NO_SUCH_VARIABLE}", 'KeyError raised while resolving interpolation: "Environment variable'),
        ("${KEY}", ""),
    ],
    ids=["key", "old-resolver", "environment", "itself"],
)
def test_an_interpolation_that_leads_nowhere_is_named(base, key, value, reason):
    value = value.replace("KEY", key)
    cfg = apply_overrides(OmegaConf.create(base), [f"{key}={value}"])
    with pytest.raises(ValueError, match=re.escape(f"config: {key}={value!r}: {reason}")):
        check_config(cfg)


def test_an_interpolation_to_a_good_value_passes(base):
    check_config(apply_overrides(OmegaConf.create(base), ["train.log_period=${train.max_iter}"]))


def test_training_and_evaluation_check_first(tmp_path):
    """Also for values of the config file, not only overrides."""
    for run in (train, evaluate_only):
        cfg = fake_config(tmp_path / "out", max_iter=-3)
        cfg.train.init_checkpoint = "weights.pth"
        with pytest.raises(ValueError, match=r"train\.max_iter=-3: must be a whole number of at least 1"):
            run(cfg)
    assert not (tmp_path / "out").exists()


def test_a_value_behind_a_reference_is_named_once(base):
    """``optimizer.params.base_lr`` refers to ``optimizer.lr``."""
    with pytest.raises(ValueError, match=r"\Aconfig: optimizer\.lr=-1: [^\n]*\Z"):
        check_config(apply_overrides(OmegaConf.create(base), ["optimizer.lr=-1"]))
    cfg = apply_overrides(
        OmegaConf.create(base), ["mae_checkpoint.path=x", "optimizer.params.base_lr=${mae_checkpoint.path}"]
    )
    with pytest.raises(ValueError, match=r"optimizer\.params\.base_lr='x': must be a number"):
        check_config(cfg)
