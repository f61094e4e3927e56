"""One run of ``mimdet bench``: limits measured first, the file written after every round, a table at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import environment, views
from .limits import measure_limits
from .measure import Timings, measure, wall_timer
from .row import Results

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Candidate:
    """One thing to time.

    Attributes:
        keys: key columns of its row.
        step: what is timed.
        error: why it is not timed; None if its outputs are correct.
        values: other columns of its row, such as its memory.
    """

    keys: Mapping[str, str | int | float]
    step: Callable[[], object]
    error: str | None = None
    values: Mapping[str, int | float] = field(default_factory=dict)

    def row(self, timings: Timings, name: int) -> dict:
        """Its row with the rounds of ``timings[name]``."""
        return {**self.keys, "status": self.error or "ok", **timings.columns(name), **self.values}


def begin(device: str, dtypes: Iterable[str]) -> Results:
    """Results without rows yet; the machine and its limits, measured now, are printed."""
    limits = measure_limits(device, [DTYPES[dtype] for dtype in dict.fromkeys(dtypes)])
    results = Results(environment.command(), environment.describe(device), dict(limits))
    gemms = [f"GEMM {k.split('_')[1]} {v:.3g} TFLOP/s" for k, v in limits.items() if k.startswith("gemm")]
    machine = f"{results.environment['device']}, {results.environment['threads']} threads"
    views.console().print(", ".join([machine, f"copy {limits['copy_gb_s']:.3g} GB/s", *gemms]))
    return results


def interleave(
    results: Results,
    candidates: Sequence[Candidate],
    rounds: int,
    output: Path,
    finish: Callable[[list[dict]], list[dict]] = list,
) -> list[dict]:
    """Time all candidates without an error in interleaved rounds; their rows are appended to ``results``.

    The file is written before the first round and after each, so that Ctrl-C loses at most one.

    Args:
        rounds: see ``measure``; 0 times nothing.
        finish: sees the rows of all candidates before they are written.
    """
    earlier = list(results.rows)
    rows: list[dict] = []

    def write(timings: Timings) -> None:
        rows[:] = finish([candidate.row(timings, i) for i, candidate in enumerate(candidates)])
        results.rows = [*earlier, *rows]
        results.write(output)

    write(Timings({}))
    runs = {i: candidate.step for i, candidate in enumerate(candidates) if candidate.error is None}
    if runs and rounds:
        with views.progress("rounds", rounds) as advance:
            measure(
                runs, rounds, timer=wall_timer, warmup=1, least=0.0,
                on_round=lambda timings: (write(timings), advance()),
            )  # fmt: skip
    return rows
