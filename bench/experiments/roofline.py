"""``mimdet bench roofline``: FLOPs, bytes and time of a step, and its distance from the machine's limits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .. import session, views, workload
from ..baselines import IMPLEMENTATIONS, variant
from ..limits import floor_seconds
from ..measure import Timings, measure, rounded, wall_timer
from ..operations import OTHER, UPDATE, Counter, Key, Work
from ..row import Results
from ..workload import MODES, Setting, check_choices

# Component -> modules, by name in the detector.
COMPONENTS = {
    "ConvStem": ("backbone.bottom_up.encoder.patch_embed",),
    "sampling, gather": ("backbone.bottom_up.encoder",),
    "encoder blocks": ("backbone.bottom_up.encoder.blocks", "backbone.bottom_up.encoder.norm"),
    "decoder assembly": ("backbone.bottom_up.decoder",),
    "decoder blocks": ("backbone.bottom_up.decoder.decoder_blocks", "backbone.bottom_up.decoder.decoder_norm"),
    "pyramid": ("backbone",),
    "proposals": ("proposal_generator",),
    "box head": ("roi_heads.box_pooler", "roi_heads.box_head", "roi_heads.box_predictor"),
    "mask head": ("roi_heads.mask_pooler", "roi_heads.mask_head"),
    "ROI matching": ("roi_heads",),
    "losses, the rest": ("",),
}
STEP = "whole step"
_SUMMED = ("calls", "gflop", "mib", "floor_ms", "p50_ms")
_GAPS = 12


@dataclass(frozen=True, kw_only=True)
class Options(Setting):
    """What to count.

    Attributes:
        depth: decoder blocks.
        mode: one of ``MODES``.
        implementation: one of ``IMPLEMENTATIONS``; not a compiled one, whose operations cannot be seen.
        rounds: of the step, and of each operation.
    """

    part: str = "detector"
    depth: int = 4
    mode: str = "train"
    implementation: str = "ours"
    rounds: int = 5


def run(options: Options) -> Results:
    """Count and time every operation of a step, print its components and the largest gaps, write the file.

    Raises:
        ValueError: an unknown mode or implementation, or fewer than 3 rounds.
    """
    if options.rounds < 3:
        raise ValueError(f"a roofline needs at least 3 rounds, got {options.rounds}")
    visible = [name for name in IMPLEMENTATIONS if name != "sdpa-compile"]
    for name, known in ((options.mode, MODES), (options.implementation, visible)):
        check_choices([name], known)
    results = session.begin(options.device, [options.dtype, "fp32"])
    detector = workload.build_detector(options.config, options.overrides, options.depth, options.device)
    optimizer = workload.idle_optimizer(detector)
    detector = variant(detector, options.implementation, options.ratio, options.depth)
    work = workload.step_of(detector, optimizer, options.mode, options)
    prefix = "" if options.part == "detector" else "backbone.bottom_up."
    components = {name: [p.removeprefix(prefix) for p in modules] for name, modules in COMPONENTS.items()}
    counted: dict[Key, Work] = {}
    with views.progress("whole step, then each operation", 2 * options.rounds) as advance:
        timings = measure(
            {STEP: work.step}, options.rounds, timer=wall_timer, warmup=1, least=0.0, on_round=lambda _: advance()
        )
        for _ in range(options.rounds):
            with Counter(work.model, components, optimizer) as counter:
                work.step()
            counted = _fastest(counted, counter.work)
            advance()
    results.rows = rows_of(counted, timings, options, results.limits)
    results.write(options.output)
    show(results.rows)
    return results


def _fastest(before: Mapping[Key, Work], now: dict[Key, Work]) -> dict[Key, Work]:
    """The run with fewer seconds, key by key: other programs on the machine only add time."""
    for key, work in now.items():
        if key in before:
            work.seconds = min(work.seconds, before[key].seconds)
    return now


def rows_of(counted: Mapping[Key, Work], timings: Timings, options: Options, limits: Mapping[str, float]) -> list[dict]:
    """One row for the whole step, then one for each kind of operation, the largest first."""
    model = {"ratio": options.ratio, "depth": options.depth, "implementation": options.implementation}
    common = {**options.keys("roofline", options.mode), **model, "status": "ok"}
    rows = []
    for (component, direction, operation, shape), work in counted.items():
        values = {
            "gflop": work.flops / 1e9,
            "mib": work.bytes / 2**20,
            "floor_ms": 1e3 * floor_seconds(limits, work.dtype, work.flops, work.bytes),
            "p50_ms": 1e3 * work.seconds,
        }
        keys = {"component": component, "direction": direction, "operation": operation, "shape": shape}
        rows.append({**common, **keys, "calls": work.calls, **{k: rounded(v) for k, v in values.items()}})
    rows.sort(key=lambda row: -row["p50_ms"])
    sums = {column: rounded(value) for column, value in _sum(rows).items() if column != "calls"}
    whole = {**common, "component": STEP, "direction": "both", "calls": _sum(rows)["calls"], **sums}
    return [{**whole, **timings.columns(STEP)}, *rows]


def _sum(rows: Sequence[dict]) -> dict[str, float]:
    return {column: sum(row[column] for row in rows) for column in _SUMMED}


def published(rows: Sequence[dict]) -> list[dict]:
    """Sums over a component and direction, in the order of the model, then the whole step."""
    groups: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for row in rows:
        groups[row["component"], row["direction"]].append(row)
    order = [*COMPONENTS, OTHER, UPDATE, STEP]
    places = sorted(groups, key=lambda place: (order.index(place[0]), place[1] != "forward"))
    return [{"component": c, "direction": d, **_sum(groups[c, d])} for c, d in places]


def columns(rows: Sequence[dict]) -> list[views.Column]:
    """FLOPs, bytes, the machine's floor for them, and the time."""
    return [
        ("component", label, ""),
        ("calls", "calls", "d"),
        ("GFLOP", "gflop", ".4g"),
        ("MiB", "mib", ".4g"),
        ("floor ms", "floor_ms", ".4g"),
        ("ms", "p50_ms", ".4g"),
        ("floor / measured", reached, ".0%"),
    ]


def label(row: dict) -> str:
    """Component, direction, and the operation of a row that is not a sum."""
    parts = [row["component"]] + [row["direction"]] * (row["component"] != STEP)
    return ", ".join(parts) + "".join(f" {row[name]}" for name in ("operation", "shape") if name in row)


def reached(row: dict) -> float | None:
    """The floor's share of the time."""
    return row["floor_ms"] / row["p50_ms"] if row["p50_ms"] else None


def show(rows: Sequence[dict]) -> None:
    """Print the components and the largest gaps."""
    whole, *operations = rows
    title = views.title([whole], "implementation", "part", "mode", "size", "batch", "dtype", "ratio")
    alone = {"component": "all, one at a time", "direction": "both", **_sum(operations)}
    *sums, step = published(rows)
    out = views.console()
    out.print(views.terminal(f"{title}, depth {whole['depth']}", columns(rows), [*sums, alone, step]))
    gaps = sorted(operations, key=lambda row: row["floor_ms"] - row["p50_ms"])[:_GAPS]
    out.print(
        views.terminal("Largest gaps", [("operation", lambda row: label(row)[:90], ""), *columns(rows)[1:]], gaps)
    )


def draw(rows: Sequence[dict]):
    """Milliseconds of each component, forward and backward, and the least that the machine needs for it."""
    sums = published(rows)
    figure = views.figure(9, 1.2 + 0.32 * len(sums))
    axes = figure.subplots()
    series = {
        "measured": ([row["p50_ms"] for row in sums], views.BARS[0]),
        "floor: the longer of its FLOPs and its bytes": ([row["floor_ms"] for row in sums], views.BARS[1]),
    }
    views.bars(axes, [label(row) for row in sums], series)
    for place, row in enumerate(sums):
        if row["p50_ms"]:
            axes.text(row["p50_ms"], place, f" {reached(row):.0%}", va="center", fontsize=7)
    axes.margins(x=0.08)
    axes.set_xlabel("ms; at the bar: floor / measured")
    axes.legend(fontsize=8)
    whole = next(row for row in rows if row["component"] == STEP)
    names = ("implementation", "part", "mode", "size", "batch", "dtype", "ratio")
    axes.set_title(views.heading([whole], *names) + f", decoder depth {whole['depth']}", fontsize=10)
    return figure
