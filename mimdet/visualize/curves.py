"""Training curves from the metrics of a run."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..files import write_bytes

logger = logging.getLogger(__name__)

_TOTAL = "total_loss"
_COLORS = {
    _TOTAL: "#222222",
    "loss_rpn_cls": "#0072b2",
    "loss_rpn_loc": "#56b4e9",
    "loss_cls": "#d55e00",
    "loss_box_reg": "#e69f00",
    "loss_mask": "#009e73",
}
_METRICS = [
    ("bbox/AP", "box AP", "#d55e00", "-"),
    ("bbox/AP50", "box AP50", "#d55e00", "--"),
    ("segm/AP", "mask AP", "#0072b2", "-"),
    ("segm/AP50", "mask AP50", "#0072b2", "--"),
]


def plot_training(metrics_jsonl: str | Path, path: str | Path, title: str | None = None) -> None:
    """Draw the losses and the evaluations of a run over its iterations.

    Losses are drawn raw (faint) and as a running median. Of iterations that a resumed run repeated, the last values are
    drawn.

    Args:
        metrics_jsonl: a run's ``metrics.jsonl``; its lines have ``iteration`` and either ``total_loss`` and the
            ``loss_...`` it is the sum of, or metrics of an evaluation such as ``bbox/AP`` (fractions).
        path: image to write; its suffix sets the format.
        title: heading; by default the name of the folder of the metrics.

    Raises:
        ValueError: the file has no metrics.
    """
    metrics_jsonl, path = Path(metrics_jsonl), Path(path)
    training, evaluations = read_metrics(metrics_jsonl)
    if not training and not evaluations:
        raise ValueError(f"{metrics_jsonl} has no losses and no evaluations to plot")
    shown = [bool(training), bool(evaluations)]
    figure = Figure(figsize=(10, 3.2 + 3.2 * (sum(shown) - 1)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = iter(figure.subplots(sum(shown), 1, sharex=True, squeeze=False)[:, 0])
    if training:
        _plot_losses(next(axes), training)
    if evaluations:
        _plot_evaluations(next(axes), evaluations)
    figure.axes[-1].set_xlabel("iteration")
    figure.suptitle(title or metrics_jsonl.resolve().parent.name, fontsize=13)
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.lstrip(".") or "png")
    write_bytes(path, content.getvalue())


def read_metrics(metrics_jsonl: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines with losses and those with an evaluation, each in the order of iterations.

    Of iterations that a resumed run repeated, only the last lines are kept. Incomplete lines are dropped.
    """
    training: list[dict[str, Any]] = []
    evaluations: list[dict[str, Any]] = []
    with open(metrics_jsonl, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                entry = json.loads(line)
                iteration = entry["iteration"]
            except (ValueError, KeyError, TypeError):
                if line.strip():
                    logger.warning("%s, line %d is not a line of metrics: left out", metrics_jsonl, number)
                continue
            lines = training if _TOTAL in entry else evaluations
            while lines and lines[-1]["iteration"] >= iteration:
                lines.pop()
            lines.append(entry)
    return training, evaluations


def running_median(values: Sequence[float], width: int) -> np.ndarray:
    """Median of each value and its neighbors, ``width`` in all, fewer at the ends, without NaN."""
    half = width // 2
    padded = np.pad(np.asarray(values, dtype=float), half, constant_values=np.nan)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        return np.nanmedian(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1)


def _series(entries: list[dict[str, Any]], key: str) -> np.ndarray:
    """One metric over the entries; NaN where it is missing or was not finite."""
    return np.array([np.nan if entry.get(key) is None else entry[key] for entry in entries], dtype=float)


def _plot_losses(axes: Axes, training: list[dict[str, Any]]) -> None:
    iterations = _series(training, "iteration")
    names = [_TOTAL, *dict.fromkeys(key for entry in training for key in entry if key.startswith("loss_"))]
    width = min(len(iterations) // 20, 101)
    peaks = []
    for name in names:
        values = _series(training, name)
        smooth = running_median(values, width)
        label = name.removeprefix("loss_").replace("_", " ")
        thick = 2 if name == _TOTAL else 1.5
        (line,) = axes.plot(iterations, smooth, color=_COLORS.get(name), label=label, linewidth=thick)
        axes.plot(iterations, values, color=line.get_color(), alpha=0.25, linewidth=0.7, zorder=1)
        # set_ylim: a few spikes must not flatten the curves
        peaks += [np.nanmax(smooth, initial=0), np.nanquantile(values, 0.99) if np.isfinite(values).any() else 0]
    axes.set_ylim(0, 1.08 * max(peaks) or None)
    _finish(axes, "loss", "Training losses")


def _plot_evaluations(axes: Axes, evaluations: list[dict[str, Any]]) -> None:
    iterations = _series(evaluations, "iteration")
    for key, label, color, style in _METRICS:
        values = 100 * _series(evaluations, key)
        measured = values[np.isfinite(values)]
        if measured.size:
            label = f"{label} ({measured[-1]:.1f})"
            axes.plot(iterations, values, style, color=color, marker="o", markersize=4, linewidth=1.5, label=label)
    axes.set_ylim(bottom=0)
    _finish(axes, "AP (%)", "Evaluation (last value in brackets)")


def _finish(axes: Axes, ylabel: str, title: str) -> None:
    axes.set_ylabel(ylabel)
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(alpha=0.25)
    axes.margins(x=0.01)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
