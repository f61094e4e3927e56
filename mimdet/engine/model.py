"""Build the detector of a config, with the number of classes of its data."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from ..config import instantiate

logger = logging.getLogger(__name__)

_PRETRAINED = ("pretrained", "stem_pretrained")  # arguments that name files of pre-trained weights
_CLASS_KEYS = ("model.roi_heads.num_classes", "model.num_classes")


def match_num_classes(cfg: DictConfig, dataset: Any, overrides: Iterable[str] = ()) -> None:
    """Set the model's ``num_classes`` to the dataset's, in place, and log the change.

    Args:
        dataset: has ``classes``, the names by label.
        overrides: the user's ``key=value`` strings.

    Raises:
        ValueError: the user overrode the key to another number.
    """
    key, configured = num_classes(cfg)
    count = len(dataset.classes)
    if configured is None or configured == count:
        return
    if any(override.partition("=")[0].strip() == key for override in overrides):
        raise ValueError(f"{key}={configured} was given, but the dataset has {count} classes: {_names(dataset)}")
    OmegaConf.update(cfg, key, count)
    logger.info("%s = %d (was %d), from the dataset: %s", key, count, configured, _names(dataset))


def num_classes(cfg: DictConfig) -> tuple[str, int | None]:
    """The config key of the detector's number of classes, and the number; None if no such key is set."""
    counts = {key: OmegaConf.select(cfg, key) for key in _CLASS_KEYS}
    return next(((key, count) for key, count in counts.items() if count is not None), (_CLASS_KEYS[0], None))


def build_model(cfg: DictConfig, pretrained: bool = True) -> nn.Module:
    """The config's model in channels_last memory, which is faster for convolutions.

    Without ``pretrained`` no file is read: ``mae_checkpoint.path`` and the arguments ``pretrained`` and
    ``stem_pretrained`` of every part become None. The caller loads other weights.
    """
    if not pretrained:
        cfg = copy.deepcopy(cfg)
        _clear_pretrained(cfg.model)
        if OmegaConf.select(cfg, "mae_checkpoint.path") is not None:
            cfg.mae_checkpoint.path = None
    return instantiate(cfg.model).to(memory_format=torch.channels_last)


def _clear_pretrained(node: DictConfig | ListConfig) -> None:
    for key in range(len(node)) if isinstance(node, ListConfig) else list(node):
        if key in _PRETRAINED:
            node[key] = None
            continue
        if not (OmegaConf.is_interpolation(node, key) or OmegaConf.is_missing(node, key)):
            child = node[key]
            if isinstance(child, (DictConfig, ListConfig)):
                _clear_pretrained(child)


def _names(dataset: Any) -> str:
    shown = ", ".join(map(str, dataset.classes[:8]))
    return shown + (", ..." if len(dataset.classes) > 8 else "")
