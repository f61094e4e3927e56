"""``mimdet convert-config``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert_config(
    source: Annotated[str, typer.Argument(help="Config to read: of Detectron2, of the original MIMDet, or native.")],
    target: Annotated[Path, typer.Argument(help="Python file to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing target.")] = False,
) -> None:
    """Write a Detectron2 config as a short native one: a shipped config, and the keys that differ from it.

    `mimdet convert-config mask_rcnn_vitdet_mine.py mine.py`

    Loading it gives the config that loading the source gives. All commands take the source itself too.
    """
    from ..config.write import convert_config

    for line in convert_config(source, target, force):
        typer.echo(line)
