"""``mimdet bench readme``: the tables of Markdown pages, generated from the files of results that the pages name."""

from __future__ import annotations

import re
from pathlib import Path

from ..files import write_bytes
from . import configs, experiments, views
from .row import Results

# <!-- results: bench/results/<device>/ops.json dtype=fp32 --> table <!-- end of results -->
_RESULTS = re.compile(r"(<!-- results: (\S+)((?: \w+=\S+)*) -->\n).*?(<!-- end of results -->)", re.DOTALL)
# <!-- configs: configs --> table <!-- end of configs -->
_CONFIGS = re.compile(r"(<!-- configs: (\S+) -->\n).*?(<!-- end of configs -->)", re.DOTALL)


def pages(root: Path) -> list[Path]:
    """README.md and docs/*.md below ``root``, those that have markers."""
    candidates = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    return [path for path in candidates if path.is_file() and has_markers(path.read_text(encoding="utf-8"))]


def has_markers(text: str) -> bool:
    """Whether there is a table to generate."""
    return bool(_RESULTS.search(text) or _CONFIGS.search(text))


def fill(text: str, folder: Path) -> str:
    """``text`` with a table between all markers.

    Words such as dtype=fp32 after a file's name choose its rows. Markers for configs get a row for each in the folder
    that they name.

    Args:
        folder: the page's. Names are relative to it, or to the folder above: pages in docs name files as README.md.

    Raises:
        FileNotFoundError: a file that is in neither.
        ResultsError: a file that holds something else.
        ValueError: no markers at all, or conditions that no row meets.
    """
    if not has_markers(text):
        raise ValueError(
            "no markers for results: <!-- results: FILE --> and <!-- end of results --> on lines of their own"
        )

    def locate(name: str) -> Path:
        return next((root / name for root in (folder, folder.resolve().parent) if (root / name).exists()), Path(name))

    def of_results(place: re.Match) -> str:
        results = Results.read(locate(place[2]))
        for word in place[3].split():
            column, _, value = word.partition("=")
            results.rows = [row for row in results.rows if str(row.get(column)) == value]
        if not results.rows:
            raise ValueError(f"{place[2]}: no row with{place[3]}")
        return place[1] + render(results) + place[4]

    def of_configs(place: re.Match) -> str:
        return place[1] + views.markdown(configs.COLUMNS, configs.rows(locate(place[2]), folder)) + place[3]

    return _CONFIGS.sub(of_configs, _RESULTS.sub(of_results, text))


def update(path: Path) -> bool:
    """Fill a page in place; whether it changed."""
    text = path.read_text(encoding="utf-8")
    filled = fill(text, path.parent)
    if filled != text:
        write_bytes(path, filled.encode())
    return filled != text


def render(results: Results) -> str:
    """A file of results as Markdown: the command and the machine, then the rows without an error."""
    environment = results.environment
    versions = ", ".join(f"{name} {v}" for name, v in environment["versions"].items() if name in ("torch", "triton"))
    machine = f"{environment['device']}, {environment['threads']} threads, {versions}, {environment['date']}"
    rows = [row for row in results.rows if row["status"] == "ok"]
    experiment = experiments.of(results.rows[0]["experiment"])
    shown = experiment.published(rows) if hasattr(experiment, "published") else rows
    return f"`{results.command}` on {machine}:\n\n{views.markdown(experiment.columns(rows), shown)}"
