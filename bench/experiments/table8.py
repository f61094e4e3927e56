"""``mimdet bench table8``: time and memory of sampled tokens and of windows, beside the paper's Table 8, and of the
ConvStem's other norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...kernels import use
from .. import session, views, workload
from ..baselines import bottom_up
from ..measure import rounded
from ..row import Results
from ..workload import MODES, Setting
from .backbone import add_relative, paper, title

# Models that the paper does not have: its first one with LayerNorm in the ConvStem.
_MORE = (
    {
        "case": "sampled, decoder of 4, stem_norm=layer",
        "config": "ablations/table6_mask_token",
        "overrides": ("model.backbone.bottom_up.encoder.stem_norm=layer",),
    },
)


@dataclass(frozen=True, kw_only=True)
class Options(Setting):
    """What to measure: the configs of the paper's table, and ``_MORE``, with ``overrides`` for all of them."""

    modes: Sequence[str] = MODES[:1]


def run(options: Options) -> Results:
    """Check each model against its own weights in plain PyTorch, then measure all, print and write the table."""
    results = session.begin(options.device, [options.dtype])
    lines = (*paper()["table8"], *_MORE)
    detectors = [
        workload.build_detector(line["config"], (*options.overrides, *line.get("overrides", ())), None, options.device)
        for line in lines
    ]
    optimizers = [workload.idle_optimizer(detector) for detector in detectors]
    for mode in options.modes:
        candidates = []
        for line, detector, optimizer in zip(lines, detectors, optimizers, strict=True):
            work = workload.step_of(detector, optimizer, mode, options)
            with use("eager"):
                expected = workload.outputs_of(bottom_up(detector).train(mode == "train"), mode, options)
            keys = {"case": line["case"], "config": line["config"], "implementation": "ours"}
            keys = {**options.keys("table8", mode), **keys}
            candidates.append(workload.candidate(work, keys, expected, mode, options))
            candidates[-1].values["parameters"] = sum(p.numel() for p in detector.parameters())
        rows = session.interleave(results, candidates, options.rounds, options.output, with_relative)
        views.console().print(views.terminal(title(rows), columns(rows), rows))
    return results


def with_relative(rows: list[dict]) -> list[dict]:
    """Add to the rows of one mode what is relative to the first, here and in the paper."""
    lines = {line["case"]: line for line in paper()["table8"]}
    hours = lines[rows[0]["case"]]["hours"]
    for row in rows:
        add_relative(row, rows[0])
        if line := lines.get(row["case"]):
            row["paper_time"] = rounded(line["hours"] / hours, 4)
            row["paper_parameters_m"] = line["parameters_m"]
    return rows


def columns(rows: Sequence[dict]) -> list[views.Column]:
    """Beside the paper's parameters and hours."""
    return [
        ("mode, model", lambda row: f"{row['mode']}, {row['case']}", ""),
        ("params M", lambda row: row["parameters"] * 1e-6, ".1f"),
        ("paper's params", "paper_parameters_m", "g"),
        ("ms", "p50_ms", ".4g"),
        ("time, relative", "relative_time", ".2f"),
        ("paper's time", "paper_time", ".2f"),
        ("activations MiB", "activation_mib", ".0f"),
        ("peak MiB", "allocated_mib", ".0f"),
        ("peak, relative", "relative_memory", ".2f"),
    ]


def draw(rows: Sequence[dict]):
    """Time and memory relative to the first model, time beside the paper's; a row of panels for each mode."""
    modes = views.grouped(rows, "mode")
    figure = views.figure(11, 0.6 + 2.6 * len(modes))
    colors = {"here": views.BARS[0], "paper": views.COLORS["paper"]}
    every = figure.subplots(len(modes), 2, squeeze=False, sharey="row")
    for (mode, shown), panels in zip(modes.items(), every, strict=True):
        for axes, label, name in zip(panels, ("time", "peak memory"), ("time", "memory"), strict=True):
            columns = {"here": f"relative_{name}", "paper": f"paper_{name}"}  # the paper has no memory
            series = {k: ([row.get(column) for row in shown], colors[k]) for k, column in columns.items()}
            views.bars(axes, [row["case"] for row in shown], series)
            axes.set_xlabel(f"{label}, first model = 1")
            axes.set_title(mode, fontsize=10)
        panels[0].legend(fontsize=8)
    figure.suptitle(views.heading(rows, "part", "size", "batch", "dtype"), fontsize=10)
    return figure
