"""``mimdet bench table1``, ``table7`` and ``backbone``: time and memory over keep ratio and decoder depth."""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from . import environment, report
from .cases import DTYPES
from .limits import measure_limits
from .measure import Timings, measure, wall_timer
from .memory import peak_bytes, saved_bytes
from .models import PEERS, bottom_up, build_detector, variant
from .results import Results
from .workload import MODES, PARTS, Setting, Workload, check_words, gradients, idle_optimizer, pictures, workload

# Speed-ups are given over these.
OVER = ("original", "original-sdpa", "clean")
# Column of what is relative to the default row, and of what.
_RELATIVE = (("relative_time", "p50_ms"), ("relative_memory", "allocated_mib"), ("relative_saved", "saved_mib"))
# The same beside the paper's, as tables head them.
COMPARED = {
    "relative_time": "time, relative",
    "paper_time": "paper's",
    "relative_memory": "peak, relative",
    "relative_saved": "saved, relative",
    "paper_memory": "paper's memory",
}
# Relative distance allowed between two models: features, gradients.
TOLERANCE = {"fp32": (1e-5, 1e-4), "bf16": (3e-2, 1e-1), "fp16": (4e-3, 2e-2)}


@dataclass(frozen=True, kw_only=True)
class Options(Setting):
    """What to measure.

    Attributes:
        ratios, depths: every ratio at ``default``'s depth and every depth at its ratio.
        default: (ratio, depth) of the row that the others are relative to.
        modes, peers: words of ``MODES`` and ``PEERS``.
        rounds: see ``measure``; 0 counts memory alone.
        output: file of results.
    """

    output: Path
    ratios: Sequence[float] = (0.5,)
    depths: Sequence[int] = ()
    default: tuple[float, int] = (0.5, 4)
    modes: Sequence[str] = MODES[:1]
    peers: Sequence[str] = tuple(PEERS)
    rounds: int = 15

    def rows(self) -> list[tuple[float, int]]:
        """(ratio, depth) of each row, the default's among them."""
        ratio, depth = self.default
        return sorted({self.default, *((r, depth) for r in self.ratios), *((ratio, d) for d in self.depths)})


def run_tables(options: Options) -> Results:
    """Measure every row and peer in turn, printing the tables; the file is written after every round.

    Raises:
        ValueError: a word that is not known.
    """
    for given, known in ((options.modes, MODES), ([options.part], PARTS), (options.peers, PEERS)):
        check_words(given, known)
    limits = measure_limits(options.device, [DTYPES[options.dtype]])
    found = Results("backbone", environment.command(), environment.describe(options.device), limits)
    depth = max(depth for _, depth in options.rows())
    detector = build_detector(options.config, options.overrides, depth, options.device)
    optimizer = idle_optimizer(detector)
    out = report.console()
    out.print(f"{found.environment['device']}, {found.environment['threads']} threads")
    with report.progress() as bar, _settings(options):
        for mode in options.modes:
            keys = [(ratio, depth, peer) for ratio, depth in options.rows() for peer in options.peers]
            task = bar.add_task(f"{mode}: checks", total=len(keys) + options.rounds)
            works, faults, notes = {}, {}, {}
            for ratio, depth in options.rows():
                plain = bottom_up(variant(detector, "original", ratio, depth)).train(mode == "train")
                want = outcome(plain, mode, options)
                for key in [key for key in keys if key[:2] == (ratio, depth)]:
                    works[key] = workload(detector, optimizer, mode, key, options)
                    faults[key] = find_fault(works[key].model, want, mode, options)
                    if faults[key] is None:
                        notes[key] = memory_of(works[key], mode, options)
                    bar.advance(task)
            done, runs = list(found.rows), {key: works[key].step for key in keys if faults[key] is None}

            def keep(timings: Timings, mode=mode, keys=keys, works=works, faults=faults, notes=notes, done=done):
                rows = [_row(key, mode, works[key], timings, faults[key], notes.get(key), options) for key in keys]
                found.rows = [*done, *_relate(rows, options)]
                found.write(options.output)

            bar.update(task, description=f"{mode}: rounds")
            timings = Timings({})
            if runs and options.rounds:
                timings = measure(
                    runs, options.rounds, timer=wall_timer, warmup=1, least=0.0,
                    on_round=lambda timings, keep=keep, task=task: (keep(timings), bar.advance(task)),
                )  # fmt: skip
            keep(timings)
            out.print(_table(found.rows[len(done) :], options))
    return found


def paper() -> dict:
    """The paper's tables, with their source."""
    return json.loads((Path(__file__).parent / "paper.json").read_text(encoding="utf-8"))


def _settings(options: Options) -> contextlib.AbstractContextManager:
    """Compiled models for every row, drawing the random numbers that the others draw."""
    stack = contextlib.ExitStack()
    if "clean" in options.peers:
        import torch._inductor.config  # seconds, for those who need it

        torch._dynamo.reset()
        stack.enter_context(torch._dynamo.config.patch(recompile_limit=256))
        stack.enter_context(torch._inductor.config.patch(fallback_random=True))
    return stack


def find_fault(model: nn.Module, want: Mapping[str, torch.Tensor], mode: str, options: Options) -> str | None:
    """Why this model must not be timed: features or gradients that are not the plain reference's."""
    try:
        got = outcome(model if options.part == "backbone" else bottom_up(model), mode, options)
    except Exception as error:  # out of memory, a compiler that is missing: the others go on
        return f"cannot run: {type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    for name, value in want.items():
        allowed = TOLERANCE[options.dtype]["gradient" in name]
        off = distance(got[name], value)
        if not off <= allowed:
            return f"wrong: {name} is {off:.2g} off, allowed {allowed:.2g}"
    return None


def outcome(model: nn.Module, mode: str, options: Options) -> dict[str, torch.Tensor]:
    """Features, and in training the gradient of all encoder, decoder and stem parameters, each as one vector."""
    images = pictures(options)
    length = options.size[0] // 16 * (options.size[1] // 16)
    noise = torch.rand(options.batch, length, generator=torch.Generator().manual_seed(3)).to(options.device)
    torch.manual_seed(4)  # of the drop path
    with torch.set_grad_enabled(mode == "train"), exact_convolutions(), options.autocast():
        features = model(images, noise=noise)
    found = {name: feature.detach().float() for name, feature in features.items()}
    if mode == "train":
        # Not through c5: its pooling hands a gradient to the larger of two cells that may differ by rounding alone.
        smooth = {name: feature for name, feature in features.items() if name != "c5"}
        torch.autograd.backward(list(smooth.values()), gradients(smooth))
        parts = {f"encoder.{name}": getattr(model.encoder, name) for name in ("patch_embed", "blocks")}
        parts |= {name: getattr(model, name, None) for name in ("decoder", "pyramid")}
        for part, module in parts.items():
            if module is None:  # a form without it
                continue
            named = [p for _, p in sorted(module.named_parameters()) if p.requires_grad]
            found[f"gradient of {part}"] = torch.cat([p.grad.flatten() for p in named])
        for parameter in model.parameters():
            parameter.grad = None
    return found


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative L2 distance."""
    off, size = (torch.linalg.vector_norm(x, dtype=torch.float64) for x in (got - want, want))
    return (off / size.clamp(min=1e-30)).item()


@contextlib.contextmanager
def exact_convolutions() -> Iterator[None]:
    """Convolutions without TF32, for a comparison."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def memory_of(work: Workload, mode: str, options: Options) -> dict[str, float | None]:
    work.step()
    gpu = torch.device(options.device).type == "cuda"
    if gpu:
        gc.collect()
        torch.cuda.empty_cache()
    found = {"allocated_mib": work.resident + peak_bytes(work.step, options.device)}
    found["reserved_mib"] = torch.cuda.max_memory_reserved() if gpu else None
    found["saved_mib"] = saved_bytes(work.forward, work.model.parameters()) if mode == "train" else None
    return {name: None if size is None else report.rounded(size / 2**20) for name, size in found.items()}


def _row(key, mode, work, timings, fault, notes, options) -> dict:
    ratio, depth, peer = key
    timed = key in timings.samples
    row = {
        "part": options.part,
        "mode": mode,
        "size": "{}x{}".format(*options.size),
        "batch": options.batch,
        "dtype": options.dtype,
        "ratio": ratio,
        "depth": depth,
        "model": peer,
        "status": fault or "ok",
        **report.timed_columns(timings, key),
        "parameters": sum(p.numel() for p in work.model.parameters()),
        "trainable": sum(p.numel() for p in work.model.parameters() if p.requires_grad),
        **(notes or dict.fromkeys(("allocated_mib", "reserved_mib", "saved_mib"))),
        **dict.fromkeys(COMPARED),
    }
    for other in OVER:
        there = timed and (ratio, depth, other) in timings.samples and other != peer
        speedup = timings.speedup(key, (ratio, depth, other)) if there else None
        row |= report.ratio_columns(f"vs_{other.replace('-', '_')}", speedup)
    return row


def _relate(rows: list[dict], options: Options) -> list[dict]:
    """Fill in what is relative to the default row, here and in the paper."""
    defaults = {row["model"]: row for row in rows if (row["ratio"], row["depth"]) == options.default}
    tables = paper()
    for row in rows:
        base = defaults[row["model"]]
        for name, column in _RELATIVE:
            if row[column] and base[column]:
                row[name] = report.rounded(row[column] / base[column], 4)
        if row["mode"] != "train" or options.default != (0.5, 4):
            continue
        if row["depth"] == 4:
            theirs = [(line["ratio"] == row["ratio"], line) for line in tables["table1"]]
        else:
            theirs = [(line["depth"] == row["depth"] and row["ratio"] == 0.5, line) for line in tables["table7"]]
        default = next(line for line in tables["table7"] if line["depth"] == 4)
        for same, line in theirs:
            if same:
                row["paper_time"] = report.rounded(line["hours"] / default["hours"], 4)
                row["paper_memory"] = report.rounded(line["memory_gb"] / default["memory_gb"], 4)
    return rows


def _table(rows: Sequence[dict], options: Options):
    first = rows[0]
    timed = [row for row in rows if row["rounds"]]
    control = f"; A/A {report.ratio(timed[0], 'control')}" if timed else ""
    title = f"{first['part']}, {first['mode']}, {first['size']}, batch {first['batch']}, {first['dtype']}{control}"
    columns = (
        "ratio, depth, model", "params M", "ms", "MiB", "saved MiB", "speed vs original", "vs original-sdpa",
        "vs clean", *COMPARED.values(),
    )  # fmt: skip
    body = []
    for row in rows:
        name = f"{row['ratio']:g}, {row['depth']}, {row['model']}"
        if row["status"] != "ok":
            body.append((name, row["status"], *["-"] * (len(columns) - 2)))
            continue
        body.append((
            name, f"{row['parameters'] / 1e6:.2f}", report.number(row["p50_ms"], ".4g"),
            report.number(row["allocated_mib"], ".0f"), report.number(row["saved_mib"], ".0f"),
            *(report.ratio(row, f"vs_{other.replace('-', '_')}") for other in OVER),
            *(report.number(row[k], ".2f") for k in COMPARED),
        ))  # fmt: skip
    return report.table(title, columns, body)
