"""The config that a command runs: the user's, fitted once to the batch size and to the classes of the data."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection
from typing import Any

from omegaconf import DictConfig, OmegaConf

logger = logging.getLogger(__name__)

_CLASS_KEYS = ("model.roi_heads.num_classes", "model.num_classes")


def final_config(cfg: DictConfig, dataset: Any, user_keys: Collection[str] = (), training: bool = False) -> DictConfig:
    """A read-only copy of ``cfg`` with the classes of ``dataset``; log lines say what changed.

    Args:
        dataset: has ``classes``, the names by label.
        user_keys: keys that the user set, see :func:`mimdet.config.override_keys`.
        training: fit the schedule to the batch size as well.

    Raises:
        ValueError: the user set another number of classes.
    """
    cfg = copy.deepcopy(cfg)
    if training:
        for line in scale_to_batch_size(cfg, user_keys):
            logger.info("%s", line)
    match_num_classes(cfg, dataset, user_keys)
    OmegaConf.set_readonly(cfg, True)
    return cfg


def match_num_classes(cfg: DictConfig, dataset: Any, user_keys: Collection[str] = ()) -> None:
    """Set the model's ``num_classes`` to the dataset's, in place, and log the change.

    Args:
        dataset: has ``classes``, the names by label.
        user_keys: keys that the user set; they do not change.

    Raises:
        ValueError: the user overrode the key to another number.
    """
    key, configured = num_classes(cfg)
    count = len(dataset.classes)
    if configured is None or configured == count:
        return
    if key in user_keys:
        raise ValueError(f"{key}={configured} was given, but the dataset has {count} classes: {_names(dataset)}")
    OmegaConf.update(cfg, key, count)
    logger.info("%s = %d (was %d), from the dataset: %s", key, count, configured, _names(dataset))


def num_classes(cfg: DictConfig) -> tuple[str, int | None]:
    """The config key of the detector's number of classes, and the number; None if no such key is set."""
    counts = {key: OmegaConf.select(cfg, key) for key in _CLASS_KEYS}
    return next(((key, count) for key, count in counts.items() if count is not None), (_CLASS_KEYS[0], None))


def scale_to_batch_size(cfg: DictConfig, user_keys: Collection[str] = ()) -> list[str]:
    """Scale the learning rate and the iteration counts with the batch size, in place.

    The values in a config are for batches of ``train.reference_batch_size``. A batch k times as large multiplies the
    learning rate by k (linear scaling rule) and divides ``train.max_iter``, ``train.checkpointer.period`` and
    ``train.eval_period`` by k: the number of images is the same. Then ``train.reference_batch_size`` becomes the batch
    size, so that a second call, or training from the saved config, does not scale again.

    Args:
        cfg: the whole config.
        user_keys: keys that the user set; they do not change.

    Returns:
        Lines for the log with old and new values; empty if the batch size is the reference.
    """
    batch = cfg.dataloader.train.total_batch_size
    reference = cfg.train.get("reference_batch_size") or batch
    if batch < 1:
        raise ValueError(f"dataloader.train.total_batch_size={batch} must be at least 1")
    if batch == reference:
        return []
    lines = [f"batch of {batch} images instead of {reference}: scaling the schedule, override a key to keep it"]
    for key in ("optimizer.lr", "train.max_iter", "train.checkpointer.period", "train.eval_period"):
        old = OmegaConf.select(cfg, key)
        if not old:
            continue
        if key in user_keys or any(key.startswith(f"{parent}.") for parent in user_keys):
            lines.append(f"  {key} = {old}, as overridden")
            continue
        new = old * batch / reference if key == "optimizer.lr" else max(1, round(old * reference / batch))
        OmegaConf.update(cfg, key, new)
        lines.append(f"  {key} = {new:g} (was {old:g})" if key == "optimizer.lr" else f"  {key} = {new} (was {old})")
    cfg.train.reference_batch_size = batch
    return lines


def _names(dataset: Any) -> str:
    shown = ", ".join(map(str, dataset.classes[:8]))
    return shown + (", ..." if len(dataset.classes) > 8 else "")
