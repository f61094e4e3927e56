"""``mimdet parity``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Device(str, Enum):
    """Where to compare."""

    cpu = "cpu"
    cuda = "cuda"


class Dtype(str, Enum):
    """Of the main inputs."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


def parity(
    quick: Annotated[
        bool, typer.Option("--quick", help="Small inputs, the model once: under a minute on two cores.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Every size, and the model by every implementation: half an hour.")
    ] = False,
    only: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="Cases whose id has this in it, or a glob: `nms_slots-*-forward`."),
    ] = None,
    device: Annotated[Device | None, typer.Option(help="Default: the CPU, and the GPU where there is one.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Default: all.")] = None,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write JUnit XML, as CI systems read it.", show_default=False)
    ] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write every number, for --compare.", show_default=False)
    ] = None,
    original: Annotated[
        Path | None,
        typer.Option(
            help="Checkout of the original MIMDet: run its code too. Detectron2 must be installed.",
            envvar="MIMDET_ORIGINAL",
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A.json B.json", help="Run nothing: compare two files of --json.", show_default=False),
    ] = None,
) -> None:
    """Check the numbers of every operation and implementation that can run here, and of the model.

    `mimdet parity --quick --junit parity.xml`

    An operation is compared with PyTorch, torchvision and pycocotools in float64: its error may be twice that of
    plain PyTorch in the same dtype, plus a few units in the last place. The model is compared with recordings of the
    original MIMDet on Detectron2, which are in the package. Without a GPU, Triton's kernels run under its interpreter.

    Exit status: 0 all within their budgets, 1 a case failed, 2 what was asked for cannot be done.

    `--compare` lists the errors that grew from A to B, and where `auto` takes another implementation; status 1 if a
    case passed in A and fails in B.
    """
    from ..parity.cases import BadUseError
    from ..testing import RecordingError

    try:
        if compare is not None:
            others = quick or full or only or device or dtype or junit or json
            if others:
                raise BadUseError("--compare runs nothing: it takes no other option")
            failed = _compare(*compare)
        else:
            if quick and full:
                raise BadUseError("--quick and --full: take one of them")
            level = "quick" if quick else "full" if full else "default"
            failed = _run(level, only, device and device.value, dtype and dtype.value, junit, json, original)
    except (BadUseError, RecordingError, FileNotFoundError, FileExistsError) as error:
        _error(str(error))
        raise typer.Exit(2) from None
    if failed:
        raise typer.Exit(1)


def _run(level, only, device, dtype, junit, json, original) -> bool:
    from ..bench.views import console, progress
    from ..files import check_replaceable
    from ..parity import report
    from ..parity.cases import BadUseError, select
    from ..parity.run import run

    if junit is not None and json is not None and junit.resolve() == json.resolve():
        raise BadUseError(f"--junit and --json are both {json}: give each another file")
    for path in (junit, json):
        if path is not None:
            if not path.absolute().parent.is_dir():
                raise FileNotFoundError(f"{path}: there is no folder {path.absolute().parent}")
            check_replaceable(path, report.FORMAT)
    cases, unavailable = select(level, only, device, dtype, original)
    with progress("cases", len(cases)) as advance:
        results = run(cases, original, advance)
    about = report.report(level, results, unavailable)
    screen = console()
    for line in report.header(about):
        screen.print(line, markup=False)
    screen.print(report.table(results))
    for result in about.failed:
        screen.print(f"failed: {result.case.id}: {result.message}", markup=False, soft_wrap=True)
    screen.print(report.summary(about))
    if junit is not None:
        about.write_junit(junit)
    if json is not None:
        about.write_json(json)
    return bool(about.failed)


def _compare(first: Path, second: Path) -> bool:
    from ..bench.views import console
    from ..parity import compare

    result = compare.compare(first, second)
    screen = console()
    for table in compare.tables(result):
        screen.print(table)
    screen.print(compare.summary(result))
    return bool(result.newly_failed)


def _error(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
