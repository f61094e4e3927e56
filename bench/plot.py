"""``mimdet bench plot``: pictures of a file of results."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ..files import write_bytes
from .results import Results
from .roofline import STEP, by_component

_COLORS = {
    "ours": "#d55e00",
    "ours-checkpointed": "#e69f00",
    "original": "#0072b2",
    "original-kept": "#56b4e9",
    "original-sdpa": "#009e73",
    "original-sdpa-kept": "#66c2a5",
    "clean": "#cc79a7",
    "paper": "#222222",
}
_BARS = ("#d55e00", "#0072b2", "#009e73", "#e69f00", "#56b4e9", "#cc79a7", "#999999", "#222222", "#f0e442")


def plot(results: Results, path: str | Path) -> None:
    """Draw time and memory over keep ratio or depth or of the forms of the input, the speed of every form of every
    operation, or components beside their floors.

    Args:
        results: from a file.
        path: picture to write; its suffix says the format.

    Raises:
        ValueError: no row has a figure.
    """
    rows = [row for row in results.rows if row["p50_ms"] is not None]
    if not rows:
        raise ValueError("nothing to plot: no row has a figure")
    draw = {"ops": _ops, "backbone": _curves, "forms": _forms, "packed": _packed, "roofline": _roofline}[results.kind]
    figure = draw(rows, results)
    figure.text(0.995, 0.002, _caption(results), ha="right", va="bottom", fontsize=6, color="#666666")
    content = io.BytesIO()
    figure.savefig(content, format=Path(path).suffix.lstrip(".") or "png")
    write_bytes(path, content.getvalue())


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.02, 1, 0.98))
    FigureCanvasAgg(figure)
    return figure


def _caption(results: Results) -> str:
    environment = results.environment
    versions = environment.get("versions", {})
    return f"{environment.get('device')}, {environment.get('threads')} threads, torch {versions.get('torch')}, " + (
        f"{environment.get('date')}, commit {environment.get('commit')}"
    )


def _curves(rows: Sequence[dict], results: Results) -> Figure:
    """A row of panels for each mode: milliseconds, and relative to the default row time, peak and what waits for
    backward, the last two beside the paper's memory."""
    axis = "ratio" if len({row["ratio"] for row in rows}) >= len({row["depth"] for row in rows}) else "depth"
    # Rows along the other axis share one point of this one: the default's.
    other = "depth" if axis == "ratio" else "ratio"
    default = max({row[other] for row in rows}, key=lambda value: sum(row[other] == value for row in rows))
    rows = [row for row in rows if row[other] == default]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    figure = _figure(15, 3.6 * len(modes))
    for mode, panels in zip(modes, figure.subplots(len(modes), 4, squeeze=False), strict=True):
        chosen = [row for row in rows if row["mode"] == mode]
        for axes, column, label, theirs in (
            (panels[0], "p50_ms", "ms", None),
            (panels[1], "relative_time", "time, default row = 1", "paper_time"),
            (panels[2], "relative_memory", "peak memory, default row = 1", "paper_memory"),
            (panels[3], "relative_saved", "saved for backward, default row = 1", "paper_memory"),
        ):
            if not any(row[column] for row in chosen):  # inference saves nothing
                axes.set_axis_off()
                continue
            _lines(axes, chosen, axis, column, theirs)
            axes.set_xlabel("keep ratio" if axis == "ratio" else "decoder blocks")
            axes.set_ylabel(label)
            axes.grid(alpha=0.3)
        panels[0].set_title(mode, fontsize=10)
        panels[0].set_ylim(bottom=0)
        panels[1].legend(fontsize=7)
    first = rows[0]
    figure.suptitle(f"{first['part']}, {first['size']}, batch {first['batch']}, {first['dtype']}")
    return figure


def _lines(axes: Axes, rows: Sequence[dict], axis: str, column: str, theirs: str | None) -> None:
    for model in dict.fromkeys(row["model"] for row in rows):
        points = sorted((row[axis], row) for row in rows if row["model"] == model and row[column] is not None)
        xs, found = [x for x, _ in points], [row for _, row in points]
        color = _COLORS.get(model)
        axes.plot(xs, [row[column] for row in found], "o-", color=color, label=model, markersize=4, linewidth=1.4)
        if column == "p50_ms":
            axes.fill_between(xs, [r["p20_ms"] for r in found], [r["p80_ms"] for r in found], color=color, alpha=0.15)
    if theirs:
        points = sorted({(row[axis], row[theirs]) for row in rows if row[theirs] is not None})
        if points:
            axes.plot(
                *zip(*points, strict=True), "s--", color=_COLORS["paper"], label="paper", markersize=4, linewidth=1.4
            )


def _ops(rows: Sequence[dict], results: Results) -> Figure:
    """One panel a direction, dtype and cache state; a group of bars for each case, one bar a form, as long as its share
    of what the machine could do: of the copy bandwidth or, where that binds, of the GEMM rate."""
    panels = list(dict.fromkeys((row["direction"], row["dtype"], row["cache"]) for row in rows))
    forms = list(dict.fromkeys(row["impl"] for row in rows))
    groups: dict[tuple, list[str]] = {}
    for row in rows:
        there = groups.setdefault((row["op"], row["case"], row["shape"]), [])
        there += [row["impl"]] if row["impl"] not in there else []
    starts, end = {}, 0
    for group, there in groups.items():
        starts[group], end = end, end + len(there) + 1
    figure = _figure(12, max(3.0, 1.0 + 0.13 * end))
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True):
        chosen = [row for row in rows if (row["direction"], row["dtype"], row["cache"]) == panel]
        for form, color in zip(forms, cycle(_BARS)):
            bars = []
            for row in chosen:
                group = row["op"], row["case"], row["shape"]
                if row["impl"] == form and row["of_limit"]:
                    bars.append((starts[group] + groups[group].index(form), row["of_limit"]))
            places, lengths = zip(*bars, strict=True) if bars else ((), ())
            axes.barh(places, lengths, 0.9, color=color, label=form)
        axes.axvline(1.0, color="#222222", linestyle="--", linewidth=1, label="limit, measured")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_title(" ".join(panel), fontsize=10)
        axes.set_xlabel("of the limit: copy bandwidth, GEMM rate")
        axes.grid(alpha=0.3, axis="x")
        axes.margins(y=0.01)
    first = figure.axes[0]
    first.set_yticks([start + (len(groups[group]) - 1) / 2 for group, start in starts.items()])
    first.set_yticklabels([f"{op}\n{case} {shape}" for op, case, shape in groups], fontsize=7)
    first.invert_yaxis()
    figure.axes[-1].legend(fontsize=7)
    return figure


def _roofline(rows: Sequence[dict], results: Results) -> Figure:
    """Milliseconds of each component, forward and backward, and the least that the machine needs for it."""
    components = by_component(rows)
    whole = next(row for row in rows if row["component"] == STEP)
    lines = [(f"{row['component']}, {row['direction']}", row) for row in components] + [(STEP, whole)]
    figure = _figure(9, 1.2 + 0.32 * len(lines))
    axes = figure.subplots()
    for offset, column, color, label in (
        (0.0, "p50_ms", _BARS[0], "measured"),
        (0.4, "floor_ms", _BARS[1], "floor: the longer of its FLOPs and its bytes"),
    ):
        places = [place + offset for place in range(len(lines))]
        axes.barh(places, [row[column] for _, row in lines], 0.38, color=color, label=label)
    for place, (_, row) in enumerate(lines):
        share = f" {row['floor_ms'] / row['p50_ms']:.0%}" if row["p50_ms"] else ""
        axes.text(row["p50_ms"], place, share, va="center", fontsize=7)
    axes.set_yticks([place + 0.2 for place in range(len(lines))])
    axes.set_yticklabels([name for name, _ in lines], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlabel("ms; at the bar: floor / measured")
    axes.grid(alpha=0.3, axis="x")
    axes.legend(fontsize=8)
    title = "{model}, {part}, {mode}, {size}, batch {batch}, {dtype}, ratio {ratio:g}, decoder depth {depth}"
    axes.set_title(title.format(**whole), fontsize=10)
    return figure


def _forms(rows: Sequence[dict], results: Results) -> Figure:
    """Time and memory of each form relative to the first, time beside the paper's; a row of panels for each mode."""
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    figure = _figure(11, 0.6 + 2.6 * len(modes))
    for mode, panels in zip(modes, figure.subplots(len(modes), 2, squeeze=False, sharey="row"), strict=True):
        chosen = [row for row in rows if row["mode"] == mode]
        for axes, label, bars in (
            (panels[0], "time", (("relative_time", "here", _BARS[0]), ("paper_time", "paper", _COLORS["paper"]))),
            (panels[1], "peak memory", (("relative_memory", "here", _BARS[0]),)),
        ):
            for offset, (column, name, color) in enumerate(bars):
                places = [place + 0.4 * offset for place in range(len(chosen))]
                axes.barh(places, [row[column] or 0.0 for row in chosen], 0.38, color=color, label=name)
            axes.set_xlabel(f"{label}, first form = 1")
            axes.set_title(mode, fontsize=10)
            axes.grid(alpha=0.3, axis="x")
        panels[0].set_yticks(range(len(chosen)))
        panels[0].set_yticklabels([row["form"] for row in chosen], fontsize=8)
        panels[0].invert_yaxis()
        panels[0].legend(fontsize=8)
    first = rows[0]
    figure.suptitle(f"{first['part']}, {first['size']}, batch {first['batch']}, {first['dtype']}", fontsize=10)
    return figure


def _packed(rows: Sequence[dict], results: Results) -> Figure:
    """Milliseconds and saved MiB of each form, a panel for each mode."""
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    figure = _figure(4.5 * len(modes), 3.2)
    for axes, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes, strict=True):
        chosen = [row for row in rows if row["mode"] == mode]
        bars = axes.bar([row["form"] for row in chosen], [row["p50_ms"] for row in chosen], color=_BARS[: len(chosen)])
        axes.bar_label(bars, [_speed_label(row) for row in chosen], fontsize=8)
        axes.set_title(f"{mode}, ratio {chosen[0]['ratio']:g}", fontsize=10)
        axes.set_ylabel("ms")
        axes.margins(y=0.12)
    figure.suptitle(f"backbone, pictures of {rows[0]['sizes']}, {rows[0]['dtype']}", fontsize=10)
    return figure


def _speed_label(row: dict) -> str:
    return "" if row["vs_canvas"] is None else f"{row['vs_canvas']:.2f}x"
