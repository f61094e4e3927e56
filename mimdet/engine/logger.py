"""Where a run's messages go: the terminal and ``log.txt``."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

_FORMAT = "%(asctime)s %(message)s"
_ROOT = "mimdet"


class RunLog:
    """Context that sends the package's log messages to stdout and to ``<output_dir>/log.txt``.

    Only rank 0 writes the file; other ranks print warnings and errors. An exception that leaves the context is
    logged on its way. A message logged with
    ``extra={"file_only": True}`` stays out of a terminal, where a progress bar shows the same.

    Args:
        output_dir: folder, made when missing; None writes no file.
        rank: of this process.

    Attributes:
        console: rich console when stdout is a terminal and this is rank 0, else None.
    """

    def __init__(self, output_dir: str | Path | None, rank: int = 0):
        self.output_dir = None if output_dir is None else Path(output_dir).expanduser()
        self.rank = rank
        self.console = Console(file=sys.stdout) if rank == 0 and _is_terminal() else None
        self._logger = logging.getLogger(_ROOT)
        self._handlers: list[logging.Handler] = []
        self._before = (self._logger.level, self._logger.propagate)

    def __enter__(self) -> RunLog:
        self._before = (self._logger.level, self._logger.propagate)
        if self.console is not None:
            self._add(_ConsoleHandler(self.console), logging.INFO)
        else:
            self._add(logging.StreamHandler(sys.stdout), logging.INFO if self.rank == 0 else logging.WARNING)
        if self.rank == 0 and self.output_dir is not None:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self._add(logging.FileHandler(self.output_dir / "log.txt", encoding="utf-8"), logging.INFO)
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False  # the application's root handlers would print all a second time
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            self._logger.error("%s: %s", type(error).__name__, error)
        for handler in self._handlers:
            self._logger.removeHandler(handler)
            handler.close()
        self._handlers.clear()
        level, self._logger.propagate = self._before
        self._logger.setLevel(level)

    def _add(self, handler: logging.Handler, level: int) -> None:
        handler.setLevel(level)
        handler.setFormatter(_Formatter(self.rank))
        self._handlers.append(handler)
        self._logger.addHandler(handler)


class _Formatter(logging.Formatter):
    """Time and message; warnings and errors say so, other ranks say which they are."""

    def __init__(self, rank: int):
        super().__init__(_FORMAT)
        self._rank = f"[rank {rank}] " if rank else ""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - name given by logging
        level = f"{record.levelname} " if record.levelno >= logging.WARNING else ""
        return f"{record.asctime} {self._rank}{level}{record.message}"


class _ConsoleHandler(logging.Handler):
    """Prints above a live progress bar instead of through it."""

    def __init__(self, console: Console):
        super().__init__()
        self._console = console
        self.addFilter(lambda record: not getattr(record, "file_only", False))

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else ""
        self._console.print(Text(self.format(record), style=style), soft_wrap=True)


def _is_terminal() -> bool:
    console = Console(file=sys.stdout)
    return sys.stdout.isatty() and not console.is_dumb_terminal
