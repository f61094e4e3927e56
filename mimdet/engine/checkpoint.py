"""The checkpoints of a run: saved whole or not at all, the newest always known."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.read import CheckpointError, read_checkpoint
from ..files import remove_leftovers, write_atomically

logger = logging.getLogger(__name__)

LAST = "last_checkpoint"
_PERIODIC = re.compile(r"model_\d{7,}\.pth")


class Checkpointer:
    """Saves and finds checkpoints in one folder, by Detectron2's file names.

    Files are ``model_0001874.pth`` (0-based number of the last finished iteration) and ``model_final.pth``;
    the text file ``last_checkpoint`` holds the newest one's name.

    Args:
        directory: folder, made when missing.
        max_to_keep: how many periodic checkpoints stay, newest first; None keeps all.
            ``model_final.pth`` and the last checkpoint always stay.
    """

    def __init__(self, directory: str | Path, max_to_keep: int | None = None):
        if max_to_keep is not None and max_to_keep < 1:
            raise ValueError(f"train.checkpointer.max_to_keep={max_to_keep} must be at least 1, or null for all")
        self.directory = Path(directory).expanduser()
        self.max_to_keep = max_to_keep

    def save(self, name: str, state: dict[str, Any]) -> Path:
        """Write ``state`` to ``<name>.pth``, point ``last_checkpoint`` at it, delete those beyond ``max_to_keep``.

        A kill or a failure at any moment leaves the previous last checkpoint loadable.

        Raises:
            CheckpointError: the disk refuses; the message names the file, the free space and the last good
                checkpoint.
        """
        path = self.directory / f"{name}.pth"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.directory)
            write_atomically(path, lambda file: torch.save(state, file))
            write_atomically(self.directory / LAST, lambda file: file.write(path.name.encode()))
        except (OSError, RuntimeError) as error:
            # torch's zip writer turns a failed write into a RuntimeError
            raise CheckpointError(
                f"cannot save {path}: {error}. Free space there: {_free_space(self.directory)}. "
                f"Last good checkpoint: {self.latest() or 'none'}. Make room and resume."
            ) from error
        self._prune(path)
        return path

    def latest(self) -> Path | None:
        """The newest checkpoint, or None when none was saved."""
        try:
            name = (self.directory / LAST).read_text(encoding="utf-8").strip()
        except (FileNotFoundError, NotADirectoryError):
            return None
        path = self.directory / Path(name).name
        return path if name and path.is_file() else None

    def load(self, path: str | Path) -> dict[str, Any]:
        """The content of a checkpoint, tensors on the CPU. Only data is unpickled.

        Raises:
            CheckpointError: missing, damaged or not a checkpoint; the message names the file.
        """
        return read_checkpoint(path)

    def _prune(self, newest: Path) -> None:
        if self.max_to_keep is None:
            return
        # By time, not by number: the folder may hold a longer earlier run.
        saved = [p for p in self.directory.iterdir() if _PERIODIC.fullmatch(p.name) and p != newest]
        saved.sort(key=lambda p: p.stat().st_mtime_ns)
        keep = self.max_to_keep - bool(_PERIODIC.fullmatch(newest.name))
        for old in saved[: max(0, len(saved) - keep)]:
            try:
                old.unlink()
            except OSError as error:
                logger.warning("cannot delete the old checkpoint %s: %s", old, error)


def _free_space(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB"
    except OSError:
        return "unknown"
