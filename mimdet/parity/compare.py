"""``mimdet parity --compare``: what changed between two environments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from .report import printable, read
from .run import FAILED

_SMALLEST = 0.5  # ulps; growth below is rounding of another order


@dataclass(frozen=True)
class Growth:
    """A case's error in two environments; None where it raised an error.

    Attributes:
        ulps: by how many units in the last place of the output's dtype, at the output's scale, it grew.
        share: error / budget in the second.
    """

    id: str
    tensor: str
    before: float | None
    after: float | None
    ulps: float | None
    share: float | None
    fails: bool


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side.

    Attributes:
        environment: (what, in the first, in the second) where they differ.
        grown: the largest growth first.
        shrunk: how many errors became smaller.
        same: how many cases have errors within half a unit in the last place.
        auto: (operation, device and dtype; in the first, in the second) where ``auto`` took another implementation.
        only_first, only_second: ids of cases that one run alone has.
        newly_failed: ids that passed in the first and fail in the second.
    """

    environment: list[tuple[str, str, str]]
    grown: list[Growth]
    shrunk: int
    same: int
    auto: list[tuple[str, str, str]]
    only_first: list[str]
    only_second: list[str]
    newly_failed: list[str]


def compare(first: Path, second: Path) -> Comparison:
    """Two files of ``mimdet parity --json``.

    Raises:
        BadUseError: a file is missing, is something else, or another version wrote it.
    """
    a, b = read(first), read(second)
    before, after = ({row["id"]: row for row in content["cases"]} for content in (a, b))
    grown, shrunk, same = [], 0, 0
    shared = [name for name in after if name in before]
    for name in shared:
        growth = _growth(before[name], after[name])
        if growth.fails or growth.ulps is None or growth.ulps > _SMALLEST:
            grown.append(growth)
        elif growth.ulps < -_SMALLEST:
            shrunk += 1
        else:
            same += 1
    grown.sort(key=lambda g: (g.fails, float("inf") if g.ulps is None else g.ulps), reverse=True)
    return Comparison(
        environment=_differences(_flat(a["environment"]), _flat(b["environment"])),
        grown=grown,
        shrunk=shrunk,
        same=same,
        auto=_differences(a["auto"], b["auto"]),
        only_first=[name for name in before if name not in after],
        only_second=[name for name in after if name not in before],
        newly_failed=[growth.id for growth in grown if growth.fails],
    )


def _growth(before: Mapping[str, Any], after: Mapping[str, Any]) -> Growth:
    fails = after["status"] == FAILED and before["status"] != FAILED
    errors = before["error"], after["error"]
    ulps = share = None
    if after["error"] is not None:
        share = after["error"] / after["budget"] if after["budget"] else None
        if before["error"] is not None:
            grown, ulp = after["error"] - before["error"], after["ulp"] or before["ulp"]
            ulps = grown / ulp if ulp else grown  # integers are counted
        else:
            ulps = -float("inf")  # an exception before
    elif before["error"] is None:
        ulps = 0.0  # an exception in both
    return Growth(after["id"], after["tensor"], *errors, ulps, share, fails)


def _flat(values: Mapping[str, Any]) -> dict[str, str]:
    """What may change numbers; not the date or the load."""
    kept = {k: values[k] for k in ("processor", "gpu", "driver", "threads", "cores") if values.get(k) is not None}
    nested = {**values.get("versions", {}), **values.get("variables", {})}
    return {k: str(v) for k, v in {**nested, **kept}.items()}


def _differences(first: Mapping[str, str], second: Mapping[str, str]) -> list[tuple[str, str, str]]:
    names = dict.fromkeys([*first, *second])
    return [(n, first.get(n, "-"), second.get(n, "-")) for n in names if first.get(n) != second.get(n)]


def tables(result: Comparison) -> list[Table]:
    """For a terminal; only those with rows."""
    drawn = []
    for title, columns, rows in (
        ("Environments", ("what", "A", "B"), result.environment),
        ("auto chooses another implementation", ("operation", "A", "B"), result.auto),
        (
            "Errors that grew, in units in the last place of the output",
            ("case", "tensor", "A", "B", "grew by", "of its budget"),
            [_cells(growth) for growth in result.grown],
        ),
    ):
        if rows:
            table = Table(*columns, title=title, title_justify="left", title_style="bold")
            for row in rows:
                table.add_row(*(Text(printable(cell)) for cell in row))
            drawn.append(table)
    return drawn


def _cells(growth: Growth) -> tuple[str, ...]:
    before, after = ("error" if e is None else f"{e:.3g}" for e in (growth.before, growth.after))
    ulps = "-" if growth.ulps is None else f"{growth.ulps:.1f} ulp"
    share = "-" if growth.share is None else f"{growth.share:.0%}"
    return growth.id, growth.tensor, before, after, ulps, f"{share}, fails" if growth.fails else share


def summary(result: Comparison) -> str:
    """The last line."""
    shared = len(result.grown) + result.shrunk + result.same
    changes = f"{len(result.grown)} errors grew, {result.shrunk} shrank, {result.same} are the same"
    text = f"{shared} cases in both: {changes}"
    for ids, where in ((result.only_first, "A"), (result.only_second, "B")):
        if ids:
            text += f"; {len(ids)} cases in {where} alone"
    if result.newly_failed:
        text += f"; {len(result.newly_failed)} passed in A and fail in B"
    return text
