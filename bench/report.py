"""What a user sees while figures are made, and how figures are put in words."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .measure import Ratio, Timings


def console() -> Console:
    """Standard output; wide enough for the tables where it is a file."""
    return Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 140)


def progress() -> Progress:
    """A bar in a terminal, nothing elsewhere."""
    shown = Console(stderr=True)
    columns = (
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    return Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Text to the left in the first column, figures to the right; columns of dashes alone are left out."""
    used = [i for i in range(len(columns)) if any(row[i] != "-" for row in rows)]
    made = Table(title=title, title_justify="left", title_style="bold")
    for i in used:
        made.add_column(columns[i], justify="right" if i else "left", no_wrap=not i, overflow="fold")
    for row in rows:
        made.add_row(*(row[i] for i in used))
    return made


def number(value: float | None, form: str = ".3g") -> str:
    """A figure, or a dash for none."""
    return "-" if value is None else format(value, form)


def ratio(row: dict, key: str) -> str:
    """The ratio in a row's columns ``key``, ``key_low`` and ``key_high``: a claim only if its interval allows one."""
    return "-" if row[key] is None else str(Ratio(row[key], row[f"{key}_low"], row[f"{key}_high"]))


def ratio_columns(key: str, value: Ratio | None) -> dict[str, float | None]:
    """A ratio as columns of a row."""
    parts = (None, None, None) if value is None else (value.median, value.low, value.high)
    return dict(zip((key, f"{key}_low", f"{key}_high"), map(rounded, parts), strict=True))


def timed_columns(timings: Timings, name: Hashable) -> dict[str, int | float | list[float] | None]:
    """What a row says of its rounds, with nothing in it where ``name`` was not timed."""
    timed = name in timings.samples
    times = timings.percentiles(name) if timed else (None, None, None)
    return {
        "rounds": timings.rounds if timed else 0,
        **{f"p{p}_ms": None if s is None else rounded(1e3 * s) for p, s in zip((20, 50, 80), times, strict=True)},
        **ratio_columns("control", timings.control_ratio() if timed else None),
        "samples_ms": [rounded(1e3 * s) for s in timings.samples.get(name, ())],
    }


def rounded(value: float | None, digits: int = 5) -> float | None:
    """To significant digits: files stay small."""
    return None if value is None else float(f"{value:.{digits}g}")
