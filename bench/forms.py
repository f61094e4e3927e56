"""``mimdet bench table8``: time and memory of the four forms of the ViT's and the pyramid's input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..kernels import use
from . import environment, report
from .backbone import Options as TableOptions
from .backbone import find_fault, memory_of, outcome, paper
from .cases import DTYPES
from .limits import measure_limits
from .measure import Timings, measure, wall_timer
from .models import bottom_up, build_detector
from .results import Results
from .workload import MODES, PARTS, Workload, check_words, idle_optimizer, step_of


@dataclass(frozen=True, kw_only=True)
class Options(TableOptions):
    """What to measure; ratios, depths and peers are those of the forms."""


def run_forms(options: Options) -> Results:
    """Check each form against its own weights in plain PyTorch, then measure all, print and write the table.

    Raises:
        ValueError: a word that is not known.
    """
    for given, known in ((options.modes, MODES), ([options.part], PARTS)):
        check_words(given, known)
    limits = measure_limits(options.device, [DTYPES[options.dtype]])
    found = Results("forms", environment.command(), environment.describe(options.device), limits)
    lines = {line["form"]: line for line in paper()["table8"]}
    detectors = {
        form: build_detector(line["config"], options.overrides, None, options.device) for form, line in lines.items()
    }
    optimizers = {form: idle_optimizer(detector) for form, detector in detectors.items()}
    out = report.console()
    for mode in options.modes:
        works = {form: step_of(d, optimizers[form], mode, options) for form, d in detectors.items()}
        faults = {form: _fault(work, mode, options) for form, work in works.items()}
        notes = {form: memory_of(works[form], mode, options) for form, fault in faults.items() if fault is None}
        parameters = {form: sum(p.numel() for p in d.parameters()) for form, d in detectors.items()}
        done = list(found.rows)
        with report.progress() as bar:
            task = bar.add_task(mode, total=options.rounds)

            def keep(timings: Timings, mode=mode, faults=faults, notes=notes, count=parameters, done=done) -> None:
                made = [
                    _row(line, mode, timings, faults[f], notes.get(f), count[f], options) for f, line in lines.items()
                ]
                found.rows = [*done, *_relate(made)]
                found.write(options.output)

            runs = {form: works[form].step for form in notes}
            keep(Timings({}))
            if runs:
                measure(
                    runs, options.rounds, timer=wall_timer, warmup=1, least=0.0,
                    on_round=lambda timings, keep=keep, bar=bar, task=task: (keep(timings), bar.advance(task)),
                )  # fmt: skip
        out.print(_table(found.rows[len(done) :]))
    return found


def _fault(work: Workload, mode: str, options: Options) -> str | None:
    model = work.model if options.part == "backbone" else bottom_up(work.model)
    with use("eager"):
        want = outcome(model, mode, options)
    return find_fault(work.model, want, mode, options)


def _row(line, mode, timings, fault, notes, parameters, options) -> dict:
    form = line["form"]
    return {
        "part": options.part,
        "mode": mode,
        "size": "{}x{}".format(*options.size),
        "batch": options.batch,
        "dtype": options.dtype,
        "form": form,
        "config": line["config"],
        "status": fault or "ok",
        **report.timed_columns(timings, form),
        "parameters": parameters,
        "paper_parameters_m": line["parameters_m"],
        **(notes or dict.fromkeys(("allocated_mib", "reserved_mib", "saved_mib"))),
        **dict.fromkeys(("relative_time", "relative_memory")),
        "paper_time": report.rounded(line["hours"] / paper()["table8"][0]["hours"], 4),
    }


def _relate(rows: list[dict]) -> list[dict]:
    """Fill in what is relative to the first form."""
    for row in rows:
        for name, column in (("relative_time", "p50_ms"), ("relative_memory", "allocated_mib")):
            if row[column] and rows[0][column]:
                row[name] = report.rounded(row[column] / rows[0][column], 4)
    return rows


def _table(rows: Sequence[dict]):
    first = rows[0]
    title = f"{first['part']}, {first['mode']}, {first['size']}, batch {first['batch']}, {first['dtype']}"
    title += f"; A/A {report.ratio(first, 'control')}"
    columns = ("form", "params M", "paper", "ms", "time", "paper", "MiB", "saved MiB", "memory")
    body = []
    for row in rows:
        if row["status"] != "ok":
            body.append((row["form"], row["status"], *["-"] * (len(columns) - 2)))
            continue
        body.append((
            row["form"], f"{row['parameters'] / 1e6:.2f}", f"{row['paper_parameters_m']:g}",
            report.number(row["p50_ms"], ".4g"),
            *(report.number(row[k], ".2f") for k in ("relative_time", "paper_time")),
            *(report.number(row[k], ".0f") for k in ("allocated_mib", "saved_mib")),
            report.number(row["relative_memory"], ".2f"),
        ))  # fmt: skip
    return report.table(title, columns, body)
