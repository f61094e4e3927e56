"""Turn the model of a Detectron2 config into one whose whole step is native."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from .. import detection
from ..config.counterparts import COUNTERPARTS
from ..config.lazy import TARGET
from . import detector

_DETECTORS = {"GeneralizedRCNN": detector.NativeGeneralizedRCNN, "RetinaNet": detector.NativeRetinaNet}
_NORMS = ("", "BN", "SyncBN", "naiveSyncBN", "naiveSyncBN_N", "GN")
_HEADS_OF_ROWS = (detection.FastRCNNConvFCHead, detection.MaskRCNNConvUpsampleHead)
_ADVICE = (
    "Take the backbone of a config of configs/detectron2 and heads of Detectron2 that docs/detectron2.md lists, or "
    "train without use_fast_step: Detectron2's own heads take the same backbone."
)


def use_fast_step(model: DictConfig) -> None:
    """Turn the ``model`` section of a Detectron2 LazyConfig, in place, into one of native classes.

    The result builds a :class:`NativeGeneralizedRCNN` or :class:`NativeRetinaNet`, with the keys of the ``state_dict``
    as before, for Detectron2's trainer, data and evaluator. Arguments that only Detectron2 has are removed where they
    have their default value. What the section has twice by interpolation is changed once. A section that is native
    already stays.

    Args:
        model: with the backbone of this package in it, as ``configs/detectron2/*.py`` have.

    Raises:
        TypeError: not the ``model`` section of a LazyConfig.
        ValueError: parts without a native counterpart, each by key and target; nothing was changed.
    """
    _check_section(model)
    conversion = _Conversion()
    conversion.visit(model, "model")
    if conversion.problems:
        lines = "\n".join(f"  {problem}" for problem in conversion.problems)
        raise ValueError(f"use_fast_step: the native step has no counterpart of\n{lines}\n{_ADVICE}")
    for change in conversion.changes:
        change()


def _check_section(model: Any) -> None:
    problem = None
    if isinstance(model, CfgNode):
        problem = "a CfgNode of a YAML config; it needs a LazyConfig, whose model section names its classes"
    elif isinstance(model, nn.Module):
        problem = f"a {type(model).__name__} that is built; call it on cfg.model before instantiate"
    elif not isinstance(model, DictConfig):
        problem = f"{type(model).__name__}; it needs the model section of a LazyConfig"
    elif TARGET not in model:
        where = "a whole config; pass cfg.model" if "model" in model else f"a section without {TARGET}"
        problem = f"{where}, the call that builds the model"
    if problem is not None:
        raise TypeError(f"use_fast_step got {problem}")


def _counterparts() -> dict[Any, type]:
    """Native class of each class of Detectron2 that has one."""
    known = {}
    for entry in COUNTERPARTS:
        if entry.theirs is not None and hasattr(detection, entry.name):
            known[locate(entry.theirs)] = _DETECTORS.get(entry.name) or getattr(detection, entry.name)
    for name, native in _DETECTORS.items():
        known[locate(f"detectron2.modeling.{name}")] = known[getattr(detection, name)] = native
    return known


class _Conversion:
    """What :func:`use_fast_step` must change in a section, and what it cannot.

    Attributes:
        changes: to be called in order.
        problems: lines with key and target.
    """

    def __init__(self):
        self.changes: list[Callable[[], Any]] = []
        self.problems: list[str] = []
        self._counterparts = _counterparts()

    def visit(self, node: Any, path: str) -> None:
        """Every lazy call in ``node``; interpolations are skipped, as what they name is visited."""
        keys: Any = ()
        if isinstance(node, DictConfig):
            keys = self._call(node, path) if TARGET in node else list(node)
        elif isinstance(node, ListConfig):
            keys = range(len(node))
        for key in keys:
            if not OmegaConf.is_interpolation(node, key):
                self.visit(node[key], f"{path}[{key}]" if isinstance(node, ListConfig) else f"{path}.{key}")

    def _call(self, node: DictConfig, path: str) -> list[str]:
        """A lazy call; returns the arguments that remain to be visited."""
        target = _resolve(node[TARGET])
        name = _text(target)
        arguments = [key for key in node if key != TARGET]
        if name.startswith("mimdet.") and target not in self._counterparts:
            return arguments  # the backbone, or a section that is native already
        native = self._counterparts.get(target)
        if native is None:
            if name.startswith("detectron2.layers.") and name.endswith(".ShapeSpec"):
                return []
            self.problems.append(f"{path} ({name}): no native class")
            return []
        theirs, ours = _parameters(target), _parameters(native)
        keep = []
        for key in arguments:
            if key in ours:
                keep.append(key)
            elif key not in theirs or node[key] != theirs[key].default:
                self.problems.append(f"{path}.{key} ({_text(node[key])}): {native.__name__} has no such argument")
            else:
                self.changes.append(lambda key=key: node.__delitem__(key))  # pop would resolve interpolations
        for key, default in ((key, theirs[key].default) for key in ours if key in theirs):
            needed = ours[key].default is inspect.Parameter.empty
            if default is inspect.Parameter.empty:
                continue
            if needed and node.get(key) is None:
                self.problems.append(f"{path} ({name}) without {key}: {native.__name__} needs it")
            elif not needed and key not in node and default != ours[key].default:
                self.changes.append(lambda key=key, default=default: node.__setitem__(key, default))
        self.problems += [f"{path}.{key} ({_text(node[key])}): {reason}" for key, reason in _values(node, native)]
        for key in ("norm", "conv_norm"):
            if callable(norm := node.get(key)) or (norm == "SyncBN" and native in _HEADS_OF_ROWS):
                self._norm(node, path, key, norm, native)
        self.changes.append(lambda: node.__setitem__(TARGET, native))
        return keep

    def _norm(self, node: DictConfig, path: str, key: str, norm: Any, native: type) -> None:
        """The name of a batch norm that a callable makes, or of the one that weighs processes as Detectron2's does."""
        layer = norm(256) if callable(norm) else None
        name = None
        if norm == "SyncBN" or isinstance(layer, nn.SyncBatchNorm):
            name = "naiveSyncBN_N" if native in _HEADS_OF_ROWS else "SyncBN"
        elif isinstance(layer, NaiveSyncBatchNorm):
            name = "naiveSyncBN_N" if layer._stats_mode == "N" else "naiveSyncBN"
        elif type(layer) is nn.BatchNorm2d:
            name = "BN"
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            self.problems.append(f"{path}.{key} ({type(layer).__name__}): no native norm")
        if name is not None:
            self.changes.append(lambda: node.__setitem__(key, name))


def _values(node: DictConfig, native: type) -> Iterator[tuple[str, str]]:
    """Arguments, with the reason, that the native class has with fewer values."""
    for key in ("norm", "conv_norm"):
        if isinstance(node.get(key), str) and node[key] not in _NORMS:
            yield key, f"the norms are {', '.join(filter(None, _NORMS))}"
    if native is detection.ROIPooler:
        if node.get("pooler_type") != "ROIAlignV2":
            yield "pooler_type", "the pooler is ROIAlignV2"
        if not isinstance(node["output_size"], int):
            yield "output_size", "the side of a square is needed"
    if native is detection.RPN and not isinstance(node.get("loss_weight", 1.0), (int, float)):
        yield "loss_weight", "one number for both losses is needed"
    if issubclass(native, detection.StandardROIHeads):
        mask_head = node.get("mask_head")
        if (
            isinstance(mask_head, DictConfig)
            and mask_head.get("num_classes", node["num_classes"]) != node["num_classes"]
        ):
            yield "mask_head", f"masks are those of each of the {node['num_classes']} classes"


def _parameters(target: type) -> dict[str, inspect.Parameter]:
    """Named arguments of a class; what it passes on to its base classes included."""
    every: dict[str, inspect.Parameter] = {}
    for base in target.__mro__:
        if "__init__" not in vars(base) or base in (object, nn.Module):
            continue
        parameters = inspect.signature(base.__init__).parameters
        named = {n: p for n, p in parameters.items() if n != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        every = named | every
        if all(p.kind != p.VAR_KEYWORD for p in parameters.values()):
            break
    return every


def _resolve(target: Any) -> Any:
    """The class that a target names; a name without one stays."""
    try:
        return locate(target) if isinstance(target, str) else target
    except ImportError:
        return target


def _text(value: Any) -> str:
    """A target or a value for a message."""
    if isinstance(value, DictConfig) and TARGET in value:
        value = value[TARGET]
    return f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else str(value)
