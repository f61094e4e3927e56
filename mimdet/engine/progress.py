"""How far a training is and how it does: a progress bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import datetime
import logging
import statistics
from collections import deque
from collections.abc import Mapping

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

logger = logging.getLogger(__name__)

_WINDOW = 20


class TrainingProgress:
    """Reports steps; losses and times are medians over the last 20.

    Counts in messages are of finished iterations, so the line for iteration 1874 says 1875.

    Args:
        max_iter, start: total iterations and those finished before.
        batch_size: images in a step over all processes.
        log_period: iterations between plain lines.
        console: terminal for the bar; None shows none.
    """

    def __init__(self, max_iter: int, start: int, batch_size: int, log_period: int, console: Console | None = None):
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.log_period = log_period
        self._start = start
        self._recent: dict[str, deque[float]] = {}
        self._bar: Progress | None = None
        if console is not None:
            columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.fields[status]}"))
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("training", total=max_iter, completed=start, status="")
            self._bar.start()

    def due(self, iteration: int) -> bool:
        """Whether this iteration's figures are written down."""
        return (iteration + 1) % self.log_period == 0 or iteration + 1 == self.max_iter

    def step(self, iteration: int, losses: Mapping[str, float], lr: float, seconds: float, data_seconds: float) -> None:
        """Report a finished iteration: its losses, base learning rate, and seconds, of which for waiting for data."""
        for key, value in {**losses, "seconds": seconds, "data": data_seconds}.items():
            self._recent.setdefault(key, deque(maxlen=_WINDOW)).append(value)
        due = self.due(iteration) or iteration == self._start
        if due or self._bar is not None:
            line, short = self._lines(iteration, lr)
            if self._bar is not None:
                self._bar.update(self._task, completed=iteration + 1, status=short)
            if due:
                logger.info("%d/%d %s", iteration + 1, self.max_iter, line, extra={"file_only": True})

    def close(self) -> None:
        """Take the bar down."""
        if self._bar is not None:
            with contextlib.suppress(OSError):  # the terminal may be gone
                self._bar.stop()

    def _lines(self, iteration: int, lr: float) -> tuple[str, str]:
        """All figures for the log, and the few that fit behind a bar in 80 columns."""
        median = {key: statistics.median(values) for key, values in self._recent.items()}
        seconds, data = median.pop("seconds"), median.pop("data")
        losses = " ".join(f"{key.removeprefix('loss_')} {value:.4g}" for key, value in median.items())
        eta = datetime.timedelta(seconds=round(seconds * (self.max_iter - iteration - 1)))
        speed = f"{seconds:.3f} s/it (data {data:.3f}) {self.batch_size / max(seconds, 1e-9):.1f} images/s"
        total = f"loss {median['total_loss']:.3f} " if "total_loss" in median else ""
        line = f"{losses} lr {lr:.3g} {speed} eta {eta}{_gpu_memory()}"
        return line, f"{total}{seconds:.2f} s/it eta {eta}"


def _gpu_memory() -> str:
    if not torch.cuda.is_available():
        return ""
    return f" mem {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
