"""Learning-rate multipliers as functions of training progress, and the linear scaling rule."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

from omegaconf import DictConfig, OmegaConf

Scheduler = Callable[[float], float]


class MultiStepParamScheduler:
    """A value that changes at milestones.

    Args:
        values: one more than there are milestones.
        milestones: updates at which the next value begins, increasing.
        num_updates: length of the schedule in the unit of the milestones. Milestones are relative to
            it: a shorter or longer training has them at the same progress.

    Raises:
        ValueError: the counts do not fit, or the milestones do not increase within the schedule.
    """

    def __init__(self, values: Sequence[float], milestones: Sequence[int], num_updates: int):
        if len(values) != len(milestones) + 1:
            raise ValueError(
                f"lr_multiplier.scheduler: {len(milestones)} milestones need {len(milestones) + 1} values, "
                f"not {len(values)}"
            )
        ends = [*milestones, num_updates]
        if any(later <= earlier for earlier, later in itertools.pairwise(ends)):
            raise ValueError(
                f"lr_multiplier.scheduler: milestones {list(milestones)} must increase and stay below "
                f"num_updates={num_updates}"
            )
        self.values = list(values)
        self.milestones = list(milestones)
        self.num_updates = num_updates

    def __call__(self, where: float) -> float:
        """The value at progress ``where`` in [0, 1)."""
        # Rounding: iteration / max_iter * num_updates may be slightly below a milestone.
        update = math.floor(where * self.num_updates + 1e-6)
        return self.values[bisect.bisect_right(self.milestones, update)]


class CosineParamScheduler:
    """Half a cosine from ``start_value`` to ``end_value``."""

    def __init__(self, start_value: float, end_value: float):
        self.start_value = start_value
        self.end_value = end_value

    def __call__(self, where: float) -> float:
        """The value at progress ``where`` in [0, 1)."""
        weight = (1 + math.cos(math.pi * where)) / 2
        return self.end_value + (self.start_value - self.end_value) * weight


class WarmupParamScheduler:
    """A schedule with linear warmup.

    It rises from ``warmup_factor * scheduler(0)`` to ``scheduler(warmup_length)``, then follows ``scheduler``.

    Args:
        scheduler: the schedule to follow.
        warmup_length: fraction of the training, in [0, 1).
        warmup_factor: first value of the warmup, as a fraction of ``scheduler(0)``.

    Raises:
        ValueError: ``warmup_length`` is not in [0, 1).
    """

    def __init__(self, scheduler: Scheduler, warmup_length: float, warmup_factor: float):
        if not 0 <= warmup_length < 1:
            raise ValueError(f"lr_multiplier.warmup_length={warmup_length} is a fraction of the training: in [0, 1)")
        self.scheduler = scheduler
        self.warmup_length = warmup_length
        self.warmup_factor = warmup_factor

    def __call__(self, where: float) -> float:
        """The value at progress ``where`` in [0, 1)."""
        if where >= self.warmup_length:
            return self.scheduler(where)
        start = self.warmup_factor * self.scheduler(0.0)
        end = self.scheduler(self.warmup_length)
        return start + (end - start) * (where / self.warmup_length)


def scale_to_batch_size(cfg: DictConfig, overrides: Iterable[str] = ()) -> list[str]:
    """Scale the learning rate and the iteration counts with the batch size, in place.

    The values in a config are for batches of ``train.reference_batch_size``. A batch k times as large multiplies the
    learning rate by k (linear scaling rule) and divides ``train.max_iter``, ``train.checkpointer.period`` and
    ``train.eval_period`` by k: the number of images is the same. Keys that the user overrode do not change. Then
    ``train.reference_batch_size`` becomes the batch size, so that a second call, or training from the saved config,
    does not scale again.

    Args:
        cfg: the whole config.
        overrides: the user's ``key=value`` strings.

    Returns:
        Lines for the log with old and new values; empty if the batch size is the reference.
    """
    batch = cfg.dataloader.train.total_batch_size
    reference = cfg.train.get("reference_batch_size") or batch
    if batch < 1:
        raise ValueError(f"dataloader.train.total_batch_size={batch} must be at least 1")
    if batch == reference:
        return []
    overridden = {override.partition("=")[0].strip() for override in overrides}
    lines = [f"batch of {batch} images instead of {reference}: scaling the schedule, override a key to keep it"]
    for key in ("optimizer.lr", "train.max_iter", "train.checkpointer.period", "train.eval_period"):
        old = OmegaConf.select(cfg, key)
        if not old:
            continue
        if any(key == name or key.startswith(name + ".") for name in overridden):
            lines.append(f"  {key} = {old}, as overridden")
            continue
        new = old * batch / reference if key == "optimizer.lr" else max(1, round(old * reference / batch))
        OmegaConf.update(cfg, key, new)
        lines.append(f"  {key} = {new:g} (was {old:g})" if key == "optimizer.lr" else f"  {key} = {new} (was {old})")
    cfg.train.reference_batch_size = batch
    return lines
