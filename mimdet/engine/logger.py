"""Messages, progress and metrics of a run: terminal, log.txt, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import math
import statistics
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text
from torch.utils.tensorboard import SummaryWriter

from ..files import drop_dead_stream, naming, write_atomically

_FORMAT = "%(asctime)s %(message)s"
_ROOT = "mimdet"


class RunLog:
    """Context that sends the package's log messages to stdout and to ``<output_dir>/log.txt``.

    Only rank 0 writes the file; other ranks print warnings and errors. An exception that leaves the context is written
    to the file, not printed: the caller prints it. A message with ``extra={"file_only": True}`` is not printed to a
    terminal, where a progress bar shows its content.

    When the terminal or the pipe at stdout is closed, later messages go to the file alone.

    Args:
        output_dir: folder, created when missing; None writes no file.
        rank: of this process.
        deferred: do not create the folder before :meth:`open_file`; earlier messages are buffered.

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
        self._logger.propagate = False  # root handlers of the application would print every message again
        return self

    def open_file(self) -> None:
        """Open ``log.txt`` for buffered and later messages; on rank 0 only.

        Raises:
            OSError: the folder or the file cannot be created.
        """
        if not isinstance(self._file, MemoryHandler):
            return
        buffer, path = self._file, self.output_dir / "log.txt"
        with naming(path):
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self._file = _LogFile(path, encoding="utf-8")
        self._add(self._file, logging.INFO)
        buffer.setTarget(self._file)
        buffer.flush()
        self._handlers.remove(buffer)
        self._logger.removeHandler(buffer)

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
    """Time and message, with the level of warnings and errors, and the rank unless it is 0."""

    def __init__(self, rank: int):
        super().__init__(_FORMAT)
        self._rank = f"[rank {rank}] " if rank else ""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - name given by logging
        level = f"{record.levelname} " if record.levelno >= logging.WARNING else ""
        return f"{record.asctime} {self._rank}{level}{record.message}"


class _StdoutHandler(logging.StreamHandler):
    """Prints plain lines."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - name given by logging
        drop_dead_stream(self.stream)


class _LogFile(logging.FileHandler):
    """Log file; a full disk gives one warning and does not end the training."""

    _warned = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - name given by logging
        if not self._warned:
            self._warned = True
            logging.getLogger(__name__).warning("cannot write %s: %s", self.baseFilename, sys.exc_info()[1])

    def close(self) -> None:
        with contextlib.suppress(OSError):  # handleError has reported it
            super().close()


class _ConsoleHandler(logging.Handler):
    """Prints messages above a live progress bar."""

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
    if sys.stdout is None:  # stdout was closed before Python started
        return False
    console = Console(file=sys.stdout)
    return sys.stdout.isatty() and not console.is_dumb_terminal


logger = logging.getLogger(__name__)

_WINDOW = 20


class TrainingProgress:
    """Reports steps, with medians of losses and times over the last 20.

    Messages count finished iterations: the line of iteration 1874 begins with 1875.

    Args:
        max_iter, start: number of all iterations, and of those finished before.
        batch_size: images in a step, over all processes.
        log_period: iterations between log lines.
        console: terminal for the progress bar; None for no bar.
    """

    def __init__(self, max_iter: int, start: int, batch_size: int, log_period: int, console: Console | None = None):
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.log_period = log_period
        self._start = start
        self._recent: dict[str, deque[float]] = {}
        self._bar: Progress | None = None
        if console is not None:
            columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.fields[status]}"))
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("training", total=max_iter, completed=start, status="")
            self._bar.start()

    def due(self, iteration: int) -> bool:
        """Whether this iteration's metrics are logged."""
        return (iteration + 1) % self.log_period == 0 or iteration + 1 == self.max_iter

    def step(self, iteration: int, losses: Mapping[str, float], lr: float, seconds: float, data_seconds: float) -> None:
        """Report a finished iteration; ``data_seconds`` of its ``seconds`` were spent waiting for data."""
        for key, value in {**losses, "seconds": seconds, "data": data_seconds}.items():
            self._recent.setdefault(key, deque(maxlen=_WINDOW)).append(value)
        due = self.due(iteration) or iteration == self._start
        if due or self._bar is not None:
            line, short = self._lines(iteration, lr)
            if self._bar is not None:
                self._bar.update(self._task, completed=iteration + 1, status=short)
            if due:
                logger.info("%d/%d %s", iteration + 1, self.max_iter, line, extra={"file_only": True})

    def close(self) -> None:
        """Remove the progress bar."""
        if self._bar is not None:
            with contextlib.suppress(OSError):  # the terminal may be gone
                self._bar.stop()

    def _lines(self, iteration: int, lr: float) -> tuple[str, str]:
        """Metrics for the log, and the few that fit beside a progress bar in 80 columns."""
        median = {key: statistics.median(values) for key, values in self._recent.items()}
        seconds, data = median.pop("seconds"), median.pop("data")
        losses = " ".join(f"{key.removeprefix('loss_')} {value:.4g}" for key, value in median.items())
        eta = datetime.timedelta(seconds=round(seconds * (self.max_iter - iteration - 1)))
        speed = f"{seconds:.3f} s/it (data {data:.3f}) {self.batch_size / max(seconds, 1e-9):.1f} images/s"
        total = f"loss {median['total_loss']:.3f} " if "total_loss" in median else ""
        line = f"{losses} lr {lr:.3g} {speed} eta {eta}{_gpu_memory()}"
        return line, f"{total}{seconds:.2f} s/it eta {eta}"


def _gpu_memory() -> str:
    if not torch.cuda.is_available():
        return ""
    return f" mem {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"


METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends metrics to ``<output_dir>/metrics.jsonl`` and to TensorBoard event files beside it.

    Each line is a JSON object with ``iteration`` (0-based, the last finished); NaN and infinity become
    null. Used on rank 0 only.

    Args:
        output_dir: existing folder.
        start_iteration: first iteration of this run. Lines from it on are dropped: a resumed run repeats them. At 0 the
            file of an earlier run is renamed to ``metrics.<n>.jsonl``.
    """

    def __init__(self, output_dir: str | Path, start_iteration: int = 0):
        self.path = Path(output_dir) / METRICS_FILE
        if start_iteration == 0:
            _set_aside(self.path)
        else:
            _drop_from(self.path, start_iteration)
        with naming(self.path):
            self._file = self.path.open("a", encoding="utf-8")
        self._board: SummaryWriter | None = None
        self._hook, threading.excepthook = threading.excepthook, self._thread_ended
        with self._board_may_fail():
            self._board = SummaryWriter(str(output_dir), purge_step=start_iteration or None)

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Write one line to ``metrics.jsonl`` and the same scalars to TensorBoard.

        Raises:
            OSError: the write fails; names the file.
        """
        plain = {key: float(value) for key, value in metrics.items()}
        line = {key: value if math.isfinite(value) else None for key, value in plain.items()}
        with naming(self.path):
            self._file.write(json.dumps({"iteration": iteration, **line}) + "\n")
            self._file.flush()
        if self._board is not None:
            with self._board_may_fail():
                for key, value in plain.items():
                    self._board.add_scalar(key, value, iteration)

    def close(self) -> None:
        """Close the files."""
        if self._board is not None:
            with self._board_may_fail():
                self._board.close()
        threading.excepthook = self._hook
        with naming(self.path):
            self._file.close()

    @contextlib.contextmanager
    def _board_may_fail(self) -> Iterator[None]:
        """A full disk ends TensorBoard's file with a warning: ``metrics.jsonl`` has the same numbers."""
        try:
            yield
        except OSError as error:
            self._board = None
            logger.warning("cannot write TensorBoard's file in %s: %s", self.path.parent, error.strerror or error)

    def _thread_ended(self, about: threading.ExceptHookArgs) -> None:
        """``threading.excepthook``: TensorBoard's thread ends with the error that ``close`` raises again."""
        if not (isinstance(about.exc_value, OSError) and type(about.thread).__module__.startswith("tensorboard.")):
            self._hook(about)


def delete_metrics(folder: Path) -> list[str]:
    """Delete a run's ``metrics.jsonl`` and TensorBoard files; returns their names."""
    paths = [path for path in (folder / METRICS_FILE, *sorted(folder.glob("events.out.tfevents.*"))) if path.is_file()]
    for path in paths:
        path.unlink()
    return [path.name for path in paths]


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested metrics in one level: ``{"bbox": {"AP": 0.5}}`` -> ``{"bbox/AP": 0.5}``."""
    flat: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}/"))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _set_aside(path: Path) -> None:
    if not path.exists() or path.stat().st_size == 0:
        return
    number = 1
    while (old := path.with_name(f"metrics.{number}.jsonl")).exists():
        number += 1
    path.rename(old)
    logger.info("%s of an earlier run is now %s", path, old.name)


def _drop_from(path: Path, iteration: int) -> None:
    if not path.exists():
        return
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _iteration(line) < iteration]
    write_atomically(path, lambda file: file.write("".join(line + "\n" for line in lines).encode()))


def _iteration(line: str) -> float:
    """``iteration`` of a line; infinity for a half line, which SIGKILL may leave."""
    try:
        return json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError):
        return math.inf
