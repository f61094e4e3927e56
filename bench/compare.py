"""``mimdet bench compare``: what changed between two files of results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import report
from .measure import Ratio, unpaired_ratio
from .results import KEYS, Results


@dataclass(frozen=True)
class Change:
    """One row that both files have; ``speedup`` is of the second file over the first, None where a figure lacks."""

    name: str
    before_ms: float | None
    after_ms: float | None
    speedup: Ratio | None


def compare(before: Results, after: Results) -> list[Change]:
    """Every row that both files have, in the order of the first.

    The intervals know nothing of what differs between two runs as such: load, clocks, temperature.

    Raises:
        ValueError: results of different kinds, or without a row in common.
    """
    if before.kind != after.kind:
        raise ValueError(f"the files hold different kinds of results: {before.kind!r} and {after.kind!r}")
    keys = KEYS[before.kind]
    others = {tuple(row[k] for k in keys): row for row in after.rows}
    changes = []
    for row in before.rows:
        key = tuple(row[k] for k in keys)
        if key in others:
            first, second = row["samples_ms"], others[key]["samples_ms"]
            speedup = unpaired_ratio(first, second) if first and second else None
            changes.append(Change(" ".join(map(str, key)), row["p50_ms"], others[key]["p50_ms"], speedup))
    if not changes:
        raise ValueError(f"the files have no row in common; rows are named by {', '.join(keys)}")
    return changes


def agreement(before: Results, after: Results) -> tuple[int, int]:
    """How many speed-ups over peers both files give for the same row, and how many of these have intervals that
    overlap."""
    keys = KEYS[before.kind]
    others = {tuple(row[k] for k in keys): row for row in after.rows}
    both = agreeing = 0
    for row in before.rows:
        other = others.get(tuple(row[k] for k in keys), {})
        for name in [k for k in row if k.startswith("vs_") and not k.endswith(("_low", "_high"))]:
            if row[name] is not None and other.get(name) is not None:
                both += 1
                low, high = f"{name}_low", f"{name}_high"
                agreeing += row[low] <= other[high] and other[low] <= row[high]
    return both, agreeing


def show(first: Path, second: Path) -> list[Change]:
    """Print the comparison of two files."""
    before, after = Results.read(first), Results.read(second)
    changes = compare(before, after)
    out = report.console()
    for name, results in ((first.name, before), (second.name, after)):
        there = results.environment
        out.print(f"{name}: {there.get('date')}, {there.get('device')}, commit {there.get('commit')}")
    differing = _differences(before, after)
    if differing:
        out.print(f"the runs differ in {', '.join(differing)}", style="yellow")
    body = [
        (c.name, report.number(c.before_ms, ".4g"), report.number(c.after_ms, ".4g"), str(c.speedup or "-"))
        for c in changes
    ]
    columns = ("row", f"{first.name} ms", f"{second.name} ms", "second's speed over first's")
    out.print(report.table(f"{len(changes)} rows in both", columns, body))
    both, agreeing = agreement(before, after)
    if both:
        out.print(f"speed-ups over peers: of {both} in both files, {agreeing} have intervals that overlap")
    alone = len(before.rows) + len(after.rows) - 2 * len(changes)
    if alone:
        out.print(f"{alone} rows are in one file only")
    return changes


def _differences(before: Results, after: Results) -> Sequence[str]:
    return [
        k
        for k in ("device", "threads", "versions", "variables")
        if before.environment.get(k) != after.environment.get(k)
    ]
