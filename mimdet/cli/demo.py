"""``mimdet demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[Path, typer.Option(help="Folder for pictures, weights, metrics and plots.")] = Path(
        "output/demo"
    ),
    opts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of configs/demo.py.", show_default=False),
    ] = None,
) -> None:
    """Train a small MIMDet on generated pictures, evaluate it, and draw what it finds.

    Takes a few minutes on two CPU cores. Nothing is downloaded.
    """
    from ..demo import run_demo

    run_demo(output, opts or [])
