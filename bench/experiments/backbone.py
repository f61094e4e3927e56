"""``mimdet bench table1``, ``table7`` and ``backbone``: time and memory over keep ratio and decoder depth."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import session, views, workload
from ..baselines import IMPLEMENTATIONS, bottom_up, variant
from ..measure import rounded
from ..row import Results
from ..workload import Setting, check_choices

# Speed-ups are given over these.
BASELINES = ("original", "original-sdpa", "sdpa-compile")
_TABLES = Path(__file__).parent.parent / "paper.json"
# Columns relative to the default row: theirs, and what they are ratios of.
RELATIVE = (
    ("relative_time", "p50_ms"),
    ("relative_memory", "allocated_mib"),
    ("relative_activation", "activation_mib"),
)


@dataclass(frozen=True, kw_only=True)
class Options(Setting):
    """What to measure.

    Attributes:
        ratios, depths: every ratio at ``default``'s depth and every depth at its ratio.
        default: (ratio, depth) of the row that the others are relative to.
        implementations: each one of ``IMPLEMENTATIONS``.
        rounds: see ``measure``; 0 counts memory alone.
    """

    ratios: Sequence[float] = (0.5,)
    depths: Sequence[int] = ()
    default: tuple[float, int] = (0.5, 4)
    implementations: Sequence[str] = tuple(IMPLEMENTATIONS)

    def points(self) -> list[tuple[float, int]]:
        """(ratio, depth) of each row, the default's among them."""
        ratio, depth = self.default
        return sorted({self.default, *((r, depth) for r in self.ratios), *((ratio, d) for d in self.depths)})


def run(options: Options) -> Results:
    """Measure every point and implementation in turn, print the tables, write the file after every round.

    Raises:
        ValueError: an unknown implementation.
    """
    check_choices(options.implementations, IMPLEMENTATIONS)
    results = session.begin(options.device, [options.dtype])
    deepest = max(depth for _, depth in options.points())
    detector = workload.build_detector(options.config, options.overrides, deepest, options.device)
    optimizer = workload.idle_optimizer(detector)
    with _compiler(options):
        for mode in options.modes:
            candidates = []
            with views.progress(f"{mode}: checks", len(options.points()) * len(options.implementations)) as advance:
                for ratio, depth in options.points():
                    original = bottom_up(variant(detector, "original", ratio, depth)).train(mode == "train")
                    expected = workload.outputs_of(original, mode, options)
                    for name in options.implementations:
                        point = {"ratio": ratio, "depth": depth, "implementation": name}
                        keys = {**options.keys("backbone", mode), **point}
                        work = workload.step_of(variant(detector, name, ratio, depth), optimizer, mode, options)
                        candidates.append(workload.candidate(work, keys, expected, mode, options))
                        advance()
            rows = session.interleave(
                results, candidates, options.rounds, options.output, lambda rows: with_relative(rows, options.default)
            )
            views.console().print(views.terminal(title(rows), columns(rows), rows))
    return results


def _compiler(options: Options) -> contextlib.AbstractContextManager:
    """torch.compile for every point, with the random numbers that the others draw."""
    stack = contextlib.ExitStack()
    if "sdpa-compile" in options.implementations:
        import torch._inductor.config  # seconds, for those who need it

        torch._dynamo.reset()
        stack.enter_context(torch._dynamo.config.patch(recompile_limit=256))
        stack.enter_context(torch._inductor.config.patch(fallback_random=True))
    return stack


def paper() -> dict:
    """The paper's tables, with their source."""
    return json.loads(_TABLES.read_text(encoding="utf-8"))


def with_relative(rows: list[dict], default: tuple[float, int]) -> list[dict]:
    """Add to the rows of one mode what is relative to the default row, here and in the paper."""
    defaults = {row["implementation"]: row for row in rows if (row["ratio"], row["depth"]) == default}
    tables = paper()
    published = {(0.5, line["depth"]): line for line in tables["table7"]}
    published |= {(line["ratio"], 4): line for line in tables["table1"]}
    for row in rows:
        add_relative(row, defaults[row["implementation"]])
        line = published.get((row["ratio"], row["depth"]))
        if line and row["mode"] == "train" and default == (0.5, 4):
            row["paper_time"] = rounded(line["hours"] / published[default]["hours"], 4)
            row["paper_memory"] = rounded(line["memory_gb"] / published[default]["memory_gb"], 4)
    return rows


def add_relative(row: dict, default: dict) -> None:
    """Add what both rows have, relative to the default row."""
    for name, column in RELATIVE:
        if row.get(column) and default.get(column):
            row[name] = rounded(row[column] / default[column], 4)


def title(rows: Sequence[dict]) -> str:
    """Of the rows of one mode."""
    return views.title(rows, "part", "mode", "size", "batch", "dtype")


def columns(rows: Sequence[dict]) -> list[views.Column]:
    """Time, memory and speed-ups, and beside the paper's ratios to the default row, if there are other rows."""
    varied = len({(row["mode"], row["ratio"], row["depth"]) for row in rows}) > len({row["mode"] for row in rows})
    relative = [
        ("time, relative", "relative_time", ".2f"),
        ("paper's time", "paper_time", ".2f"),
        ("peak, relative", "relative_memory", ".2f"),
        ("activations, relative", "relative_activation", ".2f"),
        ("paper's memory", "paper_memory", ".2f"),
    ]
    return [
        ("mode, ratio, decoder depth", lambda row: f"{row['mode']}, {row['ratio']:g}, {row['depth']}", ""),
        ("implementation", "implementation", ""),
        ("ms", "p50_ms", ".4g"),
        ("activations MiB", "activation_mib", ".0f"),
        ("peak MiB", "allocated_mib", ".0f"),
        *((f"speed vs {name}", views.speedup_over(name, rows), ".2f") for name in BASELINES),
        *(relative if varied else ()),
    ]


def draw(rows: Sequence[dict]):
    """A row of panels for each mode: milliseconds, and relative to the default row time, peak and activation memory,
    the last two beside the paper's memory."""
    axis = "ratio" if len({row["ratio"] for row in rows}) >= len({row["depth"] for row in rows}) else "depth"
    # Rows along the other axis share one point of this one: the default's.
    other = "depth" if axis == "ratio" else "ratio"
    default = max({row[other] for row in rows}, key=lambda value: sum(row[other] == value for row in rows))
    rows = [row for row in rows if row[other] == default]
    modes = views.grouped(rows, "mode")
    figure = views.figure(15, 3.6 * len(modes))
    for (mode, shown), panels in zip(modes.items(), figure.subplots(len(modes), 4, squeeze=False), strict=True):
        for axes, column, label, theirs in (
            (panels[0], "p50_ms", "ms", None),
            (panels[1], "relative_time", "time, default row = 1", "paper_time"),
            (panels[2], "relative_memory", "peak memory, default row = 1", "paper_memory"),
            (panels[3], "relative_activation", "activation memory, default row = 1", "paper_memory"),
        ):
            if not any(row.get(column) for row in shown):  # inference has no activations to save
                axes.set_axis_off()
                continue
            _lines(axes, shown, axis, column, theirs)
            axes.set_xlabel("keep ratio" if axis == "ratio" else "decoder blocks")
            axes.set_ylabel(label)
            axes.grid(alpha=0.3)
        panels[0].set_title(mode, fontsize=10)
        panels[0].set_ylim(bottom=0)
        panels[1].legend(fontsize=7)
    figure.suptitle(views.heading(rows, "part", "size", "batch", "dtype"))
    return figure


def _lines(axes, rows: Sequence[dict], axis: str, column: str, theirs: str | None) -> None:
    style = {"markersize": 4, "linewidth": 1.4}
    for name, points in views.grouped([row for row in rows if column in row], "implementation").items():
        points.sort(key=lambda row: row[axis])
        places, color = [row[axis] for row in points], views.COLORS.get(name)
        axes.plot(places, [row[column] for row in points], "o-", color=color, label=name, **style)
        if column == "p50_ms":
            low, high = ([row[end] for row in points] for end in ("p20_ms", "p80_ms"))
            axes.fill_between(places, low, high, color=color, alpha=0.15)
    points = sorted({(row[axis], row[theirs]) for row in rows if theirs in row})
    if points:
        axes.plot(*zip(*points, strict=True), "s--", color=views.COLORS["paper"], label="paper", **style)
