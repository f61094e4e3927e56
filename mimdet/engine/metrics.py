"""Figures of a run for programs: ``metrics.jsonl`` and TensorBoard."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from ..files import naming, write_atomically

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends figures to ``<output_dir>/metrics.jsonl`` and to TensorBoard event files beside it.

    Each line is a JSON object with ``iteration`` (0-based, the one just finished); NaN and infinity become
    null. Used on rank 0 only.

    Args:
        output_dir: existing folder.
        start_iteration: first iteration to come. Lines from it on, which a resumed run will write anew, are
            dropped; at 0 the file of an earlier run is kept under the name ``metrics.<n>.jsonl``.
    """

    def __init__(self, output_dir: str | Path, start_iteration: int = 0):
        self.path = Path(output_dir) / METRICS_FILE
        if start_iteration == 0:
            _set_aside(self.path)
        else:
            _drop_from(self.path, start_iteration)
        with naming(self.path):
            self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(output_dir), purge_step=start_iteration or None)

    def write(self, iteration: int, figures: Mapping[str, float]) -> None:
        """Write one line and the same scalars.

        Raises:
            OSError: the disk refuses; names the file.
        """
        plain = {key: float(value) for key, value in figures.items()}
        line = {key: value if math.isfinite(value) else None for key, value in plain.items()}
        with naming(self.path):
            self._file.write(json.dumps({"iteration": iteration, **line}) + "\n")
            self._file.flush()
        for key, value in plain.items():
            self._board.add_scalar(key, value, iteration)

    def close(self) -> None:
        """Finish the files."""
        with naming(self.path):
            self._file.close()
        self._board.close()


def delete_metrics(folder: Path) -> list[str]:
    """Delete a run's ``metrics.jsonl`` and TensorBoard files; returns their names."""
    paths = [path for path in (folder / METRICS_FILE, *sorted(folder.glob("events.out.tfevents.*"))) if path.is_file()]
    for path in paths:
        path.unlink()
    return [path.name for path in paths]


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested figures in one level: ``{"bbox": {"AP": 0.5}}`` -> ``{"bbox/AP": 0.5}``."""
    flat: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}/"))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _set_aside(path: Path) -> None:
    if not path.exists() or path.stat().st_size == 0:
        return
    number = 1
    while (old := path.with_name(f"metrics.{number}.jsonl")).exists():
        number += 1
    path.rename(old)
    logger.info("%s of an earlier run is now %s", path, old.name)


def _drop_from(path: Path, iteration: int) -> None:
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _iteration(line) < iteration]
    write_atomically(path, lambda file: file.write("".join(line + "\n" for line in kept).encode()))


def _iteration(line: str) -> float:
    """Infinity for the half line that a kill may leave behind."""
    try:
        return json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError):
        return math.inf
