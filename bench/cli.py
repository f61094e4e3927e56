"""``mimdet bench``."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .gpu import MINUTES

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


class Device(str, Enum):
    """Where to measure."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


DeviceOption = Annotated[Device, typer.Option(help="auto takes the GPU where there is one.")]
Rounds = Annotated[int, typer.Option(min=3, help="Interleaved rounds; 15 or more for figures to publish.")]
TableRounds = Annotated[
    int, typer.Option(min=0, help="Interleaved rounds; 15 or more for figures to publish, 0 to count memory alone.")
]
Output = Annotated[
    Path | None, typer.Option(help="File of results, .json or .csv; default: output/bench/.", show_default=False)
]
Size = Annotated[
    str | None,
    typer.Option(metavar="HxW", help="Pictures; default: 800x1344 on a GPU, 480x640 on a CPU.", show_default=False),
]


@app.callback()
def prepare() -> None:
    """Measure speed and memory: always beside peers and the machine's limit, checked equal first."""
    # The profiler that counts memory on a CPU writes two lines a use; it reads this when torch is imported.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")


@app.command("ops")
def ops(
    op: Annotated[list[str] | None, typer.Option(help="Operation; may be repeated. Default: all.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="fp32, bf16 or fp16; may be repeated.")] = None,
    shape: Annotated[
        list[str] | None, typer.Option(metavar="BxNxC", help="Instead of the model's shapes; may be repeated.")
    ] = None,
    impl: Annotated[list[str] | None, typer.Option(help="Form, as the table names it; may be repeated.")] = None,
    direction: Annotated[list[str] | None, typer.Option(help="forward or backward. Default: both.")] = None,
    size: Size = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Of the model's shapes; may be repeated.")] = None,
    rounds: Rounds = 15,
    device: DeviceOption = Device.auto,
    output: Output = None,
) -> None:
    """Each operation, forward and backward: every implementation, torch.compile, and the original's form.

    A form is timed only if its outputs and gradients are right. A speed-up whose 95% interval includes 1 is written
    "no difference"; A/A in a title is the first form against itself.
    """
    from .ops import DIRECTIONS, Options, run_ops

    where = _device(device)
    directions = tuple(direction or DIRECTIONS)
    unknown = set(directions) - set(DIRECTIONS)
    if unknown:
        raise ValueError(f"no direction {', '.join(unknown)}; choose from {', '.join(DIRECTIONS)}")
    options = Options(
        device=where,
        output=_output(output, "ops"),
        ops=tuple(op or ()),
        dtypes=tuple(dtype or ()),
        directions=directions,
        shapes=tuple(map(_sizes, shape or ())),
        impls=tuple(impl or ()),
        size=_picture(size, where),
        batches=tuple(batch or (1,)),
        rounds=rounds,
    )
    run_ops(options)
    typer.echo(f"results in {options.output}")


Peers = Annotated[list[str] | None, typer.Option("--peers", help="Model to measure; may be repeated. Default: all.")]
Part = Annotated[str, typer.Option(help="backbone, or detector: the whole step with its update.")]
Batch = Annotated[int, typer.Option(min=1, help="Pictures.")]
Dtype = Annotated[str | None, typer.Option(help="fp32, or bf16 or fp16 autocast; default: bf16 on a GPU, else fp32.")]
Config = Annotated[str, typer.Option(help="The detector's config.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Config overrides.", show_default=False)
]
RATIOS = (0.125, 0.25, 0.5, 0.75, 1.0)
DEPTHS = (1, 2, 4, 8)


@app.command("table1")
def table1(
    opts: Overrides = None,
    part: Part = "backbone",
    peers: Peers = None,
    size: Size = None,
    batch: Batch = 1,
    dtype: Dtype = None,
    config: Config = "mimdet_b_mask_rcnn",
    rounds: TableRounds = 15,
    device: DeviceOption = Device.auto,
    output: Output = None,
) -> None:
    """Time and memory over the keep ratio, in training and inference, beside the paper's Table 1."""
    _tables("table1", opts, part, peers, size, batch, dtype, config, rounds, device, output, RATIOS, (), None)


@app.command("table7")
def table7(
    opts: Overrides = None,
    part: Part = "backbone",
    peers: Peers = None,
    size: Size = None,
    batch: Batch = 1,
    dtype: Dtype = None,
    config: Config = "mimdet_b_mask_rcnn",
    rounds: TableRounds = 15,
    device: DeviceOption = Device.auto,
    output: Output = None,
) -> None:
    """Time and memory over the decoder's depth, in training, beside the paper's Table 7."""
    _tables("table7", opts, part, peers, size, batch, dtype, config, rounds, device, output, (), DEPTHS, ("train",))


@app.command("table8")
def table8(
    opts: Overrides = None,
    part: Part = "backbone",
    mode: Annotated[list[str] | None, typer.Option(help="train or inference. Default: train.")] = None,
    size: Size = None,
    batch: Batch = 1,
    dtype: Dtype = None,
    rounds: Rounds = 15,
    device: DeviceOption = Device.auto,
    output: Output = None,
) -> None:
    """Time and memory of the four forms of the input, beside the paper's Table 8: sampled tokens or windows.

    Each form is timed only if its features and gradients are those of the same weights in plain PyTorch. Overrides are
    of all four configs.
    """
    from .forms import Options, run_forms

    options = Options(
        output=_output(output, "table8" if part == "backbone" else f"table8_{part}"),
        part=part,
        modes=tuple(mode or ("train",)),
        **_setting(device, size, batch, dtype, opts, rounds),
    )
    run_forms(options)
    typer.echo(f"results in {options.output}")


@app.command("backbone")
def backbone(
    opts: Overrides = None,
    ratio: Annotated[list[float] | None, typer.Option(help="Keep ratio; may be repeated. Default: 0.5.")] = None,
    depth: Annotated[list[int] | None, typer.Option(min=1, help="Decoder blocks; may be repeated.")] = None,
    mode: Annotated[list[str] | None, typer.Option(help="train or inference. Default: both.")] = None,
    part: Part = "backbone",
    peers: Peers = None,
    size: Size = None,
    batch: Batch = 1,
    dtype: Dtype = None,
    config: Config = "mimdet_b_mask_rcnn",
    rounds: TableRounds = 15,
    device: DeviceOption = Device.auto,
    output: Output = None,
) -> None:
    """Time and memory of chosen ratios and depths; the row of ratio 0.5 and the config's depth is always there."""
    _tables(
        "backbone",
        opts,
        part,
        peers,
        size,
        batch,
        dtype,
        config,
        rounds,
        device,
        output,
        ratio or (),
        depth or (),
        mode,
    )


@app.command("packed")
def packed(
    opts: Overrides = None,
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HxW",
            help="One picture; may be repeated. Default: 480x640, 640x480 and 320x480.",
            show_default=False,
        ),
    ] = None,
    ratio: Annotated[float, typer.Option(help="Keep ratio.")] = 0.5,
    mode: Annotated[list[str] | None, typer.Option(help="train or inference. Default: both.")] = None,
    dtype: Dtype = None,
    config: Config = "mimdet_b_mask_rcnn",
    rounds: Rounds = 15,
    device: DeviceOption = Device.auto,
    output: Output = None,
) -> None:
    """A batch of pictures of different sizes through the backbone: on one canvas, packed, and one by one.

    Packed is timed only if each picture's features and gradients are those that it has alone.
    """
    from .packed import Options, run_packed
    from .workload import MODES

    where = _device(device)
    options = Options(
        device=where,
        output=_output(output, "packed"),
        sizes=tuple(_picture(text, where) for text in size or ("480x640", "640x480", "320x480")),
        ratio=_ratio(ratio),
        modes=tuple(mode or MODES),
        config=config,
        overrides=tuple(opts or ()),
        dtype=_dtype(dtype, where),
        rounds=rounds,
    )
    run_packed(options)
    typer.echo(f"results in {options.output}")


@app.command("roofline")
def roofline(
    opts: Overrides = None,
    ratio: Annotated[float, typer.Option(help="Keep ratio.")] = 0.5,
    depth: Annotated[int | None, typer.Option(min=1, help="Decoder blocks; default: the config's.")] = None,
    mode: Annotated[str, typer.Option(help="train or inference.")] = "train",
    model: Annotated[str, typer.Option(help="Model to measure, as the tables name it.")] = "ours",
    part: Part = "detector",
    size: Size = None,
    batch: Batch = 1,
    dtype: Dtype = None,
    config: Config = "mimdet_b_mask_rcnn",
    rounds: Annotated[int, typer.Option(min=3, help="Of the step, and of each operation.")] = 5,
    device: DeviceOption = Device.auto,
    output: Output = None,
) -> None:
    """What a step computes and moves by component, the machine's floor for it, and where the time goes.

    Floors come from the copy bandwidth and the GEMM rate measured in the same run: an operation needs at least the
    longer of computing its FLOPs and moving each of its tensors once. Operations are timed one at a time.
    """
    from .roofline import Options, run_roofline

    default = _decoder_depth(config, opts)
    options = Options(
        output=_output(output, "roofline"),
        ratio=_ratio(ratio),
        depth=depth or default,
        mode=mode,
        peer=model,
        part=part,
        config=config,
        **_setting(device, size, batch, dtype, opts, rounds),
    )
    run_roofline(options)
    typer.echo(f"results in {options.output}")


@app.command("detectron2")
def detectron2(
    original: Annotated[
        Path, typer.Option(help="Checkout of the original MIMDet.", envvar="MIMDET_ORIGINAL", show_default=False)
    ],
    opts: Overrides = None,
    ratio: Annotated[float, typer.Option(help="Keep ratio.")] = 0.5,
    peers: Peers = None,
    size: Size = None,
    batch: Batch = 1,
    dtype: Dtype = None,
    rounds: Rounds = 15,
    device: DeviceOption = Device.auto,
    output: Output = None,
) -> None:
    """A training step of the backbone inside Detectron2's pyramid, beside the original MIMDet's own code.

    Detectron2 must be there. Overrides are of both configs, and in Detectron2's form.
    """
    from .detectron2 import PEERS, Options, run_detectron2

    options = Options(
        original=original,
        output=_output(output, "detectron2"),
        ratio=_ratio(ratio),
        peers=tuple(peers or PEERS),
        **_setting(device, size, batch, dtype, opts, rounds),
    )
    run_detectron2(options)
    typer.echo(f"results in {options.output}")


@app.command("gpu")
def gpu(
    part: Annotated[list[str] | None, typer.Option(help="Part to run; may be repeated. Default: all.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Measure again what is there already.")] = False,
    minutes: Annotated[float, typer.Option(min=1, help="Of the whole run; its parts' budgets grow with it.")] = MINUTES,
    output: Annotated[
        Path | None, typer.Option(help="Folder; default: bench/results/<name of the GPU>.", show_default=False)
    ] = None,
) -> None:
    """Everything worth measuring on a GPU, in parts: the tables, every operation, the roofline, the whole step.

    A part whose result is there is skipped, so that the same command goes on where the last run ended: after Ctrl-C,
    after a failed part, or where the time was up. Exit status 1 means that some part is still missing.
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
    """How fast B is over A, for every row that both files have, with 95% intervals.

    `mimdet bench compare before.json after.json`

    Two runs can differ by more than their intervals say, in load or clocks: what one run measured side by side is
    the better evidence.
    """
    from .compare import show

    show(first, second)


@app.command("plot")
def plot(
    files: Annotated[list[Path], typer.Argument(help="Files of results.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the pictures; default: beside each file.", show_default=False)
    ] = None,
) -> None:
    """Draw each file: time and memory beside the paper's curve, operations beside the limit, or the roofline."""
    from .plot import plot
    from .results import Results

    for file in files:
        path = (output or file.parent) / f"{file.stem}.png"
        plot(Results.read(file), path)
        typer.echo(str(path))


@app.command("readme")
def readme(
    pages: Annotated[
        list[Path] | None,
        typer.Argument(help="Markdown with places for results; default: README.md and the docs' pages of tables."),
    ] = None,
) -> None:
    """Fill the tables of README and docs from the files of results, and the folders of configs, that they name."""
    from .readme import PAGES, update

    for page in pages or map(Path, PAGES):
        typer.echo(f"{page}: {'filled' if update(page) else 'as it was'}")


def _tables(name, opts, part, peers, size, batch, dtype, config, rounds, device, output, ratios, depths, modes) -> None:
    from .backbone import Options, run_tables
    from .models import PEERS
    from .workload import MODES

    options = Options(
        output=_output(output, name if part == "backbone" else f"{name}_{part}"),
        ratios=tuple(map(_ratio, ratios)),
        depths=tuple(depths),
        default=(0.5, _decoder_depth(config, opts)),
        modes=tuple(modes or MODES),
        part=part,
        peers=tuple(peers or PEERS),
        config=config,
        **_setting(device, size, batch, dtype, opts, rounds),
    )
    run_tables(options)
    typer.echo(f"results in {options.output}")


def _decoder_depth(config: str, opts: list[str] | None) -> int:
    from ..config import load

    decoder = load(config, opts or []).model.backbone.bottom_up.decoder
    if decoder is None:
        raise ValueError(f"config {config} has no decoder to vary; mimdet bench table8 measures it")
    return decoder.depth


def _setting(device, size, batch, dtype, opts, rounds) -> dict:
    """What all that measure a model are told of it."""
    where = _device(device)
    return {
        "device": where,
        "size": _picture(size, where),
        "batch": batch,
        "dtype": _dtype(dtype, where),
        "overrides": tuple(opts or ()),
        "rounds": rounds,
    }


def _device(device: Device) -> str:
    import torch

    if device is Device.cuda and not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU found; mimdet info shows what PyTorch sees")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device is Device.auto else device.value


def _dtype(word: str | None, device: str) -> str:
    from .cases import DTYPES

    word = word or ("bf16" if device == "cuda" else "fp32")
    if word not in DTYPES:
        raise ValueError(f"no dtype {word!r}; choose from {', '.join(DTYPES)}")
    return word


def _ratio(ratio: float) -> float:
    if not 0 < ratio <= 1:
        raise ValueError(f"a keep ratio is in (0, 1], got {ratio}")
    return ratio


def _output(given: Path | None, name: str) -> Path:
    path = given or Path("output/bench") / f"{name}.json"
    if path.suffix not in (".json", ".csv"):
        raise ValueError(f"--output {path}: the name must end in .json or .csv")
    return path


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        raise ValueError(f"sizes are numbers with x between them, as 2x600x768; got {text!r}") from None


def _picture(text: str | None, device: str) -> tuple[int, int]:
    """Height and width, multiples of 32."""
    if text is None:
        return (800, 1344) if device == "cuda" else (480, 640)
    sizes = _sizes(text)
    if len(sizes) != 2 or any(side < 32 or side % 32 for side in sizes):
        raise ValueError(f"--size must be HxW, multiples of 32, got {text!r}")
    return sizes
