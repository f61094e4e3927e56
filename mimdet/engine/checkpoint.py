"""The checkpoints of a run: atomic saves, and a pointer to the newest."""

from __future__ import annotations

import errno
import logging
import re
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.read import CheckpointError, check_sums, read_checkpoint
from ..files import remove_leftovers, write_atomically

logger = logging.getLogger(__name__)

LAST = "last_checkpoint"
FINAL = "model_final.pth"
_PERIODIC = re.compile(r"model_(\d{7,})\.pth")
_Loaded = tuple[Path, dict[str, Any]]
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Checkpointer:
    """Saves and finds checkpoints in one folder, with Detectron2's file names.

    Files are ``model_0001874.pth`` (0-based number of the last finished iteration) and ``model_final.pth``;
    the text file ``last_checkpoint`` has the name of the newest.

    Args:
        directory: folder, created when missing.
        max_to_keep: number of periodic checkpoints that are kept, the newest; None for all.
            ``model_final.pth`` and the last checkpoint are always kept.
    """

    def __init__(self, directory: str | Path, max_to_keep: int | None = None):
        if max_to_keep is not None and max_to_keep < 1:
            raise ValueError(f"train.checkpointer.max_to_keep={max_to_keep} must be at least 1, or null for all")
        self.directory = Path(directory).expanduser()
        self.max_to_keep = max_to_keep

    def save(self, name: str, state: dict[str, Any]) -> Path:
        """Write ``state`` to ``<name>.pth``, set ``last_checkpoint``, delete checkpoints beyond ``max_to_keep``.

        After SIGKILL or an error at any moment, the previous last checkpoint is still loadable.

        Raises:
            CheckpointError: the write fails; the message names the file, the free space and the last good checkpoint.
        """
        path = self.directory / f"{name}.pth"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.directory)
            write_atomically(path, lambda file: torch.save(state, file))
            write_atomically(self.directory / LAST, lambda file: file.write(path.name.encode()))
        except OSError as error:
            advice = "Make room and resume" if error.errno in _NO_SPACE else "Remove the cause and resume"
            culprit = "" if error.filename in (None, str(path)) else f"{error.filename}: "
            raise CheckpointError(
                f"cannot save {path}: {culprit}{error.strerror}. "
                f"Last good checkpoint: {self.latest() or 'none'}. {advice}."
            ) from error
        self._prune(path)
        return path

    def latest(self) -> Path | None:
        """The checkpoint in ``last_checkpoint``; without that file the one of the highest number, or the final one.

        None when there are no checkpoints. Files are not read: see :meth:`newest`.
        """
        return self._named() or next(iter(self.all()), None)

    def all(self) -> list[Path]:
        """The folder's checkpoints: the periodic ones by number, newest first, then ``model_final.pth``."""
        periodic = [path for path in _entries(self.directory) if _PERIODIC.fullmatch(path.name)]
        periodic.sort(key=lambda path: int(_PERIODIC.fullmatch(path.name)[1]), reverse=True)
        final = self.directory / FINAL
        return [*periodic, final] if final.is_file() else periodic

    def newest(self) -> _Loaded | None:
        """The checkpoint to resume from and its content, tensors on the CPU; None when there are no checkpoints.

        Where ``last_checkpoint`` is missing or names no file, it is the checkpoint that loads and has the most
        iterations, with a warning.

        Raises:
            CheckpointError: the last checkpoint is damaged; the message names the newest good one. Or none loads.
        """
        named = self._named()
        if named is not None:
            try:
                return named, self.load(named)
            except CheckpointError as error:
                good, _ = self._newest_good(skip=named)
                advice = "No other is good"
                if good is not None:
                    advice = f"The newest good one is {good[0]}: delete {named.name} to resume from it"
                raise CheckpointError(f"{str(error).rstrip('. ')}. {advice}.") from error
        good, errors = self._newest_good()
        if good is not None:
            state = "names no checkpoint" if (self.directory / LAST).exists() else "is missing"
            logger.warning("%s %s: taking the newest checkpoint, %s", self.directory / LAST, state, good[0])
        elif errors:
            raise CheckpointError(f"no checkpoint in {self.directory} can be read: {' '.join(map(str, errors))}")
        return good

    def delete_all(self) -> list[str]:
        """Delete the folder's checkpoints; returns their names."""
        paths = [*self.all(), self.directory / LAST]
        for path in reversed(paths):  # the pointer first: it never names a deleted file
            path.unlink(missing_ok=True)
        return [path.name for path in paths[:-1]]

    def load(self, path: str | Path) -> dict[str, Any]:
        """The content of a checkpoint, tensors on the CPU. Only data is unpickled.

        Raises:
            CheckpointError: missing, damaged (checksums are compared) or not a checkpoint; the message names the file.
        """
        content = read_checkpoint(path)
        check_sums(path)
        return content

    def _named(self) -> Path | None:
        try:
            name = (self.directory / LAST).read_bytes().decode(errors="replace").strip("\0 \r\n\t")
            path = self.directory / Path(name).name
            return path if path.suffix == ".pth" and path.is_file() else None
        except (OSError, ValueError):  # ValueError: a null byte in the name
            return None

    def _newest_good(self, skip: Path | None = None) -> tuple[_Loaded | None, list[CheckpointError]]:
        """The checkpoint of most iterations that loads, and errors of others. Skips older ones after the first."""
        good: _Loaded | None = None
        errors = []
        for path in self.all():
            if path == skip or (good is not None and path.name != FINAL):
                continue
            try:
                content = self.load(path)
            except CheckpointError as error:
                errors.append(error)
                continue
            if good is None or _iteration(content) > _iteration(good[1]):
                good = path, content
        return good, errors

    def _prune(self, newest: Path) -> None:
        if self.max_to_keep is None:
            return
        # Sorted by time, not by number: the folder may have checkpoints of a longer earlier run.
        saved = [p for p in self.directory.iterdir() if _PERIODIC.fullmatch(p.name) and p != newest]
        saved.sort(key=lambda p: p.stat().st_mtime_ns)
        keep = self.max_to_keep - bool(_PERIODIC.fullmatch(newest.name))
        for old in saved[: max(0, len(saved) - keep)]:
            try:
                old.unlink()
            except OSError as error:
                logger.warning("cannot delete the old checkpoint %s: %s", old, error)


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _iteration(content: dict[str, Any]) -> int:
    """Last finished iteration; -1 for weights without the state of a training."""
    iteration = content.get("iteration")
    return iteration if isinstance(iteration, int) else -1
