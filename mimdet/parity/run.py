"""Runs cases: those of Triton's interpreter in a process of their own, the others here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .cases import ParityCase

PASSED = "passed"
FAILED = "failed"


@dataclass(frozen=True)
class Result:
    """What a case measured.

    Attributes:
        case: which one.
        status: "passed" if every tensor is within its budget, else "failed".
        tensor: the one whose error is the largest part of its budget.
        error, budget, reference_error, ulp: of that tensor, see ``mimdet.testing.Measurement``; None if the case
            raised an error.
        seconds: that the case took.
        message: why it failed; empty if it passed.
    """

    case: ParityCase
    status: str
    tensor: str = ""
    error: float | None = None
    budget: float | None = None
    reference_error: float | None = None
    ulp: float | None = None
    seconds: float = 0.0
    message: str = ""

    @property
    def ratio(self) -> float:
        """error / budget; infinite without a budget or a number."""
        if self.error is None:
            return float("inf")
        return self.error / self.budget if self.budget else float("inf") if self.error else 0.0

    def row(self) -> dict:
        """As JSON holds it."""
        values = asdict(self)
        return {"id": self.case.id, **values.pop("case"), **values}


def run_case(case: ParityCase, original: Path | None = None) -> Result:
    """Measure one case in this process. No error leaves it: it is the case's message."""
    start = time.perf_counter()
    try:
        measured = case.measure(original)
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        return Result(case, FAILED, seconds=_since(start), message=f"{kind}{first}")
    worst = max(measured, key=lambda m: (m.ratio, m.error))
    numbers = (worst.name, worst.error, worst.budget, worst.reference_error, worst.ulp)
    try:
        worst.check()
    except AssertionError as error:
        return Result(case, FAILED, *numbers, seconds=_since(start), message=str(error))
    return Result(case, PASSED, *numbers, seconds=_since(start))


def _since(start: float) -> float:
    return round(time.perf_counter() - start, 4)


class Interpreter:
    """A process in which Triton's kernels run on CPU tensors: TRITON_INTERPRET must be set before Triton is imported.

    It starts at the first case and takes one at a time.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def run(self, case: ParityCase) -> Result:
        """Measure one case there; if the process dies, the case failed and the next one starts another."""
        with self._lock:
            try:
                if self._process is None:
                    self._process = self._start()
            except OSError as error:
                return Result(case, FAILED, message=f"the interpreter's process cannot start: {error}")
            process = self._process
            try:
                process.stdin.write(json.dumps(asdict(case)) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except OSError:
                line = ""
            if not line:
                self._process = None
                process.kill()
                return Result(case, FAILED, message=f"the interpreter's process ended with status {process.wait()}")
        return Result(case, **json.loads(line))

    @staticmethod
    def _start() -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "mimdet.parity.interpreted"],
            # Its tensors are too small for several threads, which would wait for this process's.
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        """End the process."""
        with self._lock:
            if self._process is not None:
                self._process.stdin.close()
                self._process.wait()
                self._process = None


def run(
    cases: Sequence[ParityCase], original: Path | None = None, advance: Callable[[], object] = lambda: None
) -> list[Result]:
    """Measure all cases, in the order of ``cases``; the interpreter works beside this process.

    Args:
        cases: from ``cases.select``.
        original: checkout of the original, for the cases that need it.
        advance: called after each case.
    """
    results: dict[ParityCase, Result] = {}
    interpreter, stopped = Interpreter(), threading.Event()

    def interpret() -> None:
        for case in cases:
            if case.interpreted and not stopped.is_set():
                results[case] = interpreter.run(case)
                advance()

    beside = threading.Thread(target=interpret, daemon=True)
    beside.start()
    try:
        for case in cases:
            if not case.interpreted:
                results[case] = run_case(case, original)
                advance()
        beside.join()
    finally:
        # After Ctrl-C here, the case that is on its way is the interpreter's last.
        stopped.set()
        beside.join()
        interpreter.close()
    return [results[case] for case in cases]
