"""Stop signals: finish the step, save a checkpoint, then stop the training."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from ..data.loader import explained_dead_worker, stop_signals

Batch = TypeVar("Batch")


class TrainingInterrupted(SystemExit):
    """Training was stopped by a signal after saving a checkpoint.

    A ``SystemExit``: it ends a program with the shell's status for that signal (130, 143), without a traceback.

    Attributes:
        checkpoint: path of the checkpoint to resume from.
    """

    def __init__(self, signum: int, checkpoint: Path):
        super().__init__(128 + signum)
        self.checkpoint = checkpoint


class GracefulStop:
    """Context in which the first SIGINT, SIGTERM, SIGHUP or SIGUSR1 only sets ``requested``.

    A second SIGINT raises KeyboardInterrupt. Another second signal does nothing: Slurm and systemd send SIGTERM
    to torchrun and to its processes, and torchrun sends it to them again.

    A SIGHUP that `nohup` has set to be ignored stays so. Outside the main thread, where Python allows no handlers, the
    context does nothing.

    Attributes:
        signum: the signal received, None before.
        failure: another reason to stop, such as a dead loader worker; None before.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.failure: str | None = None
        self._previous: dict[int, Any] = {}
        self._pid = os.getpid()
        self._waiting = self._child_gone = False
        self._check_workers: Callable[[int, FrameType | None], Any] | None = None  # DataLoader's SIGCHLD handler

    @property
    def requested(self) -> bool:
        """Whether to stop after the current step."""
        return self.signum is not None or self.failure is not None

    def __enter__(self) -> GracefulStop:
        if _in_main_thread():
            for signum in stop_signals():
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()
        if self._check_workers is not None:
            signal.signal(signal.SIGCHLD, self._check_workers)

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """The batches of ``loader``; a dead worker raises LoaderWorkerError here, where a batch is awaited.

        DataLoader's SIGCHLD handler would raise anywhere, also within an optimizer step or a checkpoint. Here it is
        deferred to the next batch.
        """
        batches = None
        while True:
            self._waiting = True
            try:
                with explained_dead_worker():
                    if batches is None:
                        batches = iter(loader)
                    if self._child_gone:
                        self._child_gone = False
                        self._check_workers(signal.SIGCHLD, None)
                    batch = next(batches, None)
            finally:
                self._waiting = False
                self._take_over_sigchld()
            if batch is None:
                return
            yield batch

    def _take_over_sigchld(self) -> None:
        if not (self._previous and hasattr(signal, "SIGCHLD")):
            return
        handler = signal.getsignal(signal.SIGCHLD)
        if callable(handler) and handler != self._child_ended:
            self._check_workers = handler
            signal.signal(signal.SIGCHLD, self._child_ended)

    def _child_ended(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return
        if self._waiting:
            self._check_workers(signum, frame)
        else:
            self._child_gone = True

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        # A forked process inherits this handler.
        if os.getpid() != self._pid:
            return
        if self.signum is not None:
            if signum == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.signum = signum
        # os.write, not logging: the signal may have interrupted a write to the same stream.
        name = signal.Signals(signum).name
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, f"\n{name}: finishing this step, then saving; Ctrl-C aborts at once\n".encode())


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
