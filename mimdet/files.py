"""Atomic writes of files, errors of a full disk that name the file, and closed output streams."""

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
    """Call ``write`` with a temporary file beside ``path``, then rename it to ``path``.

    ``path`` always has either its old content or all of the new. On an exception the temporary file is removed and the
    exception is raised. A missing folder is created.

    Raises:
        OSError: the write fails; names ``path`` and the free space, even where ``write`` raised another type.
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
            os.chmod(name, 0o666 & ~_umask())  # mkstemp creates files that only their owner may read
            os.replace(name, path)
        except BaseException as error:
            Path(name).unlink(missing_ok=True)
            if raw.failure not in (None, error) and isinstance(error, Exception):
                raise raw.failure from error
            raise
        _sync_folder(path.parent)


def check_replaceable(path: str | Path, command: str, mark: str | None = None) -> None:
    """Refuse to replace a file that ``command`` did not write, such as an image, weights or annotations.

    Args:
        command: such as "mimdet show".
        mark: in the first 1000 bytes of the command's files; None: its name.

    Raises:
        FileExistsError: names the file.
    """
    path = Path(path).resolve()
    if not path.exists():
        return
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(1000)
        if not head or (mark or command).encode() in head:
            return
    raise FileExistsError(f"{path} exists, and {command} did not write it: choose another name, or delete it")


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Add ``path`` and the free space of its disk to every OSError of the block; a failed write has neither."""
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
    """Remembers the OSError of a failed write: ``torch.save`` raises a RuntimeError about its archive instead."""

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
    """Redirect ``stream`` to the null device if its terminal or reader is gone; call it in an except block."""
    error = sys.exc_info()[1]
    if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.EIO, errno.EBADF):
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of writes that SIGKILL interrupted."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """fsync a folder, so that a rename in it survives a power cut; only POSIX can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
