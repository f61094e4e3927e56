"""Evaluation metrics as tables and as lines for spreadsheets."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

_TASKS = {"bbox": "box", "segm": "mask"}
_HEADLINE = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def results_table(results: Mapping[str, Mapping[str, float]]) -> Table:
    """Box and mask metrics in percent, one row each."""
    tasks = [task for task in _TASKS if task in results]
    names = list(dict.fromkeys(name for task in tasks for name in results[task]))
    table = Table(box=SIMPLE_HEAD, title="COCO evaluation (%)", title_justify="left", pad_edge=False)
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right", style="bold" if name == "AP" else None)
    for task in tasks:
        table.add_row(_TASKS[task], *(_percent(results[task].get(name, math.nan)) for name in names))
    return table


def per_class_table(results: Mapping[str, Mapping[str, float]], columns: int = 3) -> Table:
    """AP of each class in percent, classes running down ``columns`` blocks."""
    tasks = [task for task in _TASKS if f"{task}_per_class" in results]
    classes = list(results[f"{tasks[0]}_per_class"]) if tasks else []
    columns = max(1, min(columns, len(classes)))
    table = Table(box=SIMPLE_HEAD, title="AP by class (%)", title_justify="left", pad_edge=False)
    for _ in range(columns):
        table.add_column("class")
        for task in tasks:
            table.add_column(_TASKS[task], justify="right")
    height = math.ceil(len(classes) / columns)
    for row in range(height):
        cells = []
        for name in classes[row::height]:
            cells += [Text(name), *(_percent(results[f"{task}_per_class"][name]) for task in tasks)]
        table.add_row(*cells)
    return table


def format_results(results: Mapping[str, Mapping[str, float]], per_class: bool = True, width: int = 110) -> str:
    """The tables and :func:`copypaste_lines` as plain text for a log, tables at most ``width`` wide."""
    tables = [results_table(results)]
    if per_class:
        tables.append(per_class_table(results))
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(Group(*tables))
    text = "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).strip()
    return "\n".join([text, "", *copypaste_lines(results)])


def copypaste_lines(results: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Detectron2's "copypaste" lines: metrics in percent, three lines for each task."""
    lines = []
    for task in _TASKS:
        if task in results:
            metrics = ",".join(f"{100 * results[task][name]:.4f}" for name in _HEADLINE)
            lines += [f"Task: {task}", ",".join(_HEADLINE), metrics]
    return [f"copypaste: {line}" for line in lines]


def _percent(fraction: float) -> str:
    return "-" if math.isnan(fraction) else f"{100 * fraction:.1f}"
