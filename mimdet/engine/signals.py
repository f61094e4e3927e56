"""Stop a training in good order when it is asked to."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType


class TrainingInterrupted(SystemExit):
    """Training was stopped by a signal after saving a checkpoint.

    As a ``SystemExit`` it ends a program with the shell's status for that signal (130, 143), not a traceback.

    Attributes:
        checkpoint: path of the checkpoint to resume from.
    """

    def __init__(self, signum: int, checkpoint: Path):
        super().__init__(128 + signum)
        self.checkpoint = checkpoint


class GracefulStop:
    """Context in which the first SIGINT or SIGTERM is only noted; a second SIGINT raises KeyboardInterrupt.

    Outside the main thread, where Python allows no handlers, it does nothing.

    Attributes:
        signum: the signal received, None before.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, object] = {}
        self._pid = os.getpid()

    @property
    def requested(self) -> bool:
        """Whether to stop after the current step."""
        return self.signum is not None

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        # Ctrl-C reaches forked data workers too; they must live on until the step is finished.
        if os.getpid() != self._pid:
            return
        if self.requested:
            if signum == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.signum = signum
        # not by logging: the signal may have come in the middle of a write to the same stream
        name = signal.Signals(signum).name
        os.write(2, f"\n{name}: finishing this step, then saving; Ctrl-C aborts at once\n".encode())
