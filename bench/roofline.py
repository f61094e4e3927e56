"""``mimdet bench roofline``: what a step computes and moves, and how far it is from what the machine could do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from . import environment, report
from .cases import DTYPES
from .count import OTHER, UPDATE, Counter, Key, Work
from .limits import gemm_key, measure_limits
from .measure import Timings, measure, wall_timer
from .models import PEERS, build_detector
from .results import Results
from .workload import MODES, PARTS, Setting, check_words, idle_optimizer, workload

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
_WARMUP = 1
_GAPS = 12


@dataclass(frozen=True, kw_only=True)
class Options(Setting):
    """What to count.

    Attributes:
        ratio, depth: keep ratio and decoder blocks.
        mode: word of ``MODES``.
        peer: word of ``PEERS``; not a compiled one, whose operations are not to be seen.
        rounds: of the step, and of each operation.
        output: file of results.
    """

    output: Path
    ratio: float = 0.5
    depth: int = 4
    mode: str = "train"
    peer: str = "ours"
    rounds: int = 5


def run_roofline(options: Options) -> Results:
    """Count and time every operation of a step, print its components and the largest gaps, write the file.

    Raises:
        ValueError: a word that is not known.
    """
    for given, known in ((options.mode, MODES), (options.part, PARTS), (options.peer, set(PEERS) - {"clean"})):
        check_words([given], known)
    limits = measure_limits(options.device, {DTYPES[options.dtype], torch.float32})
    found = Results("roofline", environment.command(), environment.describe(options.device), dict(limits))
    detector = build_detector(options.config, options.overrides, options.depth, options.device)
    key = (options.ratio, options.depth, options.peer)
    optimizer = idle_optimizer(detector)
    work = workload(detector, optimizer, options.mode, key, options)
    with report.progress() as bar:
        task = bar.add_task("whole step", total=2 * options.rounds)
        timings = measure(
            {"step": work.step}, options.rounds, timer=wall_timer, warmup=_WARMUP, least=0.0,
            on_round=lambda timings: bar.advance(task),
        )  # fmt: skip
        bar.update(task, description="each operation")
        counted = None
        prefix = "" if options.part == "detector" else "backbone.bottom_up."
        components = {name: [p.removeprefix(prefix) for p in parts] for name, parts in COMPONENTS.items()}
        for _ in range(options.rounds):
            with Counter(work.model, components, optimizer) as counter:
                work.step()
            counted = _fastest(counted, counter.work)
            bar.advance(task)
    found.rows = rows(counted, timings, options, limits)
    found.write(options.output)
    show(found)
    return found


def _fastest(before: Mapping[Key, Work] | None, now: Mapping[Key, Work]) -> Mapping[Key, Work]:
    """The run with less seconds, key by key: another program on the machine only ever adds to them."""
    if before is not None:
        for key, work in now.items():
            if key in before:
                work.seconds = min(work.seconds, before[key].seconds)
    return now


def rows(counted: Mapping[Key, Work], timings: Timings, options: Options, limits: Mapping[str, float]) -> list[dict]:
    """One row for the whole step, then one for each kind of operation, the largest first."""
    common = {
        "part": options.part,
        "mode": options.mode,
        "size": "{}x{}".format(*options.size),
        "batch": options.batch,
        "dtype": options.dtype,
        "ratio": options.ratio,
        "depth": options.depth,
        "model": options.peer,
    }
    made = []
    for (component, direction, op, shapes), work in counted.items():
        floor = work.floor(limits, gemm_key)
        made.append({
            **common, "component": component, "direction": direction, "op": op, "shapes": shapes,
            "calls": work.calls, "gflop": report.rounded(work.flops / 1e9), "mib": report.rounded(work.bytes / 2**20),
            "floor_ms": report.rounded(1e3 * floor), "p50_ms": report.rounded(1e3 * work.seconds), "samples_ms": [],
        })  # fmt: skip
    made.sort(key=lambda row: -row["p50_ms"])
    whole = {
        **common, "component": STEP, "direction": "both", "op": "", "shapes": "",
        "calls": sum(row["calls"] for row in made), "p50_ms": report.rounded(1e3 * timings.percentiles("step")[1]),
        "samples_ms": [report.rounded(1e3 * s) for s in timings.samples["step"]],
    }  # fmt: skip
    for column in ("gflop", "mib", "floor_ms"):
        whole[column] = report.rounded(sum(row[column] for row in made))
    return [whole, *made]


def by_component(found: Iterable[dict]) -> list[dict]:
    """Sums over a component and direction, in the order of the model."""
    sums: dict[tuple[str, str], dict] = defaultdict(lambda: defaultdict(float))
    for row in found:
        if row["component"] != STEP:
            for column in ("calls", "gflop", "mib", "floor_ms", "p50_ms"):
                sums[row["component"], row["direction"]][column] += row[column]
    order = [*COMPONENTS, OTHER, UPDATE]
    keys = sorted(sums, key=lambda key: (order.index(key[0]), key[1] != "forward"))
    return [
        {"component": component, "direction": direction, **sums[component, direction]} for component, direction in keys
    ]


def show(found: Results) -> None:
    """Print the components and the largest gaps."""
    whole = next(row for row in found.rows if row["component"] == STEP)
    out = report.console()
    title = "{model}, {part}, {mode}, {size}, batch {batch}, {dtype}, ratio {ratio}, depth {depth}".format(**whole)
    body = [_line(f"{row['component']} {row['direction']}", row) for row in by_component(found.rows)]
    body.append(_line("all, one at a time", _sum(found.rows)))
    body.append(_line(STEP, whole))
    columns = ("component", "calls", "GFLOP", "MiB", "floor ms", "ms", "floor / measured")
    out.print(report.table(title, columns, body))
    gaps = sorted(found.rows[1:], key=lambda row: row["floor_ms"] - row["p50_ms"])[:_GAPS]
    body = [_line(f"{row['component']} {row['direction']} {row['op']} {row['shapes']}"[:90], row) for row in gaps]
    out.print(report.table("Largest gaps", columns, body))


def _sum(found: list[dict]) -> dict:
    return {column: sum(row[column] for row in found[1:]) for column in ("calls", "gflop", "mib", "floor_ms", "p50_ms")}


def _line(name: str, row: Mapping) -> tuple[str, ...]:
    figures = [report.number(row[column], ".4g") for column in ("gflop", "mib", "floor_ms", "p50_ms")]
    reached = row["floor_ms"] / row["p50_ms"] if row["p50_ms"] else None
    return name, f"{row['calls']:.0f}", *figures, report.number(reached, ".0%")
