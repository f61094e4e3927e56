"""``mimdet bench gpu``: all measurements on a GPU, in independent parts.

Each part is a process, so a crash or lack of memory in one does not stop the others, and has a budget of time.
``<part>.error.txt`` exists from the part's start until it succeeds: a part with a result and without that file is done,
however the run ended.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files import write_bytes

ROOT = Path(__file__).resolve().parent.parent
MINUTES = 8.8  # of a run: under nine with the start of Python
_GRACE = 5.0  # seconds that an interrupted part has to end by itself
_LARGEST = 400_000  # bytes of a result: they are committed
_TAIL = 60  # last lines of a failed part's output in its error file


@dataclass(frozen=True)
class Part:
    """One child process and its result.

    Attributes:
        name: of its files.
        seconds: most that it may take of a run of ``MINUTES``; in a longer run more.
        arguments: of ``python -m``.
        suffix: of its result. Of ".txt", the result is what it prints; else it gets ``--output <name><suffix>``.
    """

    name: str
    seconds: float
    arguments: tuple[str, ...]
    suffix: str = ".json"

    @property
    def file(self) -> str:
        """Name of the result."""
        return self.name + self.suffix

    @property
    def text(self) -> bool:
        """Whether the result is what it prints."""
        return self.suffix == ".txt"

    def error(self, folder: Path) -> Path:
        """The file that is there until the part has succeeded."""
        return folder / f"{self.name}.error.txt"

    def done(self, folder: Path) -> bool:
        """Whether its result is whole."""
        return (folder / self.file).is_file() and not self.error(folder).exists()


def _bench(name: str, seconds: float, *arguments: str, suffix: str = ".json") -> Part:
    return Part(name, seconds, ("mimdet.bench", *arguments, "--device", "cuda"), suffix)


def _parity() -> Part:
    """The kernels' tests on what only a GPU can run."""
    ops = ("add_layer_norm", "attention_varlen", "bias_gelu", "gather_add_pos", "match_boxes", "nms_slots",
           "rasterize_polygons", "roi_align_levels", "sample_tokens",
           "scatter_fill")  # fmt: skip
    files = [str(path) for name in ("failure_modes", *ops) for path in sorted(ROOT.glob(f"tests/**/test_*{name}.py"))]
    workers = ("-n", "4") if importlib.util.find_spec("xdist") else ()
    options = ("-vv", "--no-header", "--tb=short", "--disable-warnings", "-p", "no:cacheprovider", *workers)
    return Part("parity", 110, ("pytest", *options, "-k", "triton or cuda", *files), ".txt")


def _impl(*names: str) -> tuple[str, ...]:
    return tuple(argument for name in names for argument in ("--impl", name))


# torch.compile takes a minute for every row of a table: only the default row has it.
_EAGER = _impl("ours", "original", "original-no-checkpoint", "original-sdpa")
_STEP = (*_impl("ours", "original", "original-sdpa", "sdpa-compile"), "--part", "detector", "--mode", "train")
# Most important first: a run on a slow machine may not reach the last.
PARTS = (
    Part("environment", 90, ("mimdet", "info"), ".txt"),  # builds what is in csrc
    _parity(),
    _bench("table1", 100, "table1", *_EAGER),
    _bench("table7", 80, "table7", *_EAGER),
    _bench("roofline", 60, "roofline", suffix=".csv"),  # a thousand rows: three times as large in JSON
    *(_bench(f"detector_batch{n}", 120, "backbone", *_STEP, "--batch", str(n)) for n in (1, 8)),
    *(
        _bench(f"ops_{dtype}_batch{n}", 160, "ops", "--dtype", dtype, "--batch", str(n))
        for dtype in ("bf16", "fp32")
        for n in (1, 8)
    ),
    _bench("backbone", 120, "backbone"),
)


def default_folder() -> Path:
    """``bench/results/<name of the GPU>``."""
    import torch

    return Path("bench/results") / re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def run_gpu(parts: Sequence[Part], folder: Path, minutes: float = MINUTES, force: bool = False) -> bool:
    """Run the parts whose results are not there yet, in order; True if all are there at the end.

    A part starts only if its whole budget is left, so that the run ends in time; later, smaller parts may still start.
    Ctrl-C or SIGTERM ends the current part and the run; results stay.
    """
    from . import views  # imports torch

    deadline = time.monotonic() + 60 * minutes
    out, scale = views.console(), minutes / MINUTES
    if force:
        for part in parts:
            write_bytes(part.error(folder), b"to be measured again\n")
    todo = [part for part in parts if not part.done(folder)]
    out.print(f"results in {folder}: {len(parts) - len(todo)} of {len(parts)} parts are there already")
    failed, left = [], []
    with views.progress("parts", len(todo)) as advance, _terminated_like_interrupted():
        for part in todo:
            budget = part.seconds * scale
            if budget + _GRACE > deadline - time.monotonic():
                left.append(part.name)
                continue
            start = time.monotonic()
            error = run_part(part, folder, budget)
            state = error.splitlines()[0] if error else "done"
            out.print(f"{part.name}: {state}, {time.monotonic() - start:.0f} s", markup=False)
            failed += [part.name] if error else []
            advance()
    if failed:
        out.print(f"failed: {', '.join(failed)}; see <part>.error.txt. The next run tries again.", markup=False)
    if left:
        out.print(f"no time left for: {', '.join(left)}. The next run goes on, or give more --minutes.")
    return not failed and not left


def run_part(part: Part, folder: Path, seconds: float) -> str | None:
    """Run one part; None, or the error, which is in ``<part>.error.txt`` too."""
    marker, result = part.error(folder), folder / part.file
    write_bytes(marker, b"did not end: the machine or the run was stopped\n")
    command = [sys.executable, "-m", *part.arguments, *(() if part.text else ("--output", str(result)))]
    # Full tracebacks, and lines as wide as the tables.
    variables = {**os.environ, "MIMDET_DEBUG": "1", "COLUMNS": "160"}
    with tempfile.TemporaryFile() as printed:
        error = "interrupted"
        try:
            error = _run(command, variables, printed, seconds)
        finally:
            printed.seek(0)
            text = _without_folders(printed.read().decode(errors="replace"))
            if part.text:
                write_bytes(result, text.encode()[-_LARGEST:])
            error = error or _problem(result)
            if error is None:
                marker.unlink()
            else:
                tail = "" if part.text else "\n".join(["", *text.splitlines()[-_TAIL:]])
                write_bytes(marker, f"{error}\n{tail}".rstrip().encode() + b"\n")
    return error


def _run(command: Sequence[str], variables: dict[str, str], printed, seconds: float) -> str | None:
    # start_new_session: Ctrl-C in the terminal reaches only this process, which forwards it.
    process = subprocess.Popen(
        command, env=variables, stdin=subprocess.DEVNULL, stdout=printed, stderr=printed, start_new_session=True
    )
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        _interrupt(process)
        return f"stopped after its budget of {seconds:.0f} s; its finished rows are in the file"
    except KeyboardInterrupt:
        _interrupt(process)
        raise
    finally:
        # killpg ends its children too: compilers, test workers.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return f"exit status {status}" if status else None


def _interrupt(process: subprocess.Popen) -> None:
    """SIGINT, with time to write finished rows."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE)


def _problem(result: Path) -> str | None:
    if not result.is_file():
        return f"wrote no {result.name}"
    size = result.stat().st_size
    return f"{result.name} has {size} bytes, more than the {_LARGEST} of a file to commit" if size > _LARGEST else None


def _without_folders(text: str) -> str:
    """Without the user's folders."""
    for folder, name in ((ROOT, "."), (Path.home(), "~")):
        if folder != Path(folder.anchor):
            text = text.replace(str(folder), name)
    return text


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM, which ``timeout`` and schedulers send, raises KeyboardInterrupt: no part outlives the run."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
