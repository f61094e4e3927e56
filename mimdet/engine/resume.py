"""State of random generators, optimizer and loss scaling in checkpoints, for a bitwise resumption."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torch.optim import Optimizer

from ..checkpoint.read import CheckpointError
from ..config import from_yaml


def seed_all(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators, on the CPU and on every GPU."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def get_random_state() -> dict[str, Any]:
    """The state of all generators as tensors and plain values, for a checkpoint."""
    version, internal, gauss = random.getstate()
    algorithm, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [algorithm, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore all generators from a state of :func:`get_random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    algorithm, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((algorithm, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _can_be_set(state: Any) -> bool:
    with isolated_random():
        try:
            set_random_state(state)
        except Exception:  # of a foreign state: many types
            return False
    return True


@contextmanager
def isolated_random() -> Iterator[None]:
    """Restore the global generators after the block."""
    state = get_random_state()
    try:
        yield
    finally:
        set_random_state(state)


logger = logging.getLogger(__name__)


def pack(
    fabric: Fabric, model: nn.Module, optimizer: Optimizer, iteration: int, meta: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of a checkpoint after ``iteration``. Every rank must call it.

    Returns:
        ``model`` and ``optimizer`` state dicts, ``iteration`` (the last finished), ``scaler`` (loss scaling of
        fp16, else empty), ``random`` (generators of each rank) and ``meta``.
    """
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "iteration": iteration,
        "scaler": fabric.strategy.precision.state_dict(),
        "random": _gather(fabric, get_random_state()),
        "meta": dict(meta),
    }


_MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"}
# What a checkpoint of a training holds, see :func:`pack`.
_STATE = {"model": Mapping, "optimizer": Mapping, "iteration": int, "random": list, "meta": Mapping}


def check_resumable(checkpoint: Mapping[str, Any], classes: Sequence[str], source: str) -> None:
    """Refuse a checkpoint of weights only, or one trained for other classes.

    Raises:
        CheckpointError: naming ``source``.
    """
    lacking = [key for key in _STATE if key not in checkpoint]
    if lacking:
        raise CheckpointError(
            f"cannot resume from {source}: it has no {', '.join(lacking)}. To start from its weights, pass it as "
            "train.init_checkpoint without resuming"
        )
    wrong = [key for key, kind in _STATE.items() if not isinstance(checkpoint[key], kind)]
    if not wrong:
        good = {
            "iteration": checkpoint["iteration"] >= 0,
            "meta.classes": isinstance(checkpoint["meta"].get("classes", []), (list, tuple)),
            "random": all(map(_can_be_set, checkpoint["random"])),
        }
        wrong = [key for key, passed in good.items() if not passed]
    if wrong:
        raise CheckpointError(
            f"cannot resume from {source}: its {' and '.join(wrong)} cannot be of a training. Delete the file to "
            "resume from the one before"
        )
    trained = list(checkpoint["meta"].get("classes", classes))
    if trained != list(classes):
        raise CheckpointError(
            f"cannot resume from {source}: it was trained for other classes ({len(trained)}: "
            f"{', '.join(trained[:5])}) than the dataset has ({len(classes)}: {', '.join(list(classes)[:5])})"
        )


def warn_of_changes(checkpoint: Mapping[str, Any], cfg: DictConfig) -> None:
    """Warn of settings that change the order of the data or the random numbers of the checkpoint's run."""
    try:
        before = from_yaml(checkpoint["meta"].get("config") or "")
        for key in ("train.seed", "dataloader.train.total_batch_size"):
            old, new = OmegaConf.select(before, key), OmegaConf.select(cfg, key)
            if old not in (None, new):
                logger.warning("%s is %s, but %s in the run to resume: its data come in another order", key, new, old)
    except (ValueError, OmegaConfBaseException):  # the checkpoint has no config, as YAML could not hold it
        return


def restore(checkpoint: Mapping[str, Any], fabric: Fabric, optimizer: Optimizer, source: str) -> int:
    """Restore optimizer and loss scaling; returns the next iteration.

    Learning rate, weight decay and other options are those of the config; only moments come from the file.

    Raises:
        CheckpointError: the optimizer's state has other parameters.
    """
    configured = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
        _check_moments(optimizer)
    except Exception as error:  # a foreign state raises many types
        raise CheckpointError(
            f"cannot resume from {source}: its optimizer state does not fit ({error}); was the optimizer or the set "
            "of trained parameters changed in the config?"
        ) from error
    for group, options in zip(optimizer.param_groups, configured, strict=True):
        group.update(options)
    if checkpoint.get("scaler"):
        fabric.strategy.precision.load_state_dict(checkpoint["scaler"])
    return checkpoint["iteration"] + 1


def _check_moments(optimizer: Optimizer) -> None:
    """Fused optimizers trust shapes, and write beyond a smaller tensor; NaN would enter the weights at once."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if name in _MOMENTS and value.shape != parameter.shape:
                raise ValueError(f"{name} is {tuple(value.shape)} for a parameter of {tuple(parameter.shape)}")
            if name in _MOMENTS and not value.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinite values")


def restore_random(states: Sequence[Mapping[str, Any]], fabric: Fabric, seed: int) -> None:
    """Restore this rank's generators, or seed them with ``seed`` if the number of processes changed."""
    if len(states) == fabric.world_size:
        set_random_state(states[fabric.global_rank])
        return
    logger.warning(
        "the checkpoint was saved by %d processes and %d resume it: the random numbers start anew",
        len(states),
        fabric.world_size,
    )
    seed_all(seed)


def _gather(fabric: Fabric, value: Any) -> list[Any]:
    if fabric.world_size == 1:
        return [value]
    gathered = [None] * fabric.world_size
    dist.all_gather_object(gathered, value)
    return gathered
