"""``mimdet demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for images, weights, metrics and plots; default: the config's.", show_default=False),
    ] = None,
    config_file: Annotated[
        str, typer.Option(help="demo, demo_cascade_mask_rcnn, demo_retinanet, or another config on the same data.")
    ] = "demo",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Train anew where the folder has a trained detector.")
    ] = False,
    opts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of the config.", show_default=False),
    ] = None,
) -> None:
    """Train a small MIMDet on generated images, evaluate it, and draw its detections.

    Takes a few minutes on two CPU cores. Nothing is downloaded. The same command resumes a stopped demo.
    """
    from ..demo import run_demo

    run_demo(output, opts or [], config_file, overwrite)
