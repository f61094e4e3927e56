"""``mimdet bench ops``: every implementation of every operation, beside its peers and the machine's limit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..kernels import table as kernel_table
from . import environment, report
from .cases import DTYPES, OPS, Case, Outputs, Tensors, case, cases
from .equality import differentiate, why_wrong
from .limits import gemm_key, measure_limits
from .measure import Run, Timings, measure, timer_for
from .memory import peak_bytes
from .results import Results

DIRECTIONS = ("forward", "backward")
# Seconds of a pass: the GPU's events resolve half a microsecond, and each of their calls waits to be queued first.
_LEAST = {"cpu": 5e-3, "cuda": 5e-4}
Form = Callable[[Tensors], Outputs]


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        ops, dtypes, directions: words of ``cases.OPS``, ``cases.DTYPES`` and ``DIRECTIONS``; empty means all ops,
            float32 and on a GPU bfloat16, both directions.
        shapes: instead of the model's; see ``cases.case``.
        impls: forms to measure, by name; empty means all.
        device: "cpu" or "cuda".
        size: height and width of the pictures that the model's shapes follow from.
        batches: of those shapes.
        rounds: see ``measure``.
        output: file of results.
        limits: measured before when None.
    """

    device: str
    output: Path
    ops: Sequence[str] = ()
    dtypes: Sequence[str] = ()
    directions: Sequence[str] = DIRECTIONS
    shapes: Sequence[tuple[int, ...]] = ()
    impls: Sequence[str] = ()
    size: tuple[int, int] = (480, 640)
    batches: Sequence[int] = (1,)
    rounds: int = 15
    limits: Mapping[str, float] | None = None


def run_ops(options: Options) -> Results:
    """Measure, print a table after each case, and write the file after each, so that Ctrl-C loses only one.

    Raises:
        ValueError: a word that is not known, or a shape that does not fit.
    """
    gpu = torch.device(options.device).type == "cuda"
    dtypes = options.dtypes or (("fp32", "bf16") if gpu else ("fp32",))
    for word in dtypes:
        if word not in DTYPES:
            raise ValueError(f"no dtype {word!r}; choose from {', '.join(DTYPES)}")
    todo = {}
    for op in options.ops or OPS:
        for dtype in dtypes:
            given = [case(op, dtype, shape) for shape in options.shapes]
            for made in given or cases(op, dtype, *options.size, options.batches):
                todo[made.op, made.name, made.shape, made.dtype] = made
    limits = options.limits or measure_limits(options.device, [DTYPES[word] for word in dtypes])
    found = Results("ops", environment.command(), environment.describe(options.device), dict(limits))
    out = report.console()
    out.print(f"{found.environment['device']}, {found.environment['threads']} threads, " + _in_words(limits))
    with report.progress() as bar:
        task = bar.add_task("", total=len(todo))
        for made in todo.values():
            bar.update(task, description=f"{made.op} {_shape(made)} {made.dtype}")
            for rows in measure_case(made, options, limits):
                found.rows += rows
                found.write(options.output)
                out.print(_table(rows))
            bar.advance(task)
    return found


def measure_case(made: Case, options: Options, limits: Mapping[str, float]) -> Iterator[list[dict]]:
    """Rows of each direction and cache state. A form that is wrong or cannot run has a row that says why instead."""
    inputs = made.make(options.device)
    forms = forms_of(made, options)
    with settings():
        gradients, faults = check_forms(made, forms, inputs)
        running = {name: form for name, form in forms.items() if name not in faults}
        directions = [d for d in options.directions if d in made.moved]
        for direction in directions:
            runs = {name: run_of(form, inputs, made, gradients, direction) for name, form in running.items()}
            for cold in (True, False) if torch.device(options.device).type == "cuda" else (False,):
                timer = timer_for(options.device, cold)
                least = _LEAST[torch.device(options.device).type]
                timings = measure(runs, options.rounds, timer=timer, least=least) if runs else Timings({})
                yield [
                    _row(made, direction, cold, name, timings, limits, runs.get(name), faults.get(name), options)
                    for name in forms
                ]


def forms_of(made: Case, options: Options) -> dict[str, Form]:
    """Every form by name, "eager" first: the ratios are to it, and it is the one measured twice."""
    device = torch.device(options.device).type
    usable = [r.impl for r in kernel_table(device, DTYPES[made.dtype]) if r.op == made.kernels_op and r.usable]
    impls = ["eager", *(impl for impl in usable if impl != "eager")]
    forms: dict[str, Form] = {impl: _with_impl(made, impl) for impl in impls}
    compiled = torch.compile(_with_impl(made, "eager"), fullgraph=True, dynamic=False)
    forms = {"eager": forms.pop("eager"), "inductor": compiled, **forms, **made.peers}
    unknown = set(options.impls) - set(forms)
    if unknown:
        raise ValueError(f"{made.op} has no form {', '.join(sorted(unknown))} here; it has {', '.join(forms)}")
    return {name: form for name, form in forms.items() if not options.impls or name in options.impls}


def _with_impl(made: Case, impl: str) -> Form:
    return lambda inputs: made.run(inputs, impl)


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """Full float32 everywhere, and compiled graphs that can be walked backward more than once."""
    torch._dynamo.reset()
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch._functorch.config.patch(donated_buffer=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32


def check_forms(made: Case, forms: Mapping[str, Form], inputs: Tensors) -> tuple[list[torch.Tensor], dict[str, str]]:
    """Random gradients of the outputs, and what is wrong with a form, by name."""
    reference = made.reference or _with_impl(made, "eager")
    with torch.no_grad():
        outputs = reference(inputs)
    generator = torch.Generator().manual_seed(9)
    gradients = [torch.randn(o.shape, generator=generator).to(o) for o in outputs] if made.differentiable else []

    def compute(form: Form, inputs: Tensors, gradients: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return differentiate(form, inputs, made.differentiable, gradients, made.comparable)

    double = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    exact = compute(reference, double, [g.double() for g in gradients])
    same = compute(reference, inputs, gradients)
    faults = {}
    for name, form in forms.items():
        try:
            fault = why_wrong(compute(form, inputs, gradients), same, exact, made.terms)
        except Exception as error:  # whatever a compiler or a kernel raises, the other forms go on
            faults[name] = f"cannot run: {type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
        else:
            if fault is not None:
                faults[name] = f"wrong: {fault}"
    return gradients, faults


def run_of(form: Form, inputs: Tensors, made: Case, gradients: list[torch.Tensor], direction: str) -> Run:
    """What is timed; the backward's graph is made here, once."""
    leaves = {k: v.detach().requires_grad_(k in made.differentiable) for k, v in inputs.items()}
    if direction == "forward":
        return lambda: form(leaves)
    outputs, wanted = form(leaves), [leaves[name] for name in made.differentiable]
    return lambda: torch.autograd.grad(outputs, wanted, gradients, retain_graph=True)


def _row(made, direction, cold, name, timings, limits, run, fault, options) -> dict:
    row = {
        "op": made.op,
        "case": made.name,
        "shape": _shape(made),
        "dtype": made.dtype,
        "direction": direction,
        "cache": "cold" if cold else "warm",
        "impl": name,
        "status": fault or "ok",
        **report.timed_columns(timings, name),
        "peak_mib": report.rounded(peak_bytes(run, options.device) / 2**20) if run else None,
    }
    seconds = timings.percentiles(name)[1] if run else None
    moved, flops = made.moved[direction], made.flops.get(direction, 0)
    floor = moved / limits["copy_gb_s"] / 1e9
    if flops:
        floor = max(floor, flops / limits[gemm_key(DTYPES[made.dtype])] / 1e12)
    row["gb_s"] = report.rounded(moved / seconds / 1e9) if run else None
    row["tflop_s"] = report.rounded(flops / seconds / 1e12) if run and flops else None
    row["of_limit"] = report.rounded(floor / seconds) if run else None
    for peer in ("eager", "inductor"):
        there = run and peer in timings.samples and name != peer
        row |= report.ratio_columns(f"vs_{peer}", timings.speedup(name, peer) if there else None)
    return row


def _shape(made: Case) -> str:
    return "x".join(map(str, made.shape))


def _in_words(limits: Mapping[str, float]) -> str:
    gemms = [f"GEMM {k.split('_')[1]} {v:.3g} TFLOP/s" for k, v in limits.items() if k.startswith("gemm")]
    return ", ".join([f"copy {limits['copy_gb_s']:.3g} GB/s", *gemms])


def _table(rows: Sequence[dict]):
    first = rows[0]
    timed = [row for row in rows if row["status"] == "ok"]
    control = f"; A/A {report.ratio(timed[0], 'control')}" if timed else ""
    title = " ".join(first[key] for key in ("op", "case", "shape", "dtype", "direction", "cache")) + control
    columns = ("form", "ms p50 [p20, p80]", "GB/s", "of limit", "speed vs eager", "vs inductor", "peak MiB")
    body = []
    for row in rows:
        if row["status"] != "ok":
            body.append((row["impl"], row["status"], *["-"] * 5))
            continue
        milliseconds = "{:.4g} [{:.3g}, {:.3g}]".format(*(row[k] for k in ("p50_ms", "p20_ms", "p80_ms")))
        body.append((
            row["impl"], milliseconds, report.number(row["gb_s"]), report.number(row["of_limit"], ".0%"),
            report.ratio(row, "vs_eager"), report.ratio(row, "vs_inductor"), report.number(row["peak_mib"]),
        ))  # fmt: skip
    return report.table(title, columns, body)
