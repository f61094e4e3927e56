"""``mimdet convert``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Form(str, Enum):
    """Forms a checkpoint can be written in."""

    detector = "detector"
    mae = "mae"
    backbone = "backbone"


def convert(
    source: Annotated[Path, typer.Argument(help="Checkpoint to read: ours, the original's, or MAE's.")],
    target: Annotated[Path, typer.Argument(help="File to write.")],
    to: Annotated[Form, typer.Option(help="What to write.")] = Form.detector,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing target.")] = False,
) -> None:
    """Turn one kind of checkpoint into another.

    * `detector`: only the weights and class names of a training checkpoint, about a third of its size, in the form
      that the original MIMDet loads too.
    * `mae`: encoder and decoder of a detector under MAE's names, to start another detector from.
    * `backbone`: the part of a MAE checkpoint that a detector uses, under the detector's names.
    """
    from ..checkpoint.convert import convert_checkpoint

    for line in convert_checkpoint(source, target, to.value, force):
        typer.echo(line)
