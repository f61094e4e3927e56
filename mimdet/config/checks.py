"""Checks of a config's values, before anything is built from them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


@dataclass(frozen=True)
class _Rule:
    """``accepts`` tells whether a value is allowed; ``what`` completes "must be ..."."""

    what: str
    accepts: Callable[[Any], bool]

    def __or__(self, other: _Rule) -> _Rule:
        return _Rule(f"{self.what}, or {other.what}", lambda value: self.accepts(value) or other.accepts(value))


def _whole(least: int) -> _Rule:
    def accepts(value: Any) -> bool:
        return isinstance(value, Integral) and not isinstance(value, bool) and value >= least

    return _Rule(f"a whole number of at least {least}", accepts)


def _number(what: str, within: Callable[[float], bool]) -> _Rule:
    def accepts(value: Any) -> bool:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) and within(value)

    return _Rule(f"a number {what}", accepts)


_NULL = _Rule("null", lambda value: value is None)
_TRUTH = _Rule("true or false", lambda value: isinstance(value, bool))
_TEXT = _Rule("text (a number as text has quotes: '\"5\"')", lambda value: isinstance(value, (str, os.PathLike)))
_PATH = _Rule("the path of a folder", lambda value: _TEXT.accepts(value) and str(value).strip() != "")
_SECTION = _Rule("a section with keys of its own", lambda value: isinstance(value, DictConfig))
_PATTERNS = _Rule(
    "a list of patterns, such as [roi_heads.*]",
    lambda value: isinstance(value, ListConfig) and all(isinstance(item, str) for item in value),
)
_PERIOD = _Rule(
    "a whole number of at least 1, or 0 or null for never", lambda value: value is None or _whole(0).accepts(value)
)
_POSITIVE = _number("above 0", lambda value: value > 0)
_NOT_NEGATIVE = _number("of at least 0", lambda value: value >= 0)
_RATIO = _number("above 0 and at most 1", lambda value: 0 < value <= 1)

# Only keys that a config has are checked: detectors and optimizers of users may lack some.
CHECKS: dict[str, _Rule] = {
    "model": _SECTION,
    "dataloader": _SECTION,
    "dataloader.train": _SECTION,
    "optimizer": _SECTION,
    "lr_multiplier": _SECTION,
    "train": _SECTION,
    "train.amp": _SECTION,
    "train.checkpointer": _SECTION,
    "train.output_dir": _PATH,
    "train.init_checkpoint": _TEXT | _NULL,
    "train.init_checkpoint_ignore": _PATTERNS | _NULL,
    "train.max_iter": _whole(1),
    "train.reference_batch_size": _whole(1) | _NULL,
    "train.seed": _whole(0),
    "train.device": _TEXT,
    "train.amp.enabled": _TRUTH,
    "train.clip_grad_norm": _POSITIVE | _NULL,
    "train.checkpointer.period": _PERIOD,
    "train.checkpointer.max_to_keep": _whole(1) | _Rule("null for all", _NULL.accepts),
    "train.eval_period": _PERIOD,
    "train.log_period": _whole(1),
    "dataloader.train.total_batch_size": _whole(1),
    "dataloader.train.num_workers": _whole(0),
    "dataloader.test.batch_size": _whole(1),
    "dataloader.test.num_workers": _whole(0),
    "optimizer.lr": _NOT_NEGATIVE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.params.multiplier": _POSITIVE,
    "lr_multiplier.warmup_length": _number("of at least 0 and below 1", lambda value: 0 <= value < 1),
    "lr_multiplier.warmup_factor": _NOT_NEGATIVE,
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
    problems = list(_broken_interpolations(cfg, "")) or [
        f"{key}={_shown(value)}: must be {rule.what}"
        for key, rule in CHECKS.items()
        for value in _values(cfg, key.split("."))
        if not rule.accepts(value)
    ]
    if problems:
        raise ValueError("config: " + "\n".join(problems))


def _values(node: Any, path: list[str]) -> Iterator[Any]:
    """The value at ``path``, if the config has it."""
    for key in path:
        if not isinstance(node, DictConfig) or key not in node:
            return
        node = node[key]
    yield node


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
