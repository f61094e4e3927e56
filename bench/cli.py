"""``mimdet bench``: its commands and their options. Nothing here imports torch before a command runs."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from ..files import check_replaceable
from .gpu import MINUTES

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
RATIOS = (0.125, 0.25, 0.5, 0.75, 1.0)
DEPTHS = (1, 2, 4, 8)
DIRECTIONS = ("forward", "backward")


class Device(str, Enum):
    """Where to measure."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


Size = Annotated[
    str | None,
    typer.Option(
        metavar="HxW", help="Of the images; default: 800x1344 on a GPU, 480x640 on a CPU.", show_default=False
    ),
]
Ratio = Annotated[float, typer.Option(help="Keep ratio.")]
Modes = Annotated[list[str] | None, typer.Option(help="train or inference; may be repeated.")]


def setting(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Config overrides.", show_default=False)
    ] = None,
    part: Annotated[str, typer.Option(help="backbone, or detector: the whole step with its update.")] = "backbone",
    impl: Annotated[list[str] | None, typer.Option(help="To measure; may be repeated. Default: all.")] = None,
    former_impl: Annotated[list[str] | None, typer.Option("--peers", hidden=True)] = None,
    size: Size = None,
    batch: Annotated[int, typer.Option(min=1, help="Images.")] = 1,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, or bf16 or fp16 autocast; default: bf16 on a GPU, else fp32.")
    ] = None,
    config: Annotated[str, typer.Option(help="The detector's config.")] = "mimdet_b_mask_rcnn",
    rounds: Annotated[
        int, typer.Option(min=0, help="Interleaved rounds; 15 or more to publish, 0 measures memory only.")
    ] = 15,
    device: Annotated[Device, typer.Option(help="auto takes the GPU where there is one.")] = Device.auto,
    output: Annotated[
        Path | None, typer.Option(help="File of results, .json or .csv; default: output/bench/.", show_default=False)
    ] = None,
) -> dict[str, Any]:
    """The options that all experiments share, as ``workload.Setting`` takes them."""
    from .row import ALIASES

    if rounds in (1, 2):
        raise ValueError(f"--rounds: an interval needs at least 3 rounds, and 0 counts memory alone; got {rounds}")
    where = _device(device)
    names = [ALIASES.get(name, name) for name in (*(impl or ()), *(former_impl or ()))]
    return {
        "part": part,
        "size": _size(size, where),
        "batch": batch,
        "dtype": _dtype(dtype, where),
        "config": config,
        "overrides": tuple(overrides or ()),
        "rounds": rounds,
        "device": where,
        "output": output,
        **({"implementations": tuple(names)} if names else {}),
    }


def experiment(name: str, without: tuple[str, ...] = (), **defaults: Any) -> Callable:
    """A command with the options of ``setting`` beside those of the decorated function.

    The function gets what ``setting`` returns as its first argument, and returns an experiment's module and options.

    Args:
        without: options of ``setting`` that the command does not have.
        defaults: of options of ``setting``, where they are not the same.
    """

    def register(function: Callable[..., tuple[ModuleType, Any]]) -> Callable:
        shared = inspect.signature(setting, eval_str=True).parameters.values()
        common = [p.replace(default=defaults.get(p.name, p.default)) for p in shared if p.name not in without]
        specific = list(inspect.signature(function, eval_str=True).parameters.values())[1:]

        @functools.wraps(function)
        def command(**options) -> None:
            values = setting(**{parameter.name: options.pop(parameter.name) for parameter in common})
            usual = values["part"] == defaults.get("part", "backbone")
            values["output"] = _output(values["output"], name if usual else f"{name}_{values['part']}")
            module, chosen = function({k: v for k, v in values.items() if k not in without}, **options)
            module.run(chosen)
            typer.echo(f"results in {chosen.output}")

        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (*common[:1], *specific, *common[1:])]
        command.__signature__ = inspect.Signature(parameters)
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return app.command(name)(command)

    return register


@app.callback()
def prepare() -> None:
    """Measure speed and memory beside baselines and the machine's limit, after a check that all are equal."""
    # torch.profiler, which counts memory on a CPU, logs two lines per use; it reads this when torch is imported.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")


@experiment("ops", without=("overrides", "part", "former_impl", "batch", "dtype", "config", "rounds"))
def ops(
    setting: dict,
    op: Annotated[list[str] | None, typer.Option(help="Operation; may be repeated. Default: all.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="fp32, bf16 or fp16; may be repeated.")] = None,
    shape: Annotated[
        list[str] | None, typer.Option(metavar="BxNxC", help="Instead of the model's shapes; may be repeated.")
    ] = None,
    direction: Annotated[list[str], typer.Option(help="forward or backward; may be repeated.")] = DIRECTIONS,
    batch: Annotated[list[int], typer.Option(min=1, help="Of the model's shapes; may be repeated.")] = (1,),
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved rounds; 15 or more to publish.")] = 15,
):
    """Each operation, forward and backward: every implementation, torch.compile, and the original's code.

    An implementation is timed only if its outputs and gradients are correct. A speed-up whose 95% interval includes 1
    is shown as "no difference"; A/A in a title is the first implementation against itself.
    """
    from .experiments import ops

    shapes = tuple(map(_sizes, shape or ()))
    chosen = {"ops": op or (), "dtypes": dtype or (), "directions": direction, "shapes": shapes}
    return ops, ops.Options(batches=batch, rounds=rounds, **chosen, **setting)


@experiment("table1")
def table1(setting: dict):
    """Time and memory over the keep ratio, in training and inference, beside the paper's Table 1."""
    return _tables(setting, ratios=RATIOS)


@experiment("table7")
def table7(setting: dict):
    """Time and memory over the decoder's depth, in training, beside the paper's Table 7."""
    return _tables(setting, depths=DEPTHS, modes=("train",))


@experiment("backbone")
def backbone(
    setting: dict,
    ratio: Annotated[list[float] | None, typer.Option(help="Keep ratio; may be repeated. Default: 0.5.")] = None,
    depth: Annotated[list[int] | None, typer.Option(min=1, help="Decoder blocks; may be repeated.")] = None,
    mode: Modes = None,
):
    """Time and memory of chosen ratios and depths; ratio 0.5 with the config's depth is always measured too."""
    modes = {"modes": tuple(mode)} if mode else {}
    return _tables(setting, ratios=tuple(map(_ratio, ratio or ())), depths=tuple(depth or ()), **modes)


@experiment("table8", without=("impl", "former_impl", "config"))
def table8(setting: dict, mode: Modes = ("train",)):
    """Time and memory of the paper's Table 8, beside it: sampled tokens with decoders of 4 and 1 blocks, windows.

    The last model is not the paper's: its ConvStem has LayerNorm. Each model is timed only if its features and
    gradients equal those of plain PyTorch with the same weights. Overrides apply to all of them.
    """
    from .experiments import table8

    return table8, table8.Options(modes=tuple(mode), **setting)


@experiment("packed", without=("part", "impl", "former_impl", "size", "batch"))
def packed(
    setting: dict,
    size: Annotated[list[str] | None, typer.Option(metavar="HxW", help="One image; may be repeated.")] = (
        "480x640",
        "640x480",
        "320x480",
    ),
    ratio: Ratio = 0.5,
    mode: Modes = ("train", "inference"),
):
    """A batch of images of different sizes through the backbone: padded (canvas), packed, and one by one.

    Packed is timed only if each image's features and gradients equal those of the image alone.
    """
    from .experiments import packed

    sizes = tuple(_size(text, setting["device"]) for text in size)
    return packed, packed.Options(sizes=sizes, ratio=_ratio(ratio), modes=tuple(mode), **setting)


@experiment("roofline", part="detector", without=("impl", "former_impl"), rounds=5)
def roofline(
    setting: dict,
    ratio: Ratio = 0.5,
    depth: Annotated[int | None, typer.Option(min=1, help="Decoder blocks; default: the config's.")] = None,
    mode: Annotated[str, typer.Option(help="train or inference.")] = "train",
    impl: Annotated[str, typer.Option(help="Implementation, as in the tables.")] = "ours",
    model: Annotated[str | None, typer.Option(hidden=True)] = None,
):
    """FLOPs, bytes and time of a step by component, and the machine's floor for each.

    Floors come from the copy bandwidth and the GEMM rate measured in the same run: an operation needs at least the
    longer of computing its FLOPs and moving each of its tensors once. Operations are timed one at a time.
    """
    from .experiments import roofline
    from .row import ALIASES

    name = ALIASES.get(model or impl, model or impl)
    depth = depth or _decoder_depth(setting)
    return roofline, roofline.Options(ratio=_ratio(ratio), depth=depth, mode=mode, implementation=name, **setting)


@experiment("detectron2", without=("part", "config"), rounds=5)
def detectron2(
    setting: dict,
    *,
    original: Annotated[
        Path, typer.Option(help="Checkout of the original MIMDet.", envvar="MIMDET_ORIGINAL", show_default=False)
    ],
    ratio: Ratio = 0.5,
    mode: Modes = ("train", "inference"),
):
    """The whole detector beside the original MIMDet's own code on Detectron2: a training step, inference, components.

    All have one set of weights, the checkpointing and the optimizer of their configs, and are timed only if losses,
    gradients and detections equal the original's. `ours-detectron2` is our backbone in Detectron2, `ours-fast-step` is
    our whole step in it. Operators that a step dispatches, and those that make the host wait for a GPU, are counted.
    Components are measured in rounds of their own.

    Detectron2 must be installed. Overrides apply to all configs, in Detectron2's syntax.
    """
    from .experiments import detectron2

    return detectron2, detectron2.Options(original=original, ratio=_ratio(ratio), modes=tuple(mode), **setting)


@experiment("launches", without=("part", "impl", "former_impl", "rounds", "device", "size", "dtype"))
def launches(
    setting: dict,
    *,
    size: Annotated[str, typer.Option(metavar="HxW", help="Of the images.")] = "800x1344",
    dtype: Annotated[str, typer.Option(help="fp32, or bf16 autocast.")] = "fp32",
    original: Annotated[
        Path | None,
        typer.Option(help="Checkout of the original MIMDet: count its code too.", show_default=False),
    ] = None,
):
    """How many operations a training step dispatches, by component, direction and kind; without a GPU.

    Ours runs on fake CUDA tensors, which compute nothing. The original's code, which needs Detectron2, computes a
    forward and a backward at a small size on the CPU; overrides then apply to both configs, in Detectron2's syntax.
    Backward recomputes nothing, unless an override says so.
    """
    from .experiments import launches

    shape = _size(size, "cpu")
    return launches, launches.Options(size=shape, dtype=dtype, original=original, device="cpu", **setting)


@experiment("static", without=("part", "impl", "former_impl", "size", "batch", "dtype", "rounds", "device"))
def static(
    setting: dict,
    arch: Annotated[str, typer.Option(help="sm_80, sm_89, sm_90, sm_100, or AMD's gfx942.")] = "sm_90",
    batch: Annotated[list[int], typer.Option(min=1, help="Images; may be repeated.")] = (1,),
    impl: Annotated[list[str], typer.Option("--impl", help="triton or cuda; may be repeated.")] = ("triton", "cuda"),
    size: Size = None,
    dtype: Annotated[str, typer.Option(help="fp32, or bf16 autocast.")] = "bf16",
):
    """Machine code of every kernel of a training step: resources, instructions, predicted time; without a GPU.

    The launches are those of the config's step on fake CUDA tensors. Triton's compiler and nvcc compile for `--arch`,
    nvdisasm disassembles, and a model of the GPU predicts each launch's time; see docs/benchmarks.md.
    """
    from .experiments import static

    chosen = {"arch": arch, "batches": batch, "implementations": impl, "dtype": dtype, "size": _size(size, "cuda")}
    return static, static.Options(device="cpu", **chosen, **setting)


@app.command("gpu")
def gpu(
    part: Annotated[list[str] | None, typer.Option(help="Part to run; may be repeated. Default: all.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Measure again what has a result already.")] = False,
    minutes: Annotated[float, typer.Option(min=1, help="Of the whole run; its parts' budgets grow with it.")] = MINUTES,
    output: Annotated[
        Path | None, typer.Option(help="Folder; default: bench/results/<name of the GPU>.", show_default=False)
    ] = None,
) -> None:
    """Everything worth measuring on a GPU, in parts: the tables, every operation, the roofline, the whole step.

    Parts that have a result are skipped, so the same command continues a run after Ctrl-C, a failed part or the end of
    its time. Exit status 1 means that some part is still missing.
    """
    import torch

    from .gpu import PARTS, default_folder, run_gpu

    if not torch.cuda.is_available():
        message = "no GPU found (mimdet info shows what PyTorch sees); on a CPU, run the subcommands with --device cpu"
        typer.echo(f"mimdet bench gpu: {message}", err=True)
        raise typer.Exit(2)
    unknown = set(part or ()) - {known.name for known in PARTS}
    if unknown:
        names = ", ".join(known.name for known in PARTS)
        raise ValueError(f"no part {', '.join(sorted(unknown))}; choose from {names}")
    chosen = [known for known in PARTS if not part or known.name in part]
    if not run_gpu(chosen, output or default_folder(), minutes, force):
        raise typer.Exit(1)


@app.command("compare")
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="Results of one run.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Results of another.")],
) -> None:
    """Speed-up of B over A with 95% intervals, for every row in both files.

    `mimdet bench compare before.json after.json`

    Load and clocks differ between two runs by more than the intervals show: speed-ups measured within one run are
    better evidence.
    """
    from .compare import show

    show(first, second)


@app.command("plot")
def plot(
    files: Annotated[list[Path], typer.Argument(help="Files of results.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the figures; default: beside each file.", show_default=False)
    ] = None,
) -> None:
    """Draw each file: time and memory beside the paper's curve, operations beside the limit, or the roofline."""
    from .plot import plot
    from .row import Results

    for file in files:
        path = (output or file.parent) / f"{file.stem}.png"
        plot(Results.read(file), path)
        typer.echo(str(path))


@app.command("readme")
def readme(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(help="Markdown pages; default: README.md and docs/*.md that have markers.", show_default=False),
    ] = None,
) -> None:
    """Generate the tables of Markdown pages from the results and configs that their markers name."""
    from .readme import pages, update

    for path in paths or pages(Path()):
        typer.echo(f"{path}: {'filled' if update(path) else 'as it was'}")


def _tables(setting: dict, **choice):
    from .experiments import backbone

    return backbone, backbone.Options(default=(0.5, _decoder_depth(setting)), **choice, **setting)


def _decoder_depth(setting: dict) -> int:
    from ..config import load

    decoder = load(setting["config"], setting["overrides"]).model.backbone.bottom_up.decoder
    if decoder is None:
        raise ValueError(f"config {setting['config']} has no decoder to vary; mimdet bench table8 measures it")
    return decoder.depth


def _device(device: Device) -> str:
    import torch

    if device is Device.cuda and not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU found; mimdet info shows what PyTorch sees")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device is Device.auto else device.value


def _dtype(name: str | None, device: str) -> str:
    from .session import DTYPES

    name = name or ("bf16" if device == "cuda" else "fp32")
    if name not in DTYPES:
        raise ValueError(f"no dtype {name!r}; choose from {', '.join(DTYPES)}")
    return name


def _ratio(ratio: float) -> float:
    if not 0 < ratio <= 1:
        raise ValueError(f"a keep ratio is in (0, 1], got {ratio}")
    return ratio


def _output(path: Path | None, name: str) -> Path:
    path = path or Path("output/bench") / f"{name}.json"
    if path.suffix not in (".json", ".csv"):
        raise ValueError(f"--output {path}: the name must end in .json or .csv")
    check_replaceable(path, "mimdet bench", '"schema"')
    return path


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        raise ValueError(f"sizes are numbers with x between them, as 2x600x768; got {text!r}") from None


def _size(text: str | None, device: str) -> tuple[int, int]:
    """Height and width, multiples of 32."""
    if text is None:
        return (800, 1344) if device == "cuda" else (480, 640)
    sizes = _sizes(text)
    if len(sizes) != 2 or any(side < 32 or side % 32 for side in sizes):
        raise ValueError(f"--size must be HxW, multiples of 32, got {text!r}")
    return sizes
