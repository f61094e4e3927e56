"""A Detectron2 config becomes a native one: the same keys, native classes and functions.

What has no native counterpart is reported, all of it in one error; what changes no result is dropped, with a log line.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .counterparts import BY_NATIVE, ORIGINAL, ORIGINAL_IN_CONFIGS, Counterpart, counterpart, nearest
from .lazy import PARTIAL, TARGET, resolve_target
from .stand_ins import PREFIX, SECTIONS, Run, StandIn, facts_of

logger = logging.getLogger(__name__)

_ROOTS = ("detectron2.", "fvcore.", "models.", "mimdet.detectron2.")
_NORMS = ("", "BN", "SyncBN", "naiveSyncBN", "naiveSyncBN_N", "GN")
_NEAREST_NORM = {"LN": "GN", "FrozenBN": "BN"}
_CHANNELS = 64  # the argument of a norm's function, to see what it returns
_NORM_KEYS = ("norm", "conv_norm")
# Arguments that take a module; Detectron2's YAML configs have names of its registries there.
_MODULES = (
    *("anchor_generator", "backbone", "bottom_up", "box_head", "box_predictor", "head", "mask_head"),
    *("proposal_generator", "roi_heads", "top_block"),
)
_AUGMENTATION = (
    "a native augmentation is a class of an importable module, called as augmentation(image, targets, rng) with a PIL "
    "image, as the classes of mimdet.data are"
)
_REGISTRY = "a registry's name is not enough: write a LazyCall of the class"
_DATASET = "mimdet.data.build_detection_train_loader takes one dataset: merge the annotation files"
_TRAIN = {  # what the training reads
    *("output_dir", "init_checkpoint", "init_checkpoint_ignore", "max_iter", "reference_batch_size", "seed", "device"),
    *("amp", "ddp", "clip_grad_norm", "checkpointer", "eval_period", "log_period"),
}


def is_detectron2(cfg: Any) -> bool:
    """Whether a config has a target of Detectron2, fvcore, the original MIMDet or ``mimdet.detectron2``, by name."""
    return any(
        isinstance(target, str) and target.startswith(_ROOTS) and _is_theirs(target) for target in _targets(_plain(cfg))
    )


def to_native(sections: Mapping[str, Any], where: str, run: Run | None = None) -> DictConfig:
    """The native config of a Detectron2 config's sections.

    Args:
        sections: dicts or ``DictConfig`` by name; targets may be stand-ins, dotted names or classes.
        where: the file, for messages.
        run: the load of the file, for the datasets that it registers.

    Raises:
        ValueError: something has no native counterpart; names every such key, its target and what is most like it.
    """
    conversion = _Conversion({key: _plain(value) for key, value in sections.items()}, run)
    cfg = conversion.convert()
    if conversion.problems:
        raise ValueError(
            f"config {where}: these parts have no native counterpart:\n"
            + "\n".join(f"  {line}" for line in conversion.problems)
            + "\nchange them in the config, or train it with python -m mimdet.detectron2, which needs Detectron2"
        )
    if os.environ.get("RANK", "0") == "0":
        for line in conversion.notes:
            logger.warning("config %s: %s", Path(where).name, line)
    return cfg


class _Conversion:
    """One config. ``problems`` and ``notes`` are lines that begin with a key."""

    def __init__(self, sections: dict[str, Any], run: Run | None):
        self.problems: list[str] = []
        self.notes: list[str] = []
        self._datasets = run.datasets if run else {}
        self._calls = list(run.calls) if run else []
        self._skipped = dict.fromkeys(run.skipped) if run else {}
        self._used: set[int] = set()
        self._sections = {key: self._as_node(value) for key, value in sections.items()}
        # The values behind interpolations, as long as targets are theirs.
        self._before = OmegaConf.create(self._sections, flags={"allow_objects": True})

    def convert(self) -> DictConfig:
        result = {}
        for key, section in self._sections.items():
            problems = len(self.problems)
            result[key] = self._value(section, key)
            if key not in SECTIONS and len(self.problems) > problems:
                del self.problems[problems:]
                del result[key]
                self.notes.append(f"{key} is left out: no part of the training reads it")
        self._fill(result)
        for call in self._calls:
            if id(call) not in self._used and call.where and counterpart(call.target.name) is None:
                self.notes.append(f"{call.name} in {call.where} is not called: Detectron2's code is not run")
        self.notes += [f"module {name} is not run: it imports Detectron2" for name in self._skipped]
        cfg = OmegaConf.create(result, flags={"allow_objects": True})
        self._keep_references(cfg, "")
        return cfg

    def _keep_references(self, node: Any, prefix: str) -> None:
        """Values in place of the interpolations that refer to what is left out."""
        for key in list(node) if isinstance(node, DictConfig) else range(len(node)):
            path = f"{prefix}{key}"
            if not OmegaConf.is_interpolation(node, key):
                child = None if OmegaConf.is_missing(node, key) else node[key]
                if OmegaConf.is_config(child):
                    self._keep_references(child, f"{path}.")
                continue
            try:
                node[key]
            except OmegaConfBaseException:
                if (value := self._resolved(path)) is not None:
                    node[key] = value

    # Values

    def _value(self, value: Any, path: str) -> Any:
        if path.startswith("model.") and path.rpartition(".")[2] in _NORM_KEYS:
            return self._norm(value, path)
        if isinstance(value, StandIn):
            self._used.add(id(facts_of(value)))
            self._unknown(path, facts_of(value).name, value)
            return None
        if isinstance(value, dict) and TARGET in value:
            return self._call(value, path)
        if isinstance(value, dict):
            return {key: self._value(item, f"{path}.{key}") for key, item in value.items()}
        if type(value) in (list, tuple):
            if path == "dataloader.evaluator" and len(value) != 1:
                self._problem(path, f"{len(value)} evaluators", "a test has one mimdet.evaluation.COCOEvaluator")
                return None
            if path == "dataloader.evaluator":
                return self._value(value[0], f"{path}.0")
            return type(value)(self._value(item, f"{path}.{index}") for index, item in enumerate(value))
        if isinstance(value, functools.partial) and isinstance(value.func, StandIn):
            name = facts_of(value.func).name
            self._problem(path, name, f"nearest: {nearest(name)}" if nearest(name) else "")
        elif _is_local(value):
            self._problem(path, _target_name(value), "only a function or class of an importable module can be saved")
        elif isinstance(value, str) and value.isidentifier() and path.rpartition(".")[2] in _MODULES:
            self._problem(path, repr(value), _REGISTRY)
        return value

    def _as_node(self, value: Any) -> Any:
        """A tree in which calls of classes that have a counterpart are as ``LazyCall`` of them."""
        if isinstance(value, dict):
            return {key: self._as_node(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(map(self._as_node, value))
        facts = facts_of(value) if isinstance(value, StandIn) else None
        known = counterpart(facts.target.name) if facts and facts.target and not facts.needs_detectron2 else None
        if known is None:
            return value
        self._used.add(id(facts))
        names = known.order or tuple(_parameters(known))
        names += tuple(f"argument {index + 1}" for index in range(len(names), len(facts.args)))  # reported as unknown
        positional = dict(zip(names, facts.args, strict=False))
        return {TARGET: facts.target.name, **self._as_node(_plain({**positional, **facts.kwargs}))}

    def _norm(self, norm: Any, path: str) -> Any:
        norm = _norm_name(norm)
        if norm == "nnSyncBN":
            return "SyncBN"
        if isinstance(norm, str) and norm not in _NORMS and "${" not in norm:
            self._problem(path, repr(norm), f"nearest: {_NEAREST_NORM.get(norm, 'BN')}; norms: {', '.join(_NORMS[1:])}")
        elif isinstance(norm, StandIn) or _is_local(norm):
            self._problem(path, _target_name(norm), f"norms: {', '.join(_NORMS[1:])}")
        return norm

    def _call(self, node: dict[str, Any], path: str) -> Any:
        target = node[TARGET]
        name = _target_name(target)
        if isinstance(target, str) and "." not in target:
            self._problem(path, repr(target), _REGISTRY)
            return None
        if _is_local(target) and name in ORIGINAL_IN_CONFIGS and (defaults := _defaults(target, name)) is not None:
            node = node | {key: value for key, value in defaults.items() if key not in node}
            self.notes.append(f"{path}: {name} of the config file is replaced by {counterpart(name).native}")
        elif not _is_theirs(name):
            if _is_local(target) or isinstance(target, StandIn) or _has_detectron2_base(target):
                self._unknown(path, name, target)
                return None
            if name.startswith("mimdet.") and (known := BY_NATIVE.get(name.rpartition(".")[2])):
                return self._arguments(known, node, path) | {TARGET: target}
            children = {key: self._value(value, f"{path}.{key}") for key, value in node.items() if key != TARGET}
            return {TARGET: target, **children}
        known = counterpart(name)
        if known is None:
            self._unknown(path, name, target)
            return None
        return self._arguments(known, self._theirs(known, node, path, name), path)

    def _theirs(self, known: Counterpart, node: dict[str, Any], path: str, name: str) -> dict[str, Any]:
        """The arguments of a Detectron2 node, with the defaults that are not the native ones."""
        node = node | {key: value for key, value in known.defaults.items() if key not in node}
        special = _SPECIAL.get(known.name)
        return special(self, node, path, name) if special else node

    def _arguments(self, known: Counterpart, node: dict[str, Any], path: str) -> dict[str, Any]:
        parameters = _parameters(known)
        result: dict[str, Any] = {TARGET: known.native}
        for key, value in node.items():
            if key == TARGET:
                continue
            if key in parameters or key == PARTIAL:
                result[key] = self._value(value, f"{path}.{key}")
            elif key in known.unused:
                self.notes.append(f"{path}.{key} is left out: it changes no result")
            elif not any(self._equal(value, neutral, f"{path}.{key}") for neutral in known.neutral.get(key, ())):
                what = _shown(value)
                near = nearest(what) or next(iter(difflib.get_close_matches(key, parameters, n=1)), "")
                hint = f"{known.native} has no such argument" + (f"; nearest: {near}" if near else "")
                self._problem(f"{path}.{key}", what, hint)
        runtime = {"model", "params", "dataset"} if known.name.startswith(("get_", "COCO")) else set()
        for key, parameter in parameters.items():
            missing = parameter.default is parameter.empty and key not in result and key not in runtime
            if missing and not node.get(PARTIAL):
                self._problem(f"{path}.{key}", "missing", f"{known.native} needs it")
        return result

    # What a class needs beyond its table entry

    def _evaluator(self, node: dict[str, Any], path: str, name: str) -> dict[str, Any]:
        dataset, tested = (self._resolved(key) for key in (f"{path}.dataset_name", "dataloader.test.dataset.names"))
        if dataset is not None and _one(dataset) != _one(tested):
            self._problem(
                f"{path}.dataset_name", repr(dataset), f"the evaluator tests on dataloader.test.dataset, {tested!r}"
            )
        node.pop("dataset_name", None)
        if "train" in self._sections:
            node.setdefault("output_dir", "${train.output_dir}")
        return node

    def _dataset(self, node: dict[str, Any], path: str, name: str) -> dict[str, Any]:
        names = self._resolved(f"{path}.names")
        if isinstance(names, (list, tuple)):
            if len(names) != 1:
                self._problem(f"{path}.names", repr(list(names)), _DATASET)
                return node
            node = {**node, "names": names[0]}
            names = names[0]
        if names in self._datasets:
            json_file, image_root = self._datasets[names]
            node = {**node, "json_file": json_file, "image_root": image_root}
        return node

    def _mapper(self, node: dict[str, Any], path: str, name: str) -> dict[str, Any]:
        if self._resolved(f"{path}.is_train"):
            node.setdefault("use_instance_mask", False)
        return node

    def _rcnn(self, node: dict[str, Any], path: str, name: str) -> dict[str, Any]:
        node.setdefault("inference", {TARGET: "mimdet.detection.InferencePasses", "passes": 1, "ratio": None})
        return node

    def _train_loader(self, node: dict[str, Any], path: str, name: str) -> dict[str, Any]:
        return {**node, "seed": "${train.seed}"} if "train" in self._sections else node

    def _original_backbone(self, node: dict[str, Any], path: str, name: str) -> dict[str, Any]:
        """The original's classes know true and false alone; its configs have true for lack of memory."""
        if name.startswith("models.") and self._resolved(f"{path}.checkpointing") is True:
            self.notes.append(f"{path}.checkpointing is 'auto': a GPU with enough memory saves instead of recomputing")
            return {**node, "checkpointing": "auto"}
        return node

    def _steps(self, node: dict[str, Any], path: str, name: str) -> dict[str, Any]:
        values, milestones, updates = (
            self._resolved(f"{path}.{key}") for key in ("values", "milestones", "num_updates")
        )
        if milestones is None and updates is not None:
            width = math.ceil(updates / len(values))
            node["milestones"] = [width * step for step in range(1, len(values))]
        elif updates is None and milestones:
            node.update(milestones=list(milestones[:-1]), num_updates=milestones[-1])
        return node

    def _default_params(self, node: dict[str, Any], path: str, name: str) -> dict[str, Any]:
        optimizer = path.rpartition(".")[0]
        for key, option in (("base_lr", "lr"), ("weight_decay", "weight_decay")):
            value, overall = self._resolved(f"{path}.{key}"), self._resolved(f"{optimizer}.{option}")
            if key in node and (value is None or value == overall):
                del node[key]
        if "weight_decay_bias" in node:
            decay = node.pop("weight_decay_bias")
            if decay is not None:
                node["overrides"] = {**(node.get("overrides") or {}), "bias": {"weight_decay": decay}}
        return node

    # Sections

    def _fill(self, cfg: dict[str, Any]) -> None:
        """The keys that native configs have and Detectron2's have not."""
        self._fill_masks(cfg)
        model = cfg.get("model")
        if isinstance(model, dict) and self._resolved("model.input_format") == "BGR":
            del model["input_format"]
            self.notes.append("model.input_format is left out: the mappers' image_format decides, BGR as well as RGB")
        train = cfg.get("train")
        if not isinstance(train, dict):
            return
        if (ema := train.get("model_ema")) and ema.get("enabled"):
            self._problem("train.model_ema.enabled", "True", "no average of the weights is kept: set it to False")
        if train.get("device") == "cuda":
            train["device"] = "auto"
            self.notes.append("train.device is 'auto': a GPU, or the CPU where there is none")
        if isinstance(seed := train.get("seed", 0), int) and seed < 0:
            train["seed"] = 0
            self.notes.append("train.seed is 0: a run is repeatable")
        for key, value in (("seed", 0), ("init_checkpoint_ignore", []), ("clip_grad_norm", None)):
            train.setdefault(key, value)
        if isinstance(train.get("amp"), dict):
            train["amp"].setdefault("dtype", "auto")
        batch = self._resolved("dataloader.train.total_batch_size")
        if batch is not None and "reference_batch_size" not in train:
            train["reference_batch_size"] = batch
            self.notes.append(
                f"train.reference_batch_size is {batch}: another dataloader.train.total_batch_size scales the learning "
                "rate and schedule"
            )
        if "://" in str(train.get("init_checkpoint")):
            self.notes.append(f"train.init_checkpoint: download {train['init_checkpoint']} and name the file")
        if unread := sorted(set(train) - _TRAIN):
            self.notes.append(f"no part of the training reads {', '.join(f'train.{key}' for key in unread)}")

    def _fill_masks(self, cfg: dict[str, Any]) -> None:
        """Detectors without masks test on boxes; annotations for training need masks where the mapper uses them."""
        loader, model = cfg.get("dataloader"), cfg.get("model")
        if not isinstance(loader, dict):
            return
        boxes_alone = isinstance(model, dict) and _target_name(model.get(TARGET, "")).endswith(".RetinaNet")
        mapper = (loader.get("train") or {}).get("mapper") or {}
        uses = {"train": mapper.get("use_instance_mask", True) is not False, "test": not boxes_alone}
        for split, masks in uses.items():
            dataset = (loader.get(split) or {}).get("dataset")
            if isinstance(dataset, dict) and dataset.get(TARGET) == BY_NATIVE["CocoDataset"].native:
                dataset.setdefault("use_masks", masks)

    # Helpers

    def _resolved(self, path: str) -> Any:
        try:
            value = OmegaConf.select(self._before, path)
        except OmegaConfBaseException:
            return None
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value

    def _equal(self, value: Any, neutral: Any, path: str) -> bool:
        if isinstance(value, str) and "${" in value:
            value = self._resolved(path)
        return (list(value) if isinstance(value, (list, tuple)) else value) == neutral

    def _unknown(self, path: str, name: str, target: Any) -> None:
        native = nearest(name)
        hints = [f"nearest: {native}"] if native else []
        if {"augmentations", "augs", "tfm_or_aug"} & set(path.split(".")):
            hints.append(_AUGMENTATION)
        elif path.endswith(".mapper"):
            hints.append("a native mapper is called as mapper(record, rng), as mimdet.data.DatasetMapper is")
        elif not isinstance(target, str) and not name.startswith(_ROOTS):
            hints.append("a native class has another interface, and is in an importable module")
        self._problem(path, name, "; ".join(hints))

    def _problem(self, path: str, what: str, hint: str) -> None:
        self.problems.append(f"{path}: {what}" + (f" ({hint})" if hint else ""))


_SPECIAL: dict[str, Callable[[_Conversion, dict[str, Any], str, str], dict[str, Any]]] = {
    "COCOEvaluator": _Conversion._evaluator,
    "CocoDataset": _Conversion._dataset,
    "DatasetMapper": _Conversion._mapper,
    "GeneralizedRCNN": _Conversion._rcnn,
    "MIMDetDecoder": _Conversion._original_backbone,
    "MIMDetEncoder": _Conversion._original_backbone,
    "MultiStepParamScheduler": _Conversion._steps,
    "RetinaNet": _Conversion._rcnn,
    "build_detection_train_loader": _Conversion._train_loader,
    "get_default_optimizer_params": _Conversion._default_params,
}


def _plain(value: Any) -> Any:
    """A tree of dicts and lists, interpolations as they are written."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=False)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


def _targets(node: Any) -> Iterator[Any]:
    if isinstance(node, dict):
        if TARGET in node:
            yield node[TARGET]
        node = [*node.values()]
    for child in node if isinstance(node, (list, tuple)) else ():
        yield from _targets(child)


def _target_name(target: Any) -> str:
    """The dotted name of a target; for what a config file defines, its name alone."""
    if isinstance(target, StandIn):
        return facts_of(target).name
    if isinstance(target, str):
        return target
    name = getattr(target, "__qualname__", type(target).__name__)
    return name if _is_local(target) else f"{target.__module__}.{name}"


def _is_theirs(name: str) -> bool:
    return name.startswith(_ROOTS) and (not name.startswith("models.") or name.rpartition(".")[2] in ORIGINAL)


def _is_local(value: Any) -> bool:
    """Whether a config file defines this class or function."""
    return callable(value) and not isinstance(value, StandIn) and getattr(value, "__module__", "").startswith(PREFIX)


def _has_detectron2_base(target: Any) -> bool:
    return any(base.__module__.partition(".")[0] in ("detectron2", "fvcore") for base in getattr(target, "__mro__", ()))


def _parameters(known: Counterpart) -> dict[str, inspect.Parameter]:
    """The named arguments of a native callable."""
    signatures = [inspect.signature(resolve_target(name)) for name in (known.rest, known.native) if name]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = {name: p for each in signatures for name, p in each.parameters.items() if p.kind in named}
    replaced = {"box_head", "box_predictor", "proposal_matcher"} if known.name == "CascadeROIHeads" else set()
    return {name: parameter for name, parameter in parameters.items() if name not in replaced}


def _defaults(target: Any, name: str) -> dict[str, Any] | None:
    """Defaults of a config file's function that are not its counterpart's; None if its arguments are others."""
    if isinstance(target, type):
        return {}
    theirs, ours = inspect.signature(target).parameters, _parameters(counterpart(name))
    if list(theirs) != list(ours):
        return None
    return {key: p.default for key, p in theirs.items() if p.default is not p.empty and p.default != ours[key].default}


def _norm_name(norm: Any) -> Any:
    """The name of a norm that is a class or function of Detectron2's; other norms unchanged."""
    result = norm
    if _is_local(norm) or isinstance(norm, functools.partial):
        try:
            result = norm(_CHANNELS)
        except Exception:  # any code: the caller reports it
            return norm
    if not isinstance(result, StandIn):
        return norm
    facts = facts_of(result)
    name = (facts.target or facts).name.rpartition(".")[2]
    if name != "NaiveSyncBatchNorm" or set(facts.kwargs) - {"stats_mode"}:
        return norm
    mode = facts.kwargs.get("stats_mode", "")
    return "naiveSyncBN" + f"_{mode}" * bool(mode)


def _shown(value: Any) -> str:
    if isinstance(value, dict) and TARGET in value:
        return _target_name(value[TARGET])
    value = value.func if isinstance(value, functools.partial) else value
    return _target_name(value) if callable(value) else repr(value)


def _one(names: Any) -> Any:
    return names[0] if isinstance(names, (list, tuple)) and len(names) == 1 else names
