"""Tables are views of rows, the same for a terminal and for Markdown; plots share their figure and colors.

A column is (header, key, format): the key is a row's column or a function of the row, the format a format
specification. An empty format means text, aligned left; numbers are aligned right.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .measure import Ratio, paired_ratio
from .row import key

Column = tuple[str, str | Callable[[dict], Any], str]

COLORS = {
    "ours": "#d55e00",
    "ours-checkpointed": "#e69f00",
    "ours-detectron2": "#f0e442",
    "ours-fast-step": "#882255",
    "original": "#0072b2",
    "original-no-checkpoint": "#56b4e9",
    "original-sdpa": "#009e73",
    "original-sdpa-no-checkpoint": "#66c2a5",
    "sdpa-compile": "#cc79a7",
    "paper": "#222222",
}
BARS = ("#d55e00", "#0072b2", "#009e73", "#e69f00", "#56b4e9", "#cc79a7", "#999999", "#222222", "#f0e442")


def console() -> Console:
    """Standard output; 200 columns wide if it is a file."""
    return Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 200)


@contextlib.contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar in a terminal, nothing elsewhere; yields a function that advances it by one."""
    screen = Console(stderr=True)
    text = TextColumn("{task.description}")
    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn(), text)
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)


def terminal(title: str, columns: Sequence[Column], rows: Sequence[dict]) -> Table:
    """A table for ``console``."""
    columns, body = cells(columns, rows)
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, (header, _, spec) in enumerate(columns):
        table.add_column(header, justify="right" if spec else "left", no_wrap=not i, overflow="fold")
    for line in body:
        table.add_row(*line)
    return table


def markdown(columns: Sequence[Column], rows: Sequence[dict]) -> str:
    """A table for a Markdown page."""
    columns, body = cells(columns, rows)
    lines = [[header for header, *_ in columns], ["--:" if spec else "---" for *_, spec in columns], *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cells(columns: Sequence[Column], rows: Sequence[dict]) -> tuple[list[Column], list[list[str]]]:
    """Columns that are not empty, and their cells; a row that failed shows its status instead of numbers."""
    lines = []
    for row in rows:
        failed = row.get("status", "ok") != "ok"
        line = ["" if failed and spec else _cell(row, name, spec) for _, name, spec in columns]
        if failed:
            line[next(i for i, (*_, spec) in enumerate(columns) if spec)] = row["status"]
        lines.append(line)
    used = [i for i in range(len(columns)) if any(line[i] for line in lines)]
    return [columns[i] for i in used], [[line[i] for i in used] for line in lines]


def _cell(row: dict, name: str | Callable[[dict], Any], spec: str) -> str:
    value = name(row) if callable(name) else row.get(name)
    return "" if value is None else format(value, spec)


def speedup(row: dict, other: dict | None) -> Ratio | None:
    """How many times as fast a row is as another of the same run; None where one has no samples."""
    if other is None or other is row or not row.get("samples_ms") or not other.get("samples_ms"):
        return None
    return paired_ratio(other["samples_ms"], row["samples_ms"])


def speedup_over(name: str, rows: Sequence[dict]) -> Callable[[dict], Ratio | None]:
    """For a column: the speed-up over the row of another implementation whose keys are otherwise the same."""
    others = {key(row, "implementation"): row for row in rows if row["implementation"] == name}
    return lambda row: speedup(row, others.get(key(row, "implementation")))


def grouped(rows: Sequence[dict], column: str) -> dict[Any, list[dict]]:
    """The rows of each value of a column, in the order of their first rows."""
    groups: dict[Any, list[dict]] = {}
    for row in rows:
        groups.setdefault(row[column], []).append(row)
    return groups


def heading(rows: Sequence[dict], *names: str) -> str:
    """The values of these columns in the first row."""
    return ", ".join(f"{name} {rows[0][name]}" if name in ("batch", "ratio") else rows[0][name] for name in names)


def title(rows: Sequence[dict], *names: str) -> str:
    """``heading``, and the run's A/A control: the ratio of two equal measurements."""
    described = heading(rows, *names)
    control = next((row for row in rows if "control" in row), None)
    if control is None:
        return described
    return f"{described}; A/A {Ratio(control['control'], control['control_low'], control['control_high'])}"


def figure(width: float, height: float):
    """A matplotlib figure of these inches, without a window, with space for a caption below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width, height), dpi=130, layout="constrained")
    drawing.get_layout_engine().set(rect=(0, 0.02, 1, 0.98))
    FigureCanvasAgg(drawing)
    return drawing


def bars(
    axes, labels: Sequence[str], series: Mapping[str, tuple[Sequence[float | None], Any]], stacked: bool = False
) -> None:
    """Horizontal bars, a group for each label, the first on top.

    Args:
        series: name -> values, one for each label, and color.
        stacked: one after the other in place of side by side.
    """
    thickness = 0.8 if stacked else 0.8 / len(series)
    ends = [0.0] * len(labels)
    for number, (name, (values, color)) in enumerate(series.items()):
        widths = [value or 0.0 for value in values]
        places = [place + (0 if stacked else number * thickness) for place in range(len(labels))]
        axes.barh(places, widths, 0.95 * thickness, left=ends, color=color, label=name)
        ends = [end + width for end, width in zip(ends, widths, strict=True)] if stacked else ends
    axes.set_yticks([place + 0.4 - thickness / 2 for place in range(len(labels))])
    axes.set_yticklabels(labels, fontsize=8)
    axes.yaxis.set_inverted(True)
    axes.grid(alpha=0.3, axis="x")
