"""``mimdet bench static``: machine code of every kernel at the launches of a training step, and a model of its time.

Kernels are compiled ahead of time for a GPU that is not there, disassembled, and walked with the launch's arguments, so
nothing runs; see ``sass`` and ``gpu_model``. Where there is a GPU of the architecture, each launch is also timed.
"""

from __future__ import annotations

import concurrent.futures
import math
import multiprocessing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from ...kernels import build
from ...kernels.ahead import Launch
from .. import cuda_launches, environment, launch_cost, views
from ..gpu_model import GPUS, Gpu, predict
from ..machine_code import Compiled, MissingToolError, Pointer, compile_triton, tool, triton_missing
from ..real_launches import Recorded, record
from ..row import Results, key
from ..sass import REGION
from ..session import DTYPES
from ..workload import Setting, check_choices

IMPLEMENTATIONS = ("triton", "cuda")
AMD = "gfx942"  # registers and spills only
ARCHITECTURES = (*GPUS, AMD)
BOUNDS = ("memory", "issue", "mufu", "tensor", "latency")


@dataclass(frozen=True, kw_only=True)
class Options(Setting):
    """What to compile.

    Attributes:
        arch: one of ``ARCHITECTURES``.
        batches: images of a step, one table each.
        implementations: triton, cuda, or both.
    """

    arch: str = "sm_90"
    batches: Sequence[int] = (1,)
    implementations: Sequence[str] = IMPLEMENTATIONS
    dtype: str = "bf16"


def run(options: Options) -> Results:
    """Compile and walk every launch, print the tables and write the file.

    Raises:
        ValueError: an unknown architecture, implementation or dtype, or a config without kernels.
        MissingToolError: Triton, or the disassembler that comes with it, is missing.
    """
    check_choices([options.arch], ARCHITECTURES, "to compile for")
    check_choices(options.implementations, IMPLEMENTATIONS, "to compile")
    check_choices([options.dtype], ("fp32", "bf16"), "to compile")
    missing = triton_missing()
    if missing:
        raise MissingToolError(f"mimdet bench static records the launches of Triton's kernels: {missing}")
    if options.arch != AMD:
        for name in ("cuobjdump", "nvdisasm"):
            tool(name)
    described = environment.describe(options.device) | {"device": _device(options.arch)}
    results = Results(environment.command(), described, _limits(options.arch))
    options = replace(options, implementations=_available(options))
    for batch in options.batches:
        results.rows += rows_of(replace(options, batch=batch))
        results.write(options.output)
    show(results.rows)
    return results


def _available(options: Options) -> list[str]:
    """The implementations that can be compiled here; why not of the others is printed.

    Raises:
        ValueError: none can.
    """
    reasons = {}
    if "cuda" in options.implementations:
        try:
            if options.arch == AMD:
                raise build.BuildError(f"nvcc does not compile for {AMD}")
            cuda_library(options.arch)
        except build.BuildError as error:
            reasons["cuda"] = error
            views.console().print(f"without the CUDA C++ kernels: {error}", style="yellow")
    available = [name for name in options.implementations if name not in reasons]
    if not available:
        raise ValueError(f"nothing to compile: {'; '.join(map(str, reasons.values()))}")
    return available


def rows_of(options: Options) -> list[dict]:
    """Rows of one batch, in the order of the step.

    Raises:
        ValueError: the config's step launches no kernel of ours.
    """
    recorded = record(options, options.implementations, _capability(options.arch))
    if not recorded:
        raise ValueError(f"a training step of {options.config} launches no kernel of mimdet.kernels")
    keys = {**options.keys("static", "train"), "config": options.config}
    rows: dict[tuple, dict] = {}
    timed = _on_this_gpu(options.arch)
    with views.progress(f"kernels, batch {options.batch}", len(recorded)) as advance:
        computed = _in_processes(lambda one: _rows_of_launch(options, one), recorded)
        for one, of_launch in zip(recorded, computed, strict=True):
            for row in of_launch:
                if timed and one.implementation == "triton":
                    row["measured_us"] = measured_us(one.launch)
                # Strides and alignment alone do not make another row.
                place = key(keys | row)
                if place in rows:
                    rows[place]["launches"] += row["launches"]
                else:
                    rows[place] = keys | row
            advance()
    return list(rows.values())


def _in_processes(function: Callable, items: Sequence) -> Iterator:
    """Results of every item, computed by as many processes as there are cores: compilers take a second a kernel."""
    workers = min(build.workers(), len(items))
    if workers < 2 or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(function, items)
        return
    global _forked  # functions and launches cannot be pickled; forked processes have them
    _forked = function, items
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(_run_forked, range(len(items)))


_forked: tuple[Callable, Sequence] | None = None


def _run_forked(index: int) -> Any:
    function, items = _forked
    return function(items[index])


def _rows_of_launch(options: Options, recorded: Recorded) -> list[dict]:
    return [_row(options, recorded, compiled) for compiled in compile_launch(options.arch, recorded)]


def compile_launch(arch: str, recorded: Recorded) -> list[Compiled]:
    """The kernels of one kind of launch."""
    if recorded.implementation == "triton":
        return [_compile_triton(arch, recorded.launch)]
    launched = cuda_library(arch).launches(recorded.launch)
    return [one._replace(kernel=_full_name(recorded.operation, one.kernel)) for one in launched]


def _full_name(operation: str, kernel: str) -> str:
    """With the operation's name in front, once."""
    kernel = kernel.removesuffix("_kernel")
    return kernel if kernel.startswith(operation) else f"{operation}_{kernel}"


cuda_library = cache(cuda_launches.Library)  # compiled once a process


def _capability(arch: str) -> int | str:
    return arch if arch == AMD else int(arch.removeprefix("sm_"))


def _compile_triton(arch: str, launch: Launch) -> Compiled:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Triton's, of changes in later versions
        binary = compile_triton(_capability(arch), launch)
    named = launch.named()
    case = ", ".join(name.lower().removeprefix("has_") for name, value in named.items() if value is True)
    values = [value for name, kind in binary.signature.items() for value in _passed(named[name], kind)]
    values += [None] * (len(binary.parameters) - len(values))  # Triton's pointers to scratch memory
    kernel = launch.kernel.__name__.strip("_").removesuffix("_kernel")
    return Compiled(kernel, case, binary, launch.grid, (32 * binary.warps,), values)


def _tensors(arguments: Sequence[Any]) -> list[Pointer]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Pointer)]


def _passed(value: Any, kind: Any) -> list:
    """What a compiled kernel gets of an argument; a tuple is passed one by one, constants are not."""
    if isinstance(kind, tuple):
        return [part for pair in zip(value, kind, strict=True) for part in _passed(*pair)]
    return [] if kind == "constexpr" else [value]


def _on_this_gpu(arch: str) -> bool:
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    return "sm_{}{}".format(*torch.cuda.get_device_capability()) == arch


def measured_us(launch: Launch, device: str = "cuda", timer: Callable | None = None) -> float:
    """Median time of one of Triton's launches on a GPU, with zeros in its tensors.

    Args:
        device: of the tensors.
        timer: function of no arguments -> its time in milliseconds; by default Triton's.
    """
    if timer is None:
        from triton.testing import do_bench

        timer = partial(do_bench, return_mode="median")
    named = launch.named()
    contents = {id(named[name]): content(named[name], named) for name, content in CONTENTS.items() if name in named}

    def real(argument: Pointer) -> torch.Tensor:
        if id(argument) in contents:
            return torch.tensor(contents[id(argument)], dtype=argument.dtype, device=device)
        return torch.empty_strided(argument.shape, argument.stride, dtype=argument.dtype, device=device).zero_()

    arguments = tree_map_only(Pointer, real, launch.arguments)
    return round(1e3 * timer(lambda: launch.kernel[launch.grid](*arguments, **launch.constants)), 3)


def _row(options: Options, recorded: Recorded, compiled: Compiled) -> dict:
    binary = compiled.binary
    largest = max(_tensors(recorded.launch.arguments), key=lambda tensor: tensor.count)
    row = {
        "operation": recorded.operation, "implementation": recorded.implementation, "direction": recorded.direction,
        "kernel": compiled.kernel, "case": compiled.case, "shape": _shape(largest),
        "arch": options.arch, "status": "ok", "launches": recorded.count, "grid": math.prod(compiled.grid),
        "registers": binary.registers, "spills": binary.stack, "shared_bytes": binary.shared,
    }  # fmt: skip
    if options.arch == AMD:
        return row
    gpu = GPUS[options.arch]
    executed = execute(gpu, recorded.launch, compiled)
    predicted = predict(gpu, binary, row["grid"], executed)
    moved = executed.loaded.total() + executed.stored.total()
    row |= {
        "waves": predicted.waves,
        "warps_per_sm": predicted.warps_per_sm,
        **({"load_bits": executed.loaded.most_common(1)[0][0]} if executed.loaded else {}),
        **({"store_bits": executed.stored.most_common(1)[0][0]} if executed.stored else {}),
        "instructions_per_element": executed.instructions * binary.warps * row["grid"] * 32 / largest.count,
        **{name: getattr(executed, name) for name in ("instructions", "mufu", "tensor", "lds", "barriers")},
        "bytes": moved,
        "minimum_bytes": executed.minimum_bytes,
        "minimum_us": predicted.minimum_us,
        "predicted_us": predicted.predicted_us,
        "of_limit": predicted.minimum_us / predicted.predicted_us,
        "bound": predicted.bound,
        "data_dependent": executed.unknown,
    }
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}


def _shape(tensor: Pointer) -> str:
    """As "1x4200x512 fp32"."""
    known = {dtype: name for name, dtype in DTYPES.items()}
    return f"{'x'.join(map(str, tensor.shape))} {known.get(tensor.dtype, str(tensor.dtype).removeprefix('torch.'))}"


def execute(gpu: Gpu, launch: Launch, compiled: Compiled) -> launch_cost.Executed:
    """Walk one kernel."""
    sizes = [size for _, size in compiled.binary.parameters]
    contents = {}
    named = launch.named() if compiled.binary.signature else {}
    for name, content in CONTENTS.items():
        if isinstance(named.get(name), Pointer):
            contents[named[name].address >> REGION] = content(named[name], named)
    tensors = {tensor.address >> REGION: tensor.bytes for tensor in _tensors(launch.arguments)}
    values = launch_cost.parameter_values(compiled.arguments, sizes)
    return launch_cost.execute(gpu, compiled.binary, compiled.grid, compiled.block, values, tensors, contents)


# Parameter -> integers of a tensor that decides how often loops run, from the tensor and all arguments.
CONTENTS: dict[str, Callable[[Pointer, Mapping[str, Any]], list[int]]] = {
    "cu_seqlens": lambda tensor, named: [i * named["T"] // (tensor.count - 1) for i in range(tensor.count)],
}


def _device(arch: str) -> str:
    """For the column of devices: no GPU ran."""
    return f"the machine code for {arch}" + (f", a model of the {GPUS[arch].name}" if arch in GPUS else "")


def _limits(arch: str) -> dict[str, float]:
    if arch not in GPUS:
        return {}
    gpu = GPUS[arch]
    flop = gpu.sms * gpu.ghz * gpu.tensor_flop / 1e3
    return {"copy_gb_s": gpu.gb_s, "gemm_bf16_tflop_s": flop, "sms": gpu.sms, "ghz": gpu.ghz}


def published(rows: Sequence[dict]) -> list[dict]:
    """Of each kernel the launches that take most of its time in a step; a step has several sizes of most kernels.

    Attention has two: the encoder's heads and the decoder's are other kernels in all but their name.
    """
    most: dict[tuple, dict] = {}
    for row in rows:
        width = row["shape"].partition(" ")[0].rpartition("x")[2] if row["operation"] == "attention_varlen" else ""
        place = (*key(row, "case", "shape"), width)
        if _of_step(row) > _of_step(most.setdefault(place, row)):
            most[place] = row
    return list(most.values())


def _of_step(row: dict) -> float:
    return row["launches"] * row.get("predicted_us", 0.0)


def columns(rows: Sequence[dict]) -> list[views.Column]:
    """For a terminal and for Markdown."""
    batches = {row["batch"] for row in rows}
    return [
        ("kernel", label, ""),
        *([("batch", "batch", "d")] if len(batches) > 1 else []),
        ("launches", "launches", "d"),
        ("blocks", "grid", "d"),
        ("waves", "waves", ".2f"),
        ("registers", "registers", "d"),
        ("spilled bytes", "spills", "d"),
        ("warps an SM", "warps_per_sm", "d"),
        (
            "load, store bits",
            lambda row: ", ".join(str(row.get(name, "-")) for name in ("load_bits", "store_bits")),
            "",
        ),
        ("instructions an element", "instructions_per_element", ".1f"),
        ("minimum us", "minimum_us", ".1f"),
        ("predicted us", "predicted_us", ".1f"),
        ("measured us", "measured_us", ".1f"),
        ("of limit", "of_limit", ".0%"),
        ("bound", lambda row: row.get("bound"), ""),
    ]


def label(row: dict) -> str:
    """Name of a row's kernel."""
    case = f" ({row['case']})" if row.get("case") else ""
    return f"`{row['kernel']}`{case} {row['shape']}" + (" CUDA" if row["implementation"] == "cuda" else "")


def show(rows: Sequence[dict]) -> None:
    """Print the table of each batch."""
    out = views.console()
    for of_batch in views.grouped(rows, "batch").values():
        title = views.title(of_batch, "arch", "config", "size", "batch", "dtype")
        out.print(views.terminal(f"Kernels of a training step, {title}", columns(of_batch), of_batch))
        if any(row.get("data_dependent") for row in of_batch):
            names = dict.fromkeys(row["kernel"] for row in of_batch if row.get("data_dependent"))
            out.print(f"their loops depend on data, and count once: {', '.join(names)}")


def draw(rows: Sequence[dict]):
    """Share of the limit of each kernel, a panel for each batch."""
    rows = [row for row in published(rows) if "of_limit" in row]
    panels = views.grouped(rows, "batch")
    figure = views.figure(9, 1.2 + 0.14 * len(rows))
    every = figure.subplots(len(panels), squeeze=False, sharex=True, height_ratios=list(map(len, panels.values())))
    colors = dict(zip(BOUNDS, views.BARS, strict=False))
    for (axes,), (batch, lines) in zip(every, panels.items(), strict=True):
        shares, bounds = ([100 * row["of_limit"] for row in lines], [colors[row["bound"]] for row in lines])
        views.bars(axes, [label(row).replace("`", "") for row in lines], {"": (shares, bounds)})
        axes.tick_params(axis="y", labelsize=5)
        axes.margins(y=0.01)
        axes.set_title(f"batch {batch}", fontsize=9)
    handles = [every[0][0].barh([0], [0], color=color) for color in colors.values()]
    every[0][0].legend(handles, [f"bound by {name}" for name in colors], fontsize=7, loc="lower right")
    every[-1][0].set_xlabel("% of the limit (bandwidth or tensor cores)")
    figure.suptitle(views.title(rows, "arch", "config", "size", "dtype"), fontsize=10)
    return figure
