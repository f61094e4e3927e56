"""``mimdet check-data``."""

from __future__ import annotations

from typing import Annotated

import typer

from .train import ConfigFile, Overrides, TrainImages, TrainJson, ValImages, ValJson, data_overrides

SHOWN = 50  # problems of a dataset that are printed


def check_data(
    config_file: ConfigFile,
    opts: Overrides = None,
    train_json: TrainJson = None,
    train_images: TrainImages = None,
    val_json: ValJson = None,
    val_images: ValImages = None,
    decode: Annotated[bool, typer.Option("--decode", help="Also decode every image, and compare its size.")] = False,
) -> None:
    """Check the annotations and images of a config: all problems at once, and statistics of the data.

    `mimdet check-data --config-file configs/mimdet_b_mask_rcnn.py --train-json a.json --train-images a/ \\
    --val-json b.json --val-images b/`

    Exit status 1 if there is a problem. Training makes the same checks, without `--decode`, up to the first problem.
    """
    from rich.console import Console
    from rich.text import Text

    from ..config import load
    from ..data.check import check_config, report_tables

    overrides = [*data_overrides("train", train_json, train_images), *data_overrides("test", val_json, val_images)]
    reports = check_config(load(config_file, [*overrides, *(opts or [])]), decode)
    console = Console()
    for split, report in reports.items():
        console.print(report_tables(split, report))
        for problem in report.problems[:SHOWN]:
            console.print(Text.assemble(("problem: ", "bold red"), problem), soft_wrap=True)
        if len(report.problems) > SHOWN:
            console.print(f"... and {len(report.problems) - SHOWN} more problems of this kind or another")
        console.print(f"{split}: {len(report.problems) or 'no'} problem{'s' * (len(report.problems) != 1)} found")
    if any(report.problems for report in reports.values()):
        raise typer.Exit(1)
