"""Measures time and memory: interleaved rounds, an A/A control, medians of per-round ratios, peaks."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

Run = Callable[[], object]
# (run, calls) -> mean seconds of one call
Timer = Callable[[Run, int], float]

_CONTROL = "control"
_RESAMPLES = 2000
_MAX_CALLS = 100


@dataclass(frozen=True)
class Ratio:
    """Speed-up: the median over rounds and its 95% interval."""

    median: float
    low: float
    high: float

    @property
    def differs(self) -> bool:
        """Whether the interval excludes 1."""
        return self.low > 1 or self.high < 1

    def __format__(self, spec: str) -> str:
        """ "no difference" if the interval includes 1; ``spec`` formats the numbers."""
        spec = spec or ".2f"
        interval = f"[{self.low:{spec}}, {self.high:{spec}}]"
        return f"{self.median:{spec}}x {interval}" if self.differs else f"no difference {interval}"

    def __str__(self) -> str:
        return format(self)


@dataclass
class Timings:
    """Seconds of one call in each round, by name; ``control`` is the first name measured a second time, if it was."""

    samples: dict[Hashable, list[float]]
    control: list[float] = field(default_factory=list)

    @property
    def rounds(self) -> int:
        """Rounds that are complete."""
        return len(self.control)

    def percentiles(self, name: Hashable) -> tuple[float, float, float]:
        """p20, p50 and p80 in seconds."""
        p20, p50, p80 = np.percentile(self.samples[name], [20, 50, 80])
        return float(p20), float(p50), float(p80)

    def control_ratio(self) -> Ratio:
        """The first name against itself: the machine's noise."""
        return paired_ratio(next(iter(self.samples.values())), self.control)

    def columns(self, name: Hashable) -> dict[str, int | float | list[float]]:
        """Columns of a row from its rounds; empty if ``name`` was not timed."""
        if not self.samples.get(name):
            return {}
        times = zip(("p20_ms", "p50_ms", "p80_ms"), (1e3 * s for s in self.percentiles(name)), strict=True)
        intervals = {}
        if self.control:
            control = self.control_ratio()
            intervals = {"control": control.median, "control_low": control.low, "control_high": control.high}
        return {
            "rounds": len(self.samples[name]),
            **{column: rounded(value) for column, value in (*times, *intervals.items())},
            "samples_ms": [rounded(1e3 * s) for s in self.samples[name]],
        }


def measure(
    runs: Mapping[Hashable, Run],
    rounds: int = 15,
    *,
    timer: Timer | None = None,
    warmup: int = 2,
    least: float = 0.005,
    on_round: Callable[[Timings], None] | None = None,
) -> Timings:
    """Time every run in turn, forwards and then backwards (A B B A), ``rounds`` times.

    The order spreads slow drifts of the machine evenly. The first run is timed twice: the second is the control.
    A sample is the mean of both passes of a round, and a pass repeats short runs until ``least`` seconds.

    Args:
        runs: what to time, by name.
        rounds: at least 3.
        timer: by default the wall clock; see ``timer_for``.
        warmup: untimed calls of each run.
        least: seconds of a pass.
        on_round: gets the timings after each round; KeyboardInterrupt between calls loses only the last one.

    Raises:
        ValueError: fewer than 3 rounds, nothing to time, or the control's own name.
    """
    if rounds < 3:
        raise ValueError(f"an interval needs at least 3 rounds, got {rounds}")
    if not runs or _CONTROL in runs:
        raise ValueError(f"runs must be one or more, none called {_CONTROL!r}, got {list(runs)}")
    timer = timer or wall_timer
    entries = {**runs, _CONTROL: next(iter(runs.values()))}
    calls = {}
    for name, run in entries.items():
        for _ in range(warmup):
            run()
        seconds = timer(run, 1)
        calls[name] = min(max(1, round(least / max(seconds, 1e-9))), _MAX_CALLS)
    timings = Timings({name: [] for name in runs})
    order = list(entries)
    for _ in range(rounds):
        passes = [(name, timer(entries[name], calls[name])) for name in (*order, *reversed(order))]
        means = {name: sum(seconds for n, seconds in passes if n == name) / 2 for name in order}
        timings.control.append(means.pop(_CONTROL))
        for name, seconds in means.items():
            timings.samples[name].append(seconds)
        if on_round is not None:
            on_round(timings)
    return timings


def wall_timer(run: Run, calls: int) -> float:
    """Wall clock; on a GPU, until it has finished."""
    _synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    _synchronize()
    return (time.perf_counter() - start) / calls


class CudaTimer:
    """Time between CUDA events, without launch overhead: ``_sleep`` keeps the GPU busy until all calls are queued.

    Args:
        cold: write a buffer of three times the L2 cache before each call.
    """

    def __init__(self, cold: bool):
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        size = 3 * getattr(properties, "L2_cache_size", 64 << 20)
        self._flush = torch.empty(size, dtype=torch.uint8, device="cuda") if cold else None
        self._cycles_per_second = _spin_rate()

    def __call__(self, run: Run, calls: int) -> float:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        queueing = time.perf_counter() - start
        torch.cuda._sleep(int(self._cycles_per_second * min(2 * calls * (queueing + 2e-5), 0.5)))
        for begin, end in events:
            if self._flush is not None:
                self._flush.zero_()
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in events) / calls / 1e3


def timer_for(device: str, cold: bool = False) -> Timer:
    """Timer of single operations on ``device``; whole models always use ``wall_timer``."""
    return CudaTimer(cold) if torch.device(device).type == "cuda" else wall_timer


def paired_ratio(slow: Sequence[float], fast: Sequence[float]) -> Ratio:
    """Median of ``slow / fast`` over rounds measured together, with a bootstrap interval."""
    ratios = np.asarray(slow, float) / np.asarray(fast, float)
    return _interval(np.median(ratios), np.median(ratios[_draws(len(ratios), 0)], axis=1))


def unpaired_ratio(slow: Sequence[float], fast: Sequence[float]) -> Ratio:
    """Ratio of the medians of two separate measurements, with a bootstrap interval."""
    a, b = np.asarray(slow, float), np.asarray(fast, float)
    drawn = np.median(a[_draws(len(a), 0)], axis=1) / np.median(b[_draws(len(b), 1)], axis=1)
    return _interval(np.median(a) / np.median(b), drawn)


def peak_bytes(run: Run, device: str) -> int:
    """Most bytes allocated at once during ``run`` beyond those before it, results included."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def rounded(value: float, digits: int = 5) -> float:
    """To significant digits, for small files."""
    return float(f"{value:.{digits}g}")


def _draws(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, count, (_RESAMPLES, count))


def _interval(median: float, resampled: np.ndarray) -> Ratio:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Ratio(float(median), float(low), float(high))


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _spin_rate() -> float:
    """Cycles that ``torch.cuda._sleep`` spends in a second."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cycles = 10_000_000
    for _ in range(2):
        begin.record()
        torch.cuda._sleep(cycles)
        end.record()
        torch.cuda.synchronize()
    return cycles / (begin.elapsed_time(end) / 1e3)
