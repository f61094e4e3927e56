"""``mimdet bench ops``: every implementation of every operation, beside its baselines and the machine's limit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch

from ...kernels import table as kernel_table
from ...kernels.attention_varlen.ops import ALIASES
from .. import session, views
from ..cases import OPS, Case, Outputs, Tensors, case, cases
from ..equality import differentiate, mismatch, reason
from ..limits import floor_seconds
from ..measure import Run, measure, peak_bytes, rounded, timer_for
from ..row import Results, key
from ..session import DTYPES
from ..workload import Setting, check_choices

DIRECTIONS = ("forward", "backward")
# Seconds of a pass: CUDA events resolve half a microsecond, and all calls of a pass are queued first.
_LEAST = {"cpu": 5e-3, "cuda": 5e-4}
# Rows of a published table; implementations in neither tuple are baselines of other libraries.
_OURS = ("triton", "cuda", "cpp", "aten_cpu")
_PLAIN = ("eager", "inductor")
Implementation = Callable[[Tensors], Outputs]


@dataclass(frozen=True, kw_only=True)
class Options(Setting):
    """What to measure; the model's shapes follow from ``size``.

    Attributes:
        ops, dtypes, directions: each one of ``cases.OPS``, ``session.DTYPES`` and ``DIRECTIONS``; empty means all ops,
            float32 and on a GPU bfloat16, both directions.
        shapes: instead of the model's; see ``cases.case``.
        implementations: by name; empty means all.
        batches: of the model's shapes.
    """

    ops: Sequence[str] = ()
    dtypes: Sequence[str] = ()
    directions: Sequence[str] = DIRECTIONS
    shapes: Sequence[tuple[int, ...]] = ()
    implementations: Sequence[str] = ()
    batches: Sequence[int] = (1,)


def run(options: Options) -> Results:
    """Measure, print a table after each case, and write the file after each, so that Ctrl-C loses only one.

    Raises:
        ValueError: an unknown name, or a shape that does not fit.
    """
    dtypes = options.dtypes or (("fp32", "bf16") if options.gpu else ("fp32",))
    check_choices(dtypes, DTYPES, "as dtype")
    check_choices(options.directions, DIRECTIONS, "as direction")
    chosen = {}
    for op in options.ops or OPS:
        for dtype in dtypes:
            chosen_shapes = [case(op, dtype, shape) for shape in options.shapes]
            for one in chosen_shapes or cases(op, dtype, *options.size, options.batches):
                chosen[one.op, one.name, one.shape, one.dtype] = one
    results = session.begin(options.device, dtypes)
    with views.progress("operations", len(chosen)) as advance:
        for one in chosen.values():
            for rows in measure_case(one, options, results.limits):
                results.rows += rows
                results.write(options.output)
                title = views.title(rows, "operation", "case", "shape", "dtype", "direction", "cache")
                views.console().print(views.terminal(title, detailed(rows), rows))
            advance()
    return results


def measure_case(one: Case, options: Options, limits: Mapping[str, float]) -> Iterator[list[dict]]:
    """Rows of each direction and cache state. A wrong or failed implementation has a row with its status instead."""
    inputs = one.make(options.device)
    implementations = implementations_of(one, options)
    with settings():
        gradients, errors = check(one, implementations, inputs)
        for direction in (d for d in options.directions if d in one.moved):
            runs = {
                name: run_of(function, inputs, one, gradients, direction)
                for name, function in implementations.items()
                if name not in errors
            }
            for cold in (True, False) if options.gpu else (False,):
                yield _measure(one, direction, cold, runs, errors, implementations, limits, options)


def _measure(one, direction, cold, runs, errors, names, limits, options) -> list[dict]:
    """Rows in the order of ``names``."""
    keys = {
        "experiment": "ops",
        "operation": one.op,
        "case": one.name,
        "shape": "x".join(map(str, one.shape)),
        "dtype": one.dtype,
        "direction": direction,
        "cache": "cold" if cold else "warm",
    }
    timer, least = timer_for(options.device, cold), _LEAST[torch.device(options.device).type]
    timings = measure(runs, options.rounds, timer=timer, least=least) if runs else None
    flops, moved, rows = one.flops.get(direction, 0), one.moved[direction], []
    for name in names:
        values = {}
        if name in runs:
            seconds = timings.percentiles(name)[1]
            values = {
                "peak_mib": peak_bytes(runs[name], options.device) / 2**20,
                "gb_s": moved / seconds / 1e9,
                "of_limit": floor_seconds(limits, DTYPES[one.dtype], flops, moved) / seconds,
            }
            values |= {"tflop_s": flops / seconds / 1e12} if flops else {}
        status = {"implementation": name, "status": errors.get(name, "ok")}
        times = timings.columns(name) if timings else {}
        rows.append({**keys, **status, **times, **{k: rounded(v) for k, v in values.items()}})
    return rows


def implementations_of(one: Case, options: Options) -> dict[str, Implementation]:
    """By name, "eager" first: it is the one measured twice."""
    kind = torch.device(options.device).type
    usable = [r.impl for r in kernel_table(kind, DTYPES[one.dtype]) if r.op == one.kernels_op and r.usable]
    functions: dict[str, Implementation] = {"eager": _with_impl(one, "eager")}
    functions["inductor"] = torch.compile(functions["eager"], fullgraph=True, dynamic=False)
    functions |= {impl: _with_impl(one, impl) for impl in usable if impl != "eager"}
    functions |= one.baselines
    aliases = ALIASES if one.kernels_op == "attention_varlen" else {}
    chosen = [aliases.get(name, name) for name in options.implementations]
    check_choices(chosen, functions, f"for {one.op} here")
    return {name: f for name, f in functions.items() if not chosen or name in chosen}


def _with_impl(one: Case, impl: str) -> Implementation:
    return lambda inputs: one.run(inputs, impl)


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """Full float32 everywhere, and compiled graphs whose backward can run more than once."""
    torch._dynamo.reset()
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch._functorch.config.patch(donated_buffer=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32


def check(
    one: Case, implementations: Mapping[str, Implementation], inputs: Tensors
) -> tuple[list[torch.Tensor], dict[str, str]]:
    """Random gradients of the outputs, and the status of implementations that are wrong or fail, by name."""
    reference = one.reference or _with_impl(one, "eager")
    with torch.no_grad():
        outputs = reference(inputs)
    generator = torch.Generator().manual_seed(9)
    gradients = [torch.randn(o.shape, generator=generator).to(o) for o in outputs] if one.differentiable else []

    def compute(function: Implementation, inputs: Tensors, gradients: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return differentiate(function, inputs, one.differentiable, gradients, one.comparable)

    double = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    exact = compute(reference, double, [g.double() for g in gradients])
    same_dtype = compute(reference, inputs, gradients)
    errors = {}
    for name, function in implementations.items():
        try:
            difference = mismatch(compute(function, inputs, gradients), same_dtype, exact, one.terms)
        except Exception as error:  # whatever a compiler or a kernel raises
            errors[name] = reason(error)
        else:
            if difference:
                errors[name] = f"wrong: {difference}"
    return gradients, errors


def run_of(function: Implementation, inputs: Tensors, one: Case, gradients: list[torch.Tensor], direction: str) -> Run:
    """The timed function; the graph of backward is built once, here."""
    leaves = {k: v.detach().requires_grad_(k in one.differentiable) for k, v in inputs.items()}
    if direction == "forward":
        return lambda: function(leaves)
    outputs, sources = function(leaves), [leaves[name] for name in one.differentiable]
    return lambda: torch.autograd.grad(outputs, sources, gradients, retain_graph=True)


def published(rows: Sequence[dict]) -> list[dict]:
    """Rows of our implementations; their columns compare them with the baselines."""
    return [row for row in rows if row["implementation"] in _OURS]


def columns(rows: Sequence[dict]) -> list[views.Column]:
    """Times, and speed-ups over plain PyTorch, torch.compile and the fastest of the baselines."""
    best: dict[tuple, dict] = {}
    for row in rows:
        if row["status"] == "ok" and row["implementation"] not in (*_OURS, *_PLAIN):
            place = key(row, "implementation")
            best[place] = min(row, best.get(place, row), key=lambda r: r["p50_ms"])
    return [
        ("operation, tensor", _name, ""),
        ("implementation", "implementation", ""),
        ("direction", "direction", ""),
        ("ms", "p50_ms", ".3g"),
        ("of limit", "of_limit", ".0%"),
        ("vs eager", views.speedup_over("eager", rows), ".2f"),
        ("vs torch.compile", views.speedup_over("inductor", rows), ".2f"),
        ("vs best baseline", lambda row: views.speedup(row, best.get(key(row, "implementation"))), ".2f"),
    ]


def detailed(rows: Sequence[dict]) -> list[views.Column]:
    """For the rows of one operation, named by a title."""
    _, implementation, _, milliseconds, *others = columns(rows)
    spread = [("p20", "p20_ms", ".3g"), ("p80", "p80_ms", ".3g"), ("GB/s", "gb_s", ".3g")]
    return [implementation, milliseconds, *spread, *others, ("peak MiB", "peak_mib", ".3g")]


def _name(row: dict) -> str:
    cold = " cold" if row["cache"] == "cold" else ""
    return f"`{row['operation']}` {row['case']} {row['shape']} {row['dtype']}{cold}"


def draw(rows: Sequence[dict]):
    """One panel a direction, dtype and cache state; a group of bars for each case, one bar an implementation, as long
    as its share of what the machine could do: of the copy bandwidth or, where that binds, of the GEMM rate."""
    panels = list(dict.fromkeys((row["direction"], row["dtype"], row["cache"]) for row in rows))
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    groups: dict[tuple, list[str]] = {}
    for row in rows:
        group = groups.setdefault(_group(row), [])
        group += [row["implementation"]] if row["implementation"] not in group else []
    starts, end = {}, 0
    for group, members in groups.items():
        starts[group], end = end, end + len(members) + 1
    figure = views.figure(12, max(3.0, 1.0 + 0.13 * end))
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True):
        shown = [row for row in rows if (row["direction"], row["dtype"], row["cache"]) == panel]
        for name, color in zip(names, cycle(views.BARS)):
            bars = [row for row in shown if row["implementation"] == name and row["of_limit"]]
            places = [starts[_group(row)] + groups[_group(row)].index(name) for row in bars]
            axes.barh(places, [row["of_limit"] for row in bars], 0.9, color=color, label=name)
        axes.axvline(1.0, color="#222222", linestyle="--", linewidth=1, label="limit, measured")
        axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
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


def _group(row: dict) -> tuple[str, str, str]:
    return row["operation"], row["case"], row["shape"]
