"""Lock file: one training at a time in an output folder."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from ..files import naming

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"


class FolderInUseError(RuntimeError):
    """Another process trains in the output folder."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a lock on ``<folder>/.lock``; the kernel releases it when this process ends, even by SIGKILL.

    ``lockf``, not ``flock``: forked loader workers would hold the latter for seconds after a SIGKILL. On a file system
    without locks, the block runs without one.

    Raises:
        FolderInUseError: another process holds it; names its pid and machine.
        OSError: the folder cannot be created or written.
    """
    if fcntl is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    with path.open("a+b", buffering=0) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise FolderInUseError(
                    f"another training is running in {folder} ({file.read().decode().strip() or 'process unknown'}): "
                    "wait for its end, or give this one another train.output_dir"
                ) from None
            logger.warning("%s cannot be locked (%s): start no second training in it", folder, error.strerror)
        else:
            with naming(path):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
