"""Configs from checkpoint and YAML files, which are not trusted: they can build parts of mimdet and nothing else.

A config can call any function, and weights come with a config that their author wrote. So only the targets listed here
are built from such a config: those of the shipped configs and PyTorch's optimizers, each only in its section. None of
the model parts and transforms reads or writes a file once the paths of pre-trained weights are cleared
(:func:`mimdet.engine.model.build_model` with ``pretrained=False``). A Python config is code that the user chose: it
may name any target.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, InterpolationToMissingValueError, OmegaConfBaseException

from .lazy import PARTIAL, TARGET, public_target
from .serialize import plain

_TRANSFORMS = frozenset(
    {
        "mimdet.data.DatasetMapper",
        "mimdet.data.AugmentationList",
        "mimdet.data.FixedSizeCrop",
        "mimdet.data.RandomApply",
        "mimdet.data.RandomCrop",
        "mimdet.data.RandomFlip",
        "mimdet.data.ResizeScale",
        "mimdet.data.ResizeShortestEdge",
    }
)

# By their modules, as `to_yaml` names them, and by their packages, as Detectron2 does.
_OPTIMIZERS = frozenset(
    f"torch.optim.{module}{name}"
    for name in ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD")
    for module in (f"{name.lower()}.", "")
)

# Section of a config -> targets that may be anywhere in it. The longest matching section counts.
TRUSTED: dict[str, frozenset[str]] = {
    "model": frozenset(
        {
            "mimdet.detection.Box2BoxTransform",
            "mimdet.detection.CascadeROIHeads",
            "mimdet.detection.DefaultAnchorGenerator",
            "mimdet.detection.FPN",
            "mimdet.detection.FastRCNNConvFCHead",
            "mimdet.detection.FastRCNNOutputLayers",
            "mimdet.detection.GeneralizedRCNN",
            "mimdet.detection.InferencePasses",
            "mimdet.detection.LastLevelMaxPool",
            "mimdet.detection.LastLevelP6P7",
            "mimdet.detection.MaskRCNNConvUpsampleHead",
            "mimdet.detection.Matcher",
            "mimdet.detection.ROIPooler",
            "mimdet.detection.RPN",
            "mimdet.detection.RetinaNet",
            "mimdet.detection.RetinaNetHead",
            "mimdet.detection.StandardROIHeads",
            "mimdet.detection.StandardRPNHead",
            "mimdet.modeling.BenchmarkingViTDet",
            "mimdet.modeling.MIMDetBackbone",
            "mimdet.modeling.MIMDetDecoder",
            "mimdet.modeling.MIMDetEncoder",
            "mimdet.modeling.ShapeSpec",
            "mimdet.modeling.UpsampledTokens",
            "torch.nn.LayerNorm",
            "torch.nn.modules.normalization.LayerNorm",
        }
    ),
    "dataloader.train.mapper": _TRANSFORMS,
    "dataloader.test.mapper": _TRANSFORMS,
    # The sections below are saved in a checkpoint and never built from it.
    "dataloader": frozenset(
        {
            "mimdet.data.CocoDataset",
            "mimdet.data.build_detection_test_loader",
            "mimdet.data.build_detection_train_loader",
            "mimdet.evaluation.COCOEvaluator",
        }
    ),
    "optimizer": frozenset(
        {
            "mimdet.engine.get_default_optimizer_params",
            "mimdet.engine.get_fpn_model_parameters",
            *_OPTIMIZERS,
        }
    ),
    "lr_multiplier": frozenset(
        {
            "mimdet.engine.CosineParamScheduler",
            "mimdet.engine.MultiStepParamScheduler",
            "mimdet.engine.WarmupParamScheduler",
        }
    ),
}

_MOST_CHARACTERS = 100_000  # a shipped config has at most 10 thousand
_REFERENCE = re.compile(r"\$\{\.*\w+(?:\.\w+|\[\w+\])*\}")
_VARIABLE = re.compile(r"\$\{oc\.env:\w+(?:,[^${}]*)?\}")  # its value is text, whatever the default


class UntrustedConfigError(ValueError):
    """A config from a checkpoint or YAML file that needs more than parts of mimdet."""


class _Loader(yaml.SafeLoader):
    """YAML without aliases: with them a short text describes an endless tree."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise UntrustedConfigError("it has YAML aliases, which no config saved by mimdet has")
        return super().compose_node(parent, index)


def from_untrusted_yaml(text: Any) -> DictConfig:
    """The config of a text by :func:`mimdet.config.to_yaml`, checked before anything is imported or built.

    Raises:
        UntrustedConfigError: a target that is not in :data:`TRUSTED`, an interpolation other than ``${a.b}`` to a
            single value, or a text that ``to_yaml`` does not write; the message names the key.
    """
    if not isinstance(text, str) or len(text) > _MOST_CHARACTERS:
        what = f"text of {len(text)} characters" if isinstance(text, str) else type(text).__name__
        raise UntrustedConfigError(f"it is a {what}, not the YAML text of a config")
    try:
        content = yaml.load(text, _Loader)
        if not isinstance(content, dict):
            raise UntrustedConfigError("it is not a YAML mapping")
        for path, value in _walk(content, ()):
            _name_publicly(path, value)
            _check(path, value)
        cfg = OmegaConf.create(content, flags={"allow_objects": True})
        for path, value in _walk(content, ()):
            _check_reference(cfg, path, value)
        return cfg
    except UntrustedConfigError:
        raise
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UntrustedConfigError(f"it cannot be read: {error}") from error
    except RecursionError:
        raise UntrustedConfigError("it is nested too deep") from None


def checked(cfg: DictConfig, also: Callable[[str], bool] = lambda name: False) -> DictConfig:
    """The config of a YAML file, whose targets are all in :data:`TRUSTED`; nothing is imported.

    Interpolations are references and environment variables: those that build a node could hide a target.

    Args:
        also: whether a target that is not listed is allowed too, by its dotted name.

    Raises:
        UntrustedConfigError: another target or interpolation; the message names the key.
    """
    content = plain(cfg)
    for path, value in _walk(content, ()):
        _name_publicly(path, value)
        if path and path[-1] == TARGET:
            if not (isinstance(value, str) and also(value)):
                _check_target(path, value)
        elif isinstance(value, str) and "${" in _VARIABLE.sub("", _REFERENCE.sub("", value)):
            raise UntrustedConfigError(
                f"{_name(path)} is {value!r}: interpolations may be references such as ${{a.b}} and ${{oc.env:NAME}}"
            )
    return OmegaConf.create(content, flags={"allow_objects": True})


def _walk(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every node of a plain tree with its path, parents first."""
    yield path, value
    if isinstance(value, dict):
        for key, child in value.items():
            if not isinstance(key, str):
                raise UntrustedConfigError(f"{_name(path)} has the key {key!r}, which is not text")
            yield from _walk(child, (*path, key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _walk(child, (*path, str(index)))


def _name_publicly(path: tuple[str, ...], node: Any) -> None:
    """Replace the target of an allowed part by its public name, so that nothing else is imported."""
    target = node.get(TARGET) if isinstance(node, dict) else None
    if isinstance(target, str) and (public := public_target(target)) in _allowed((*path, TARGET)):
        node[TARGET] = public


def _check(path: tuple[str, ...], value: Any) -> None:
    if not (value is None or isinstance(value, (str, bool, int, float, dict, list))):
        raise UntrustedConfigError(f"{_name(path)} is a {type(value).__name__}, which no saved config holds")
    if path and path[-1] == TARGET:
        _check_target(path, value)
    elif path and path[-1] == PARTIAL:
        if not isinstance(value, bool):
            raise UntrustedConfigError(f"{_name(path)} is {value!r}, neither true nor false")
    elif isinstance(value, str) and "${" in _REFERENCE.sub("", value, count=1):
        raise UntrustedConfigError(f"{_name(path)} is {value!r}: of interpolations it may have one such as ${{a.b}}")


def _check_target(path: tuple[str, ...], value: Any) -> None:
    if not isinstance(value, str) or value not in _allowed(path):
        raise UntrustedConfigError(f"{_name(path[:-1])} names {value!r} to be called, which is none of its parts")


def _check_reference(cfg: DictConfig, path: tuple[str, ...], value: Any) -> None:
    """Refuse a reference to a node: it would put a target where it is not allowed, or grow without end."""
    if not (isinstance(value, str) and "${" in value):
        return
    node: Any = cfg
    try:
        for key in path:
            node = node[int(key) if isinstance(node, ListConfig) else key]
    except (InterpolationKeyError, InterpolationToMissingValueError):
        return  # an override sets the value, or nothing reads it
    if isinstance(node, (DictConfig, ListConfig)):
        raise UntrustedConfigError(f"{_name(path)} is {value!r}, which refers to more than a single value")


def _allowed(path: tuple[str, ...]) -> frozenset[str]:
    lengths = range(len(path), 0, -1)
    return next((TRUSTED[part] for n in lengths if (part := ".".join(path[:n])) in TRUSTED), frozenset())


def _name(path: tuple[str, ...]) -> str:
    return ".".join(path) or "its top"
