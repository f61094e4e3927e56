"""Files and streams that fail: no half-written file after a crash or on a full disk, no error for a lost reader."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then put it in place in one step.

    Whatever happens, ``path`` holds either its old content or all of the new; on an exception the temporary
    file is removed and the exception goes on. The folder is made when missing.

    Raises:
        OSError: the disk refuses; names ``path`` and the free space, whatever ``write`` made of the failure.
    """
    path = Path(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        raw = _File(handle, "wb")
        try:
            with io.BufferedWriter(raw) as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~_umask())  # mkstemp makes files that only their owner may read
            os.replace(name, path)
        except BaseException as error:
            Path(name).unlink(missing_ok=True)
            if raw.failure not in (None, error) and isinstance(error, Exception):
                raise raw.failure from error
            raise
        _sync_folder(path.parent)


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Let every OSError of the block name ``path``, as a failed write does not, and the space left on its disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        reason = f"{error.strerror}, {free_space(Path(path).parent)} free"
        raise OSError(error.errno, reason, str(path)) from error


def free_space(folder: Path) -> str:
    """Free space on the disk of ``folder`` for a message, such as ``1.5 GB``."""
    try:
        return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB"
    except OSError:
        return "unknown space"


class _File(io.FileIO):
    """Keeps its failed write: ``torch.save`` turns it into a RuntimeError about its own archive."""

    failure: OSError | None = None

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise


def write_bytes(path: str | Path, content: bytes) -> None:
    """``content`` as a file; see :func:`write_atomically`."""
    write_atomically(path, lambda file: file.write(content))


def write_json(path: str | Path, value: Any, indent: int | None = None) -> None:
    """``value`` as a JSON file; see :func:`write_atomically`."""
    write_bytes(path, json.dumps(value, indent=indent).encode())


def drop_dead_stream(stream: Any) -> None:
    """Send ``stream`` nowhere if its terminal or the reader of its pipe is gone; to be called on its failure."""
    error = sys.exc_info()[1]
    if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.EIO, errno.EBADF):
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of writes that a kill cut short."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Let the rename survive a power cut, where the system can sync folders."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
