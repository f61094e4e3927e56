"""Where a run's messages go: the terminal and ``log.txt``."""

from __future__ import annotations

import contextlib
import logging
import sys
from logging.handlers import MemoryHandler
from pathlib import Path

from rich.console import Console
from rich.text import Text

from ..files import drop_dead_stream, naming

_FORMAT = "%(asctime)s %(message)s"
_ROOT = "mimdet"


class RunLog:
    """Context that sends the package's log messages to stdout and to ``<output_dir>/log.txt``.

    Only rank 0 writes the file; other ranks print warnings and errors. An exception that leaves the context is
    written to the file on its way; whoever catches it prints it. A message logged with
    ``extra={"file_only": True}`` stays out of a terminal, where a progress bar shows the same.

    Nobody has to read on: when the terminal or the pipe at stdout is gone, the rest goes to the file alone.

    Args:
        output_dir: folder, made when missing; None writes no file.
        rank: of this process.
        deferred: leave the folder alone until :meth:`open_file`; messages before are kept for it.

    Attributes:
        console: rich console when stdout is a terminal and this is rank 0, else None.
    """

    def __init__(self, output_dir: str | Path | None, rank: int = 0, deferred: bool = False):
        self.output_dir = None if output_dir is None else Path(output_dir).expanduser()
        self.rank = rank
        self.deferred = deferred
        self.console = Console(file=sys.stdout) if rank == 0 and _is_terminal() else None
        self._logger = logging.getLogger(_ROOT)
        self._handlers: list[logging.Handler] = []
        self._file: logging.Handler | None = None
        self._before = (self._logger.level, self._logger.propagate)

    def __enter__(self) -> RunLog:
        self._before = (self._logger.level, self._logger.propagate)
        if self.console is not None:
            self._add(_ConsoleHandler(self.console), logging.INFO)
        else:
            self._add(_StdoutHandler(sys.stdout), logging.INFO if self.rank == 0 else logging.WARNING)
        if self.rank == 0 and self.output_dir is not None:
            self._file = MemoryHandler(sys.maxsize, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
            self._add(self._file, logging.INFO)
            if not self.deferred:
                self.open_file()
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False  # the application's root handlers would print all a second time
        return self

    def open_file(self) -> None:
        """Write to ``log.txt`` what was logged so far and all that follows; on rank 0 only.

        Raises:
            OSError: the folder or the file cannot be made.
        """
        if not isinstance(self._file, MemoryHandler):
            return
        kept, path = self._file, self.output_dir / "log.txt"
        with naming(path):
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self._file = _LogFile(path, encoding="utf-8")
        self._add(self._file, logging.INFO)
        kept.setTarget(self._file)
        kept.flush()
        self._handlers.remove(kept)
        self._logger.removeHandler(kept)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and self._file is not None:
            text = f"{type(error).__name__}: {error}"
            self._file.handle(self._logger.makeRecord(_ROOT, logging.ERROR, __file__, 0, text, (), None))
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


class _StdoutHandler(logging.StreamHandler):
    """Plain lines."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - name given by logging
        drop_dead_stream(self.stream)


class _LogFile(logging.FileHandler):
    """A file whose full disk is said once, and does not end the training."""

    _said = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - name given by logging
        if not self._said:
            self._said = True
            logging.getLogger(__name__).warning("cannot write %s: %s", self.baseFilename, sys.exc_info()[1])

    def close(self) -> None:
        with contextlib.suppress(OSError):  # said before
            super().close()


class _ConsoleHandler(logging.Handler):
    """Prints above a live progress bar instead of through it."""

    def __init__(self, console: Console):
        super().__init__()
        self._console = console
        self.addFilter(lambda record: not getattr(record, "file_only", False))

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else ""
        try:
            self._console.print(Text(self.format(record), style=style), soft_wrap=True)
        except OSError:
            drop_dead_stream(self._console.file)


def _is_terminal() -> bool:
    if sys.stdout is None:  # closed before the start
        return False
    console = Console(file=sys.stdout)
    return sys.stdout.isatty() and not console.is_dumb_terminal
