"""The subcommands, and how their errors are shown."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from .. import __version__
from ..bench.cli import app as bench
from ..files import drop_dead_stream
from . import check_data, convert, convert_config, demo, info, parity, predict, show, train

app = typer.Typer(
    name="mimdet",
    help="Fine-tune a MAE pre-trained ViT into an object detector (MIMDet, arXiv 2204.02964).\n\n"
    "New here? `mimdet demo` trains and tests a small detector on generated images in a few minutes.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"mimdet {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


app.command("demo")(demo.demo)
app.command("train")(train.train)
app.command("eval")(train.evaluate)
app.command("predict")(predict.predict)
app.command("check-data")(check_data.check_data)
app.command("info")(info.info)
app.command("convert")(convert.convert)
app.command("convert-config")(convert_config.convert_config)
app.add_typer(show.app, name="show")
app.command("parity")(parity.parity)
app.add_typer(bench, name="bench")


def main() -> None:
    """Run the command line; an error becomes one message and exit status 1.

    A closed stdout, or a pipe whose reader is gone, is no error.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open until the end
    try:
        _run()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                drop_dead_stream(stream)


def _run() -> None:
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("MIMDET_DEBUG"):
            raise
        # str(KeyError) is the repr of its message.
        message = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
        from omegaconf.errors import OmegaConfBaseException

        if isinstance(error, OmegaConfBaseException):
            message = f"config key {error.full_key}: {str(error).splitlines()[0]}"
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        who = f"[rank {os.environ.get('RANK')}] " if several else ""
        console = Console(stderr=True)
        console.print(Text.assemble(who, ("error: ", "bold red"), str(message) or type(error).__name__), soft_wrap=True)
        expected = (ValueError, KeyError, OSError, RuntimeError, FloatingPointError, OmegaConfBaseException)
        if not isinstance(error, expected):
            console.print(f"({type(error).__name__}; set MIMDET_DEBUG=1 to see where)", style="dim")
        sys.exit(1)
