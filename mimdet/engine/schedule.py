"""Learning-rate multipliers as functions of training progress, and the linear scaling rule."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Sequence

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
