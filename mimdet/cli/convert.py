"""``mimdet convert``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Format(str, Enum):
    """Formats of the written checkpoint."""

    detector = "detector"
    mae = "mae"
    backbone = "backbone"


def convert(
    source: Annotated[Path, typer.Argument(help="Checkpoint to read: of this project, the original, or MAE.")],
    target: Annotated[Path, typer.Argument(help="File to write.")],
    to: Annotated[Format, typer.Option(help="What to write.")] = Format.detector,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing target.")] = False,
) -> None:
    """Convert a checkpoint to another format.

    * `detector`: only the weights and class names of a training checkpoint, about a third of its size, in the
      format that the original MIMDet loads too.
    * `mae`: encoder and decoder of a detector under MAE's names, to initialize another detector.
    * `backbone`: the part of a MAE checkpoint that a detector uses, under the detector's names.
    """
    from ..checkpoint.convert import convert_checkpoint

    for line in convert_checkpoint(source, target, to.value, force):
        typer.echo(line)
