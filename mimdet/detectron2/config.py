"""Convert native configs to Detectron2's, and read Detectron2's configs with clear errors."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import LazyConfig
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig, ListConfig, OmegaConf

from ..config import UntrustedConfigError, find_config, load
from ..config.counterparts import BY_NATIVE, ORIGINAL, counterpart
from ..config.lazy import TARGET, resolve_target
from ..config.serialize import Loader, read_yaml
from ..config.trusted import TRUSTED, checked
from ..engine.optim import can_be_fused

_NATIVE_TRAIN = ("clip_grad_norm", "init_checkpoint_ignore")
_THEIRS = ("detectron2.", "fvcore.", "mimdet.detectron2.")
_ORIGINAL = tuple(name for name in ORIGINAL if name != "_postprocess")


def use_detectron2(
    model: DictConfig, dataloader: DictConfig, lr_multiplier: DictConfig, train: MutableMapping[str, Any]
) -> None:
    """Turn the sections of a native config, in place, into those of a Detectron2 LazyConfig.

    Heads, data, evaluator and schedule become Detectron2's, with the same arguments; the backbone becomes the
    ``MIMDetBackbone`` of this package. ``train`` becomes the section that Detectron2's trainer reads, for this machine:
    a GPU with mixed precision if there is one, else the CPU.

    Raises:
        ValueError: a native class without a counterpart in Detectron2, or a test-time ensemble.
    """
    inference = model.get("inference")
    if inference and (inference["passes"] != 1 or inference["ratio"] is not None):
        raise ValueError("model.inference: passes over samples of the tokens are of the native detectors alone")
    for section in (model, dataloader, lr_multiplier):
        for node in _calls(section):
            _retarget(node)
    dataloader["evaluator"]["dataset_name"] = "${..test.dataset.names}"
    gpu = torch.cuda.is_available()
    if not gpu and model["backbone"]["norm"] == "SyncBN":
        model["backbone"]["norm"] = "naiveSyncBN"  # nn.SyncBatchNorm does not support several CPU processes
    for name in _NATIVE_TRAIN:
        train.pop(name, None)
    train["device"] = "cuda" if gpu else "cpu"
    train["amp"] = {"enabled": bool(gpu and train["amp"]["enabled"])}
    train["output_dir"] = "output/detectron2" + train["output_dir"].removeprefix("output")


def from_native(file: str) -> list[DictConfig]:
    """The sections of a native config, turned into Detectron2's.

    Returns:
        ``dataloader``, ``lr_multiplier``, ``mae_checkpoint``, ``model``, ``optimizer`` and ``train``.

    Args:
        file: path in a folder ``detectron2`` beside the native configs; the native config has the same name.

    Raises:
        FileNotFoundError: there is none.
        ValueError: as :func:`use_detectron2`.
    """
    path = Path(os.path.abspath(file))
    folder = next((parent for parent in path.parents if parent.name == "detectron2"), None)
    if folder is None:
        raise FileNotFoundError(
            f"{path} is in no folder 'detectron2' beside the native configs: call use_detectron2 instead"
        )
    cfg = load(folder.parent / path.relative_to(folder))
    use_detectron2(cfg.model, cfg.dataloader, cfg.lr_multiplier, cfg.train)
    if can_be_fused(cfg.optimizer):
        cfg.optimizer.fused = True  # as in native training
    return [cfg[name] for name in sorted(cfg)]


def config_file(path: str) -> str:
    """A URL unchanged, else the config file ``path``, or the shipped config of that name.

    Raises:
        FileNotFoundError: no such file.
    """
    return path if "://" in path else str(find_config(path))


def load_config(path: str, overrides: Iterable[str] = ()) -> DictConfig:
    """A LazyConfig with Detectron2's overrides; shipped ones are found by name.

    Raises:
        ImportError: the config builds the classes of the original MIMDet, or imports a module that does not exist.
        FileNotFoundError: no such file.
        ValueError: a YAML file has Python tags, or names a target that is no part of Detectron2's counterparts.
    """
    file = config_file(path)
    try:
        cfg = _load_yaml(file) if file.endswith((".yaml", ".yml")) else LazyConfig.load(file)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "models":
            raise
        raise ImportError(_switch(file, error.name)) from error
    for node in _calls(cfg):
        name = _dotted(node[TARGET])
        if name.startswith("models.") and name.rsplit(".", 1)[-1] in _ORIGINAL:
            raise ImportError(_switch(file, name))
    if file.endswith((".yaml", ".yml")):
        _check(cfg, file)
    return LazyConfig.apply_overrides(cfg, list(overrides))


class _Loader(Loader):
    """With the classes of a model section, such as norms, and their partials, which Detectron2 writes as tags."""


def _listed(loader: _Loader, name: str, node: yaml.Node) -> Any:
    if name not in TRUSTED["model"]:
        raise yaml.constructor.ConstructorError(
            None, None, f"{name} is no part of the shipped configs", node.start_mark
        )
    return resolve_target(name)


def _partial(loader: _Loader, node: yaml.Node) -> functools.partial:
    try:
        function, arguments, keywords, _ = loader.construct_mapping(node, deep=True)["state"]
        return functools.partial(function, *arguments, **keywords)
    except (KeyError, TypeError, ValueError) as error:
        raise yaml.constructor.ConstructorError(
            None, None, f"no functools.partial: {error}", node.start_mark
        ) from error


_Loader.add_constructor("tag:yaml.org,2002:python/object/apply:functools.partial", _partial)
_Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", _listed)


def _load_yaml(file: str) -> DictConfig:
    """As ``LazyConfig.load``, which runs what Python tags in a YAML file name."""
    with PathManager.open(file) as opened:
        text = opened.read()
    try:
        return read_yaml(text, _Loader)
    except ValueError as error:
        raise ValueError(f"config {file}: {error}") from error


def _check(cfg: DictConfig, file: str) -> None:
    try:
        checked(cfg, also=lambda name: name.startswith(_THEIRS) and counterpart(name) is not None)
    except UntrustedConfigError as error:
        raise UntrustedConfigError(
            f"config {file} is refused, and nothing of it was run: {error}. A YAML config may build only what the "
            "shipped configs and their counterparts in Detectron2 are made of. If you trust it, pass a Python config"
        ) from error


def _switch(file: str, name: str) -> str:
    return (
        f"config {file} names the original MIMDet's {name}: import from {__package__} instead, as in "
        f"'from {__package__} import {', '.join(_ORIGINAL)}' (_postprocess, GeneralizedRCNNImageListForward and "
        "get_fpn_model_parameters are there too)"
    )


def _retarget(node: DictConfig) -> None:
    dotted = _dotted(node[TARGET])
    name = dotted.rsplit(".", 1)[-1]
    if not dotted.startswith("mimdet.") or dotted.startswith(f"{__package__}."):
        return
    known = BY_NATIVE.get(name)
    if known is None:
        raise ValueError(f"Detectron2 has no counterpart of {dotted} that {__package__} knows")
    for argument in set(node) & set(known.native_only):
        del node[argument]  # pop would resolve interpolations
    if known.theirs is not None:
        # omegaconf would turn a dataclass such as ShapeSpec into a config of its fields: use its name.
        node[TARGET] = known.theirs


def _dotted(target: Any) -> str:
    return target if isinstance(target, str) else f"{target.__module__}.{getattr(target, '__qualname__', '')}"


def _calls(node: Any) -> Iterator[DictConfig]:
    """Every lazy call in a config, itself included; interpolations are skipped, as their targets are visited."""
    if isinstance(node, DictConfig):
        if TARGET in node:
            yield node
        keys = list(node)
    elif isinstance(node, ListConfig):
        keys = range(len(node))
    else:
        return
    for key in keys:
        if not OmegaConf.is_interpolation(node, key):
            yield from _calls(node[key])
