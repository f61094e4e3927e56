"""``mimdet bench compare``: changes between two files of results."""

from __future__ import annotations

from pathlib import Path

from . import views
from .measure import Ratio, unpaired_ratio
from .row import Results, key

# Baselines of the speed-ups that ``agreement`` compares.
_BASELINES = ("eager", "inductor", "original", "original-sdpa", "sdpa-compile", "canvas")
# Unit -> column of rows that has it.
_COMPARED = {"ms": "p50_ms", "count": "count", "predicted us": "predicted_us"}


def compare(before: Results, after: Results) -> list[dict]:
    """Every row that both files have, in the order of the first: its name, both times, counts and predicted
    times, and the second's speed-up.

    The intervals do not cover differences between runs: load, clocks, temperature.

    Raises:
        ValueError: no row in common.
    """
    others = {key(row): row for row in after.rows}
    changes = []
    for row in before.rows:
        other = others.get(key(row))
        if other is not None:
            slow, fast = row.get("samples_ms"), other.get("samples_ms")
            change = {"name": " ".join(str(value) for _, value in key(row))}
            for unit, column in _COMPARED.items():
                change |= {f"before_{unit}": row.get(column), f"after_{unit}": other.get(column)}
            changes.append(change | {"speedup": unpaired_ratio(slow, fast) if slow and fast else None})
    if not changes:
        raise ValueError("the files have no row in common: rows are equal in all key columns, see mimdet/bench/row.py")
    return changes


def agreement(before: Results, after: Results) -> tuple[int, int]:
    """How many speed-ups over baselines both files give for the same row, and how many of these have intervals that
    overlap."""
    first, second = speedups(before), speedups(after)
    both = [(first[name], second[name]) for name in first if name in second]
    return len(both), sum(a.low <= b.high and b.low <= a.high for a, b in both)


def speedups(results: Results) -> dict[tuple, Ratio]:
    """(row's key, baseline) -> how many times as fast the row is."""
    over = {name: views.speedup_over(name, results.rows) for name in _BASELINES}
    ratios = {(key(row), name): of(row) for row in results.rows for name, of in over.items()}
    return {place: ratio for place, ratio in ratios.items() if ratio is not None}


def show(first: Path, second: Path) -> list[dict]:
    """Print the comparison of two files."""
    before, after = Results.read(first), Results.read(second)
    changes = compare(before, after)
    out = views.console()
    for path, results in ((first, before), (second, after)):
        environment = results.environment
        described = (environment.get("date"), environment.get("device"), f"commit {environment.get('commit')}")
        out.print(f"{path.name}: {', '.join(map(str, described))}")
    names = ("device", "threads", "versions", "variables")
    differing = [name for name in names if before.environment.get(name) != after.environment.get(name)]
    if differing:
        out.print(f"the runs differ in {', '.join(differing)}", style="yellow")
    columns = [
        ("row", "name", ""),
        *(
            (f"{path.name} {unit}", f"{side}_{unit}", "d" if unit == "count" else ".4g")
            for unit in _COMPARED
            for side, path in (("before", first), ("after", second))
        ),
        ("second's speed over first's", "speedup", ".2f"),
    ]
    out.print(views.terminal(f"{len(changes)} rows in both", columns, changes))
    both, agreeing = agreement(before, after)
    if both:
        out.print(f"speed-ups over baselines: of {both} in both files, {agreeing} have intervals that overlap")
    alone = len(before.rows) + len(after.rows) - 2 * len(changes)
    if alone:
        out.print(f"{alone} rows are in one file only")
    return changes
