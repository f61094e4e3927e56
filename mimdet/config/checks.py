"""Checks of a config's values, before anything is built from them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .lazy import TARGET


@dataclass(frozen=True)
class _Rule:
    """``accepts`` tells whether a value is allowed; ``what`` completes "must be ..."."""

    what: str
    accepts: Callable[[Any], bool]

    def __or__(self, other: _Rule) -> _Rule:
        return _Rule(f"{self.what}, or {other.what}", lambda value: self.accepts(value) or other.accepts(value))


def _whole(least: int, most: int | None = None) -> _Rule:
    def accepts(value: Any) -> bool:
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        return whole and least <= value and (most is None or value <= most)

    return _Rule(f"a whole number of at least {least}" + ("" if most is None else f" and at most {most}"), accepts)


def _number(what: str, within: Callable[[float], bool]) -> _Rule:
    def accepts(value: Any) -> bool:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) and within(value)

    return _Rule(f"a number {what}", accepts)


def _list_of(what: str, within: Callable[[float], bool], length: int | None = None, empty: bool = False) -> _Rule:
    number = _number(what, within)

    def accepts(value: Any) -> bool:
        if not _is_list(value):
            return False
        long_enough = len(value) == length if length is not None else empty or len(value) > 0
        return long_enough and all(number.accepts(item) for item in value)

    return _Rule(f"a list of {f'{length} ' if length else ''}{what}", accepts)


def _are_texts(value: Any) -> bool:
    return _is_list(value) and all(isinstance(item, str) for item in value)


def _is_list(value: Any) -> bool:
    return OmegaConf.is_config(value) and not isinstance(value, DictConfig)  # omegaconf 2.4 has configs of tuples too


_PLAIN = (str, Real, ListConfig, type(None))
_NULL = _Rule("null", lambda value: value is None)
_TRUTH = _Rule("true or false", lambda value: isinstance(value, bool))
_TEXT = _Rule("text (a number as text has quotes: '\"5\"')", lambda value: isinstance(value, (str, os.PathLike)))
_PATH = _Rule("the path of a folder", lambda value: _TEXT.accepts(value) and str(value).strip() != "")
_SECTION = _Rule("a section with keys of its own", lambda value: isinstance(value, DictConfig))
_PART = _Rule(
    f"a section with {TARGET}",
    lambda value: TARGET in value if isinstance(value, DictConfig) else not isinstance(value, _PLAIN),
)
_PATTERNS = _Rule("a list of patterns, such as [roi_heads.*]", _are_texts)
_NAMES = _Rule("a list of names", _are_texts)
_DEVICE = r"auto|cpu|mps|cuda(:\d+)?"
_FORMAT = _Rule("RGB or BGR", lambda value: value in ("RGB", "BGR"))
_PERIOD = _Rule(
    "a whole number of at least 1, or 0 or null for never", lambda value: value is None or _whole(0).accepts(value)
)
_POSITIVE = _number("above 0", lambda value: value > 0)
_NOT_NEGATIVE = _number("of at least 0", lambda value: value >= 0)
_RATIO = _number("above 0 and at most 1", lambda value: 0 < value <= 1)

_MOST_IMAGES = 2**16  # of a batch
_MOST_WORKERS = 1024

SECTIONS = {
    "model": _PART,
    "dataloader": _SECTION,
    "dataloader.train": _SECTION,
    "dataloader.train.dataset": _PART,
    "dataloader.train.mapper": _PART,
    "dataloader.test": _SECTION | _NULL,
    "dataloader.test.dataset": _PART,
    "dataloader.test.mapper": _PART,
    "dataloader.evaluator": _PART | _NULL,
    "optimizer": _PART,
    "optimizer.params": _PART,
    "lr_multiplier": _PART,
    "lr_multiplier.scheduler": _PART,
    "train": _SECTION,
    "train.ddp": _SECTION | _NULL,
    "train.amp": _SECTION,
    "train.checkpointer": _SECTION,
}
# Only keys that a config has are checked: detectors and optimizers of users may lack some.
CHECKS: dict[str, _Rule] = {
    **SECTIONS,
    "train.output_dir": _PATH,
    "train.init_checkpoint": _TEXT | _NULL,
    "train.init_checkpoint_ignore": _PATTERNS | _NULL,
    "train.max_iter": _whole(1, 10**9),
    "train.reference_batch_size": _whole(1, _MOST_IMAGES) | _NULL,
    "train.seed": _whole(0, 2**63 - 1),
    "train.device": _Rule(
        "auto, cpu, cuda, cuda:1 or mps", lambda value: re.fullmatch(_DEVICE, str(value)) is not None
    ),
    "train.amp.enabled": _TRUTH,
    "train.amp.dtype": _Rule("auto, bf16 or fp16", lambda value: value in ("auto", "bf16", "fp16")),
    "train.ddp.broadcast_buffers": _TRUTH,
    "train.ddp.find_unused_parameters": _TRUTH,
    "train.ddp.fp16_compression": _TRUTH,
    "train.clip_grad_norm": _POSITIVE | _NULL,
    "train.checkpointer.period": _PERIOD,
    "train.checkpointer.max_to_keep": _whole(1) | _Rule("null for all", _NULL.accepts),
    "train.eval_period": _PERIOD,
    "train.log_period": _whole(1),
    "dataloader.train.total_batch_size": _whole(1, _MOST_IMAGES),
    "dataloader.train.num_workers": _whole(0, _MOST_WORKERS),
    "dataloader.test.batch_size": _whole(1, _MOST_IMAGES),
    "dataloader.test.num_workers": _whole(0, _MOST_WORKERS),
    "dataloader.train.aspect_ratio_grouping": _TRUTH,
    "dataloader.train.seed": _whole(0, 2**63 - 1),
    "dataloader.train.dataset.names": _TEXT | _NULL,
    "dataloader.train.dataset.json_file": _TEXT | _NULL,
    "dataloader.train.dataset.image_root": _TEXT | _NULL,
    "dataloader.train.dataset.filter_empty": _TRUTH,
    "dataloader.train.dataset.use_masks": _TRUTH,
    "dataloader.train.mapper.is_train": _Rule("true", lambda value: value is True),
    "dataloader.train.mapper.image_format": _FORMAT,
    "dataloader.train.mapper.recompute_boxes": _TRUTH,
    "dataloader.train.mapper.use_instance_mask": _TRUTH,
    "dataloader.test.dataset.names": _TEXT | _NULL,
    "dataloader.test.dataset.json_file": _TEXT | _NULL,
    "dataloader.test.dataset.image_root": _TEXT | _NULL,
    "dataloader.test.dataset.filter_empty": _TRUTH,
    "dataloader.test.dataset.use_masks": _TRUTH,
    "dataloader.test.mapper.is_train": _TRUTH,
    "dataloader.test.mapper.image_format": _FORMAT,
    "dataloader.evaluator.output_dir": _PATH | _NULL,
    "dataloader.evaluator.max_dets_per_image": _whole(1, 10**6) | _NULL,
    "optimizer.lr": _NOT_NEGATIVE,
    "optimizer.betas": _list_of("numbers of at least 0 and below 1", lambda value: 0 <= value < 1, length=2),
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.params.base_lr": _NOT_NEGATIVE,
    "optimizer.params.skip_list": _NAMES,
    "optimizer.params.weight_decay": _NOT_NEGATIVE,
    "optimizer.params.weight_decay_norm": _NOT_NEGATIVE | _NULL,
    "optimizer.params.multiplier": _POSITIVE,
    "lr_multiplier.warmup_length": _number("of at least 0 and below 1", lambda value: 0 <= value < 1),
    "lr_multiplier.warmup_factor": _NOT_NEGATIVE,
    "lr_multiplier.scheduler.values": _list_of("numbers of at least 0", lambda value: value >= 0),
    "lr_multiplier.scheduler.milestones": _list_of(
        "whole numbers of at least 1", lambda value: isinstance(value, Integral) and value >= 1, empty=True
    ),
    "lr_multiplier.scheduler.num_updates": _whole(1),
    "lr_multiplier.scheduler.start_value": _NOT_NEGATIVE,
    "lr_multiplier.scheduler.end_value": _NOT_NEGATIVE,
    "model.num_classes": _whole(1),
    "model.roi_heads.num_classes": _whole(1),
    "model.backbone.bottom_up.sample_ratio": _RATIO,
    "model.backbone.bottom_up.inference_sample_ratio": _RATIO,
    "model.inference.passes": _whole(1),
    "model.inference.ratio": _RATIO | _NULL,
}


def check_config(cfg: DictConfig) -> None:
    """Refuse a config with values that cannot work, from a file or an override.

    Raises:
        ValueError: names every such key, its value and what it must be, and every broken interpolation.
    """
    # A value that is no section breaks the references into it. A value behind a reference has a key of its own.
    problems = (
        _problems(cfg, SECTIONS, False)
        or list(_broken_interpolations(cfg, ""))
        or _problems(cfg, CHECKS, False)
        or _problems(cfg, CHECKS, True)
    )
    if problems:
        raise ValueError("config: " + "\n".join(problems))


def _problems(cfg: DictConfig, rules: Mapping[str, _Rule], references: bool) -> list[str]:
    """Of values that are written in the config, or of those that it refers to."""
    return [
        f"{key}={_shown(value)}: must be {rule.what}"
        for key, rule in rules.items()
        for value, is_reference in _values(cfg, key.split("."))
        if is_reference == references and not rule.accepts(value)
    ]


def _values(node: Any, path: list[str]) -> Iterator[tuple[Any, bool]]:
    """The value at ``path``, if the config has it, and whether it is reached by a reference."""
    is_reference = False
    for key in path:
        if not isinstance(node, DictConfig) or key not in node:
            return
        is_reference |= OmegaConf.is_interpolation(node, key)
        try:
            node = node[key]
        except OmegaConfBaseException:  # a broken interpolation is told as such
            return
    yield node, is_reference


def _broken_interpolations(node: DictConfig | ListConfig, prefix: str) -> Iterator[str]:
    for key in list(node) if isinstance(node, DictConfig) else range(len(node)):
        name = f"{prefix}{key}"
        if OmegaConf.is_interpolation(node, key):
            try:
                node[key]
            except (OmegaConfBaseException, RecursionError) as error:
                text = OmegaConf.to_container(node, resolve=False)[key]
                reason = str(error).splitlines()[0] if not isinstance(error, RecursionError) else "it refers to itself"
                yield f"{name}={_shown(text)}: {reason}"
        elif not OmegaConf.is_missing(node, key) and isinstance(child := node[key], (DictConfig, ListConfig)):
            yield from _broken_interpolations(child, f"{name}.")


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return repr(OmegaConf.to_container(value, resolve=False) if isinstance(value, (DictConfig, ListConfig)) else value)
