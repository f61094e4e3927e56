"""Write files so that a crash or a full disk never leaves half of one in place."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then put it in place in one step.

    Whatever happens, ``path`` holds either its old content or all of the new; on an exception the temporary
    file is removed and the exception goes on. The folder is made when missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())  # mkstemp makes files that only their owner may read
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_bytes(path: str | Path, content: bytes) -> None:
    """``content`` as a file; see :func:`write_atomically`."""
    write_atomically(path, lambda file: file.write(content))


def write_json(path: str | Path, value: Any, indent: int | None = None) -> None:
    """``value`` as a JSON file; see :func:`write_atomically`."""
    write_bytes(path, json.dumps(value, indent=indent).encode())


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
