"""Configs in checkpoints: they build the shipped configs' parts and run nothing else."""

import functools
import os
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from support.paths import CONFIGS
from torch import nn

from mimdet import Predictor
from mimdet.checkpoint.read import CheckpointError
from mimdet.config import (
    UntrustedConfigError,
    apply_overrides,
    check_config,
    from_untrusted_yaml,
    from_yaml,
    load,
    to_yaml,
)
from mimdet.config.lazy import TARGET, public_target, resolve_target
from mimdet.config.trusted import _OPTIMIZERS, TRUSTED, _allowed
from mimdet.engine.model import build_model

SHIPPED = sorted(p for p in CONFIGS.rglob("*.py") if not {"common", "detectron2"} & set(p.relative_to(CONFIGS).parts))
NOT_CLASSES = {
    "mimdet.data.build_detection_test_loader",
    "mimdet.data.build_detection_train_loader",
    "mimdet.engine.get_default_optimizer_params",
    "mimdet.engine.get_fpn_model_parameters",
}


def targets(node, path=()):
    """(path, dotted name) of every target of a plain tree."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from [((*path, key), value)] if key == TARGET else targets(value, (*path, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from targets(value, (*path, str(index)))


def meaning(node):
    """A config's plain tree with every callable, by name or itself, as (object, whether partial, arguments)."""
    if isinstance(node, functools.partial):
        return node.func, True, meaning(node.keywords)
    if isinstance(node, dict) and "_target_" in node:
        arguments = {k: meaning(v) for k, v in node.items() if k not in ("_target_", "_partial_")}
        return resolve_target(node["_target_"]), node.get("_partial_", False), arguments
    if isinstance(node, dict):
        return {k: meaning(v) for k, v in node.items()}
    if isinstance(node, (list, tuple)):
        return [meaning(v) for v in node]
    return (node, True, {}) if callable(node) else node


@pytest.fixture(scope="module")
def shipped():
    """Every shipped config with its YAML text."""
    configs = [load(path) for path in SHIPPED]
    return [(cfg, to_yaml(cfg)) for cfg in configs]


def test_every_shipped_config_is_good_trusted_and_means_the_same_as_yaml(shipped):
    assert len(shipped) > 25
    for cfg, text in shipped:
        check_config(cfg)
        saved = from_untrusted_yaml(text)
        assert to_yaml(saved) == text == to_yaml(from_yaml(text))
        first, second = (meaning(OmegaConf.to_container(c, resolve=True)) for c in (cfg, saved))
        assert first == second
        assert second["optimizer"][0] is torch.optim.AdamW


def test_the_list_is_what_the_shipped_configs_use_and_no_more(shipped):
    used = {part: set() for part in TRUSTED}
    for _, text in shipped:
        for path, name in targets(yaml.safe_load(text)):
            part = next(part for part in TRUSTED if _allowed(path) is TRUSTED[part])
            used[part].add(name)
    both = used["dataloader.train.mapper"] | used.pop("dataloader.test.mapper")
    used["model"].add("torch.nn.LayerNorm")
    used["optimizer"] |= set(_OPTIMIZERS)
    assert {**used, "dataloader.train.mapper": both} == {k: v for k, v in TRUSTED.items() if "test.mapper" not in k}


def test_the_list_names_classes_of_mimdet_and_torch_only():
    for name in frozenset().union(*TRUSTED.values()):
        target = resolve_target(name)
        full = public_target(f"{target.__module__}.{target.__qualname__}")
        assert full == name or (full in _allowed(("model",)) | _OPTIMIZERS and name.startswith("torch."))
        assert full.startswith(("mimdet.", "torch.nn.modules.", "torch.optim."))
        assert isinstance(target, type) or name in NOT_CLASSES
    # What is built from a checkpoint computes: modules and what they are told, transforms.
    for name in TRUSTED["model"]:
        assert issubclass(resolve_target(name), nn.Module) or name.startswith(("mimdet.detection.", "mimdet.modeling."))
    assert all(name.startswith("mimdet.data.") for name in TRUSTED["dataloader.test.mapper"])


def call(name, /, **arguments):
    return {TARGET: name, **arguments}


SHELL = call("os.system", command="touch RAN")
EVILS = {
    "system": SHELL,
    "posix": call("posix.system", command="touch RAN"),
    "subprocess": call("subprocess.run", args=["touch", "RAN"]),
    "eval": call("builtins.eval", source="open('RAN', 'w')"),
    "bare-eval": call("eval", source="open('RAN', 'w')"),
    "write": call("pathlib.Path.write_text", self=call("pathlib.Path"), data="x"),
    "partial": {**SHELL, "_partial_": True},
    "partial-of": call("functools.partial", func=SHELL),
    "walk-package": call("mimdet.config.lazy.importlib.import_module", name="RAN"),
    "walk-os": call("mimdet.predict.os.system", command="touch RAN"),
    "walk-torch": call("torch.os.system", command="touch RAN"),
    "walk-class": call("mimdet.detection.fpn.FPN.__init__.__globals__"),
    "in-arguments": call("mimdet.detection.Matcher", thresholds=[SHELL], labels=[0]),
    "in-partial": call("torch.nn.modules.normalization.LayerNorm", _partial_=True, eps=SHELL),
    "in-list": [[{"a": [SHELL]}]],
    "interpolated": call("${train.output_dir}"),
    "number": call(5),
    "list": call(["os.system"]),
    "alias-of-a-trusted-one": call("mimdet.modeling.FPN"),
    "trusted-name-elsewhere": call("mimdet.detection_fpn.fpn.FPN"),
    "of-another-part": call("mimdet.data.CocoDataset", json_file="RAN"),
    "import-of-a-module": call("this_module_would_run.x"),
}
PLACES = {
    "model": "model",
    "deep-model": "model.backbone.bottom_up.encoder.norm_layer",
    "model-list": "model.roi_heads.box_in_features.1",
    "mapper": "dataloader.test.mapper",
    "augmentations": "dataloader.test.mapper.augmentations.0",
    "train-mapper": "dataloader.train.mapper.image_format",
    "optimizer": "optimizer",
    "schedule": "lr_multiplier.scheduler",
    "evaluator": "dataloader.evaluator.output_dir",
    "train": "train.output_dir",
    "elsewhere": "mae_checkpoint.path",
}


@pytest.fixture(scope="module")
def demo():
    return to_yaml(load("demo"))


def with_node(text, place, node):
    cfg = OmegaConf.create(text)
    OmegaConf.update(cfg, place, node, merge=False)
    return OmegaConf.to_yaml(cfg)


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """The working directory, with a module that leaves a file if it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("this_module_would_run", "RAN"):
        Path(f"{name}.py").write_text("open('RAN', 'w')\n")
    return tmp_path


@pytest.mark.parametrize("evil", EVILS)
def test_no_target_but_the_listed_ones(trap, demo, evil):
    text = with_node(demo, PLACES["augmentations"], EVILS[evil])
    with pytest.raises(UntrustedConfigError, match=r"dataloader\.test\.mapper\.augmentations\.0\S* names .* called"):
        from_untrusted_yaml(text)
    assert not (trap / "RAN").exists()


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_no_part_of_a_config_runs_code(trap, demo, place):
    meta = {"classes": ["a"], "category_ids": [1], "config": with_node(demo, place, SHELL)}
    torch.save({"model": {"weight": torch.ones(1)}, "meta": meta}, "evil.pth")
    with pytest.raises(CheckpointError) as caught:
        Predictor(None, "evil.pth", device="cpu")
    message = str(caught.value)
    assert message.startswith(f"evil.pth: the config in it is refused, and nothing of it was run: {place} names")
    assert "'os.system'" in message
    assert "--config-file" in message
    assert not (trap / "RAN").exists()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("train.output_dir", "${oc.env:HOME}", "train.output_dir is .*interpolations"),
        ("train.output_dir", "${oc.decode:x}", "interpolations"),
        ("train.output_dir", "\\${oc.env:HOME}", "interpolations"),
        ("train.output_dir", "${a.${oc.env:HOME}}", "interpolations"),
        ("train.output_dir", "${train.seed}${train.seed}", "interpolations"),
        ("train.output_dir", "${train[${train.seed}]}", "interpolations"),
        ("model.backbone.top_block", "${dataloader.test.dataset}", "refers to more than a single value"),
        ("model.backbone.top_block", "${model.pixel_mean}", "refers to more than a single value"),
        ("model._partial_", "yes, please", "neither true nor false"),
        ("model._partial_", "${train.seed}", "neither true nor false"),
    ],
)
def test_interpolations_are_plain_references(demo, place, value, message):
    cfg = OmegaConf.to_container(OmegaConf.create(demo), resolve=False)
    *path, last = place.split(".")
    node = cfg
    for key in path:
        node = node[key]
    node[last] = value
    with pytest.raises(UntrustedConfigError, match=message):
        from_untrusted_yaml(OmegaConf.to_yaml(cfg))


BOMB = "a: &a [x]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(24))
CHAIN = "a0: x\n" + "".join(f"a{i + 1}: '${{a{i}}}'\n" for i in range(3000))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "YAML aliases"),
        ("a: &a\n  b: *a\n", "YAML aliases"),
        (CHAIN, "too deep|cannot be read"),
        ("a: '${b}'\nb: '${a}'\n", "too deep|cannot be read"),
        ("a: " + "[" * 5000 + "]" * 5000, "too deep"),
        ("a: " + "x" * 200_000, "200003 characters"),
        ("a: !!python/object/apply:os.system ['touch RAN']", "cannot be read"),
        ("a: !!python/name:os.system", "cannot be read"),
        ("a: !!binary aGVsbG8=", "a is a bytes"),
        ("a: 2024-01-01", "a is a date"),
        ("a: !!set {b, c}", "a is a set"),
        ("1: 2", "key 1, which is not text"),
        ("? [1, 2]\n: 3", "cannot be read"),
        ("a: " + "9" * 5000, "cannot be read"),
        ("[1, 2]", "not a YAML mapping"),
        ("<html>", "not a YAML mapping"),
        ("a: [1", "cannot be read"),
        (b"a: 1", "it is a bytes"),
        ({"_target_": "os.system"}, "it is a dict"),
    ],
    ids=range(19),
)
def test_bombs_and_other_texts_are_refused(trap, text, message):
    with pytest.raises(UntrustedConfigError, match=message):
        from_untrusted_yaml(text)
    assert not (trap / "RAN").exists()


@pytest.mark.parametrize("meta", [[1], "config", 5], ids=["list", "text", "number"])
def test_a_meta_that_is_no_dictionary_is_named(tmp_path, meta):
    torch.save({"model": {"weight": torch.ones(1)}, "meta": meta}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth: its meta is a \w+, not a dictionary"):
        Predictor(None, tmp_path / "a.pth")


def test_a_python_config_of_the_user_may_name_any_target(tmp_path):
    (tmp_path / "mine.py").write_text('ddp = {"_target_": "collections.OrderedDict", "a": 1}\n')
    assert resolve_target(load(tmp_path / "mine.py").ddp[TARGET])(a=1) == {"a": 1}


PIPES = [
    "mae_checkpoint.path",
    "model.backbone.bottom_up.encoder.pretrained",
    "model.backbone.bottom_up.encoder.stem_pretrained",
    "model.backbone.bottom_up.decoder.pretrained",
]


def test_no_file_is_read_to_build_a_model_for_other_weights(tmp_path, demo, monkeypatch):
    """Also where the config names the file itself instead of ``mae_checkpoint.path``."""
    cfg = apply_overrides(from_untrusted_yaml(demo), [f"{key}={tmp_path / 'nothing.pth'}" for key in PIPES])
    cfg.model.backbone.bottom_up.encoder.stem = "convnext"
    before = OmegaConf.to_container(cfg, resolve=False)
    with torch.device("meta"):
        build_model(cfg, pretrained=False)
        for key in PIPES:
            alone = apply_overrides(load("demo", ["model.backbone.bottom_up.encoder.stem=convnext"]), [f"{key}=no.pth"])
            with pytest.raises(CheckpointError, match=r"no\.pth"):
                build_model(alone)
    assert OmegaConf.to_container(cfg, resolve=False) == before
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("evil", EVILS)
@pytest.mark.parametrize("place", ["model", "augmentations", "optimizer", "train-mapper"])
def test_a_yaml_file_names_no_target_but_the_listed_ones(trap, demo, evil, place):
    """It comes with weights; to_yaml's ``config.yaml`` of a run is of listed targets alone."""
    Path("evil.yaml").write_text(with_node(demo, PLACES[place], EVILS[evil]))
    with pytest.raises(UntrustedConfigError, match=rf"evil\.yaml is refused.*{PLACES[place]}\S* names .*--config-file"):
        load("evil.yaml")
    assert not (trap / "RAN").exists()


@pytest.mark.parametrize(
    "value",
    [
        "${oc.create:{_target_:os.system,command:x}}",
        "${oc.decode:'{_target_: os.system}'}",
        "${oc.env:X,{_target_:os.system}}",
        "${oc.dict.values:model}",
        "${a.${oc.env:HOME}}",
        "${oc.select:model}",
    ],
)
def test_no_interpolation_of_a_yaml_file_builds_a_node(trap, demo, value):
    Path("evil.yaml").write_text(with_node(demo, "model.backbone", value))
    with pytest.raises(UntrustedConfigError, match=r"model\.backbone is .*interpolations may be references"):
        load("evil.yaml")


def test_a_yaml_file_may_refer_to_values_and_variables(trap, demo, monkeypatch):
    monkeypatch.setenv("FOLDER", "here")
    text = with_node(demo, "train.output_dir", "${oc.env:FOLDER}/${train.seed}/${oc.env:NOWHERE,there}")
    Path("mine.yaml").write_text(text.replace("torch.optim.adamw.AdamW", "torch.optim.SGD"))
    cfg = load("mine.yaml")
    assert (cfg.train.output_dir, cfg.optimizer[TARGET]) == ("here/0/there", "torch.optim.SGD")


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['touch RAN']", "{_target_: detectron2.os.system}"])
@pytest.mark.parametrize("key", ["model", "x"])
def test_a_yaml_file_of_detectron2_runs_nothing(trap, key, text):
    rest = "train: {_target_: detectron2.modeling.FPN, a: {_target_: os.system, command: touch RAN}}"
    Path("evil.yaml").write_text(f"{key}: {text}\n{rest}\n")
    with pytest.raises(ValueError, match=r"evil\.yaml"):
        load("evil.yaml")
    assert not (trap / "RAN").exists()
