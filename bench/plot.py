"""``mimdet bench plot``: a file of results as a figure."""

from __future__ import annotations

import io
from pathlib import Path

from ..files import write_bytes
from . import experiments
from .row import Results


def plot(results: Results, path: str | Path) -> None:
    """Draw what the rows' experiment shows, with the machine in the caption.

    Args:
        results: rows of one experiment.
        path: figure to write; its suffix says the format.

    Raises:
        ValueError: no row has a time or a count.
    """
    rows = [row for row in results.rows if {"p50_ms", "count", "predicted_us"} & set(row)]
    if not rows:
        raise ValueError("nothing to plot: no row has a time or a count")
    figure = experiments.of(rows[0]["experiment"]).draw(rows)
    environment = results.environment
    caption = (
        f"{environment.get('device')}, {environment.get('threads')} threads, "
        f"torch {environment.get('versions', {}).get('torch')}, "
        f"{environment.get('date')}, commit {environment.get('commit')}"
    )
    figure.text(0.995, 0.002, caption, ha="right", va="bottom", fontsize=6, color="#666666")
    content = io.BytesIO()
    figure.savefig(content, format=Path(path).suffix.lstrip(".") or "png")
    write_bytes(path, content.getvalue())
