"""Recordings of the original MIMDet on Detectron2, in float32 on a CPU, which are in the package."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from . import weights

FOLDER = Path(__file__).parent / "recordings"
# SHA-256 of every file.
SUMS = {
    "benchmarking_small.npz": "cc1eed3e37c41b8a1df6a0b7796271029ed9c03241dc2a78a088d3e38ce10d5a",
    "original_small.json": "e54ac72279ad9660f4a0a79139f663687619d5026602b0592c1cd07738276236",
    "original_small.npz": "d7fd64a0fdeb8daf5aece9cc4b30090efb4d3d81b9894e2c01fe37e2ded82ced",
}


class RecordingError(RuntimeError):
    """A recording is missing or altered, or its inputs cannot be drawn again."""


class Recording:
    """Arrays of the original by key, and what each is a part of.

    ::

        recording = Recording("original_small")
        for key in recording.keys("r0.5_"):
            recording.error(key, my_features[key])  # relative L2 distance

    "original_small" has features, losses, gradients and detections of the model of ``mimdet.testing.small``,
    "benchmarking_small" features and gradients of the backbone of ``mimdet.testing.small_benchmarking``.

    Attributes:
        meta: key -> shape of the full array, ``index`` of the stored part, ``f32_vs_f64``: the original's own largest
            and relative L2 error in float32.

    Raises:
        RecordingError: a file is missing or altered; NumPy draws other random numbers than the recordings' inputs.
    """

    def __init__(self, name: str, folder: Path = FOLDER):
        self.data = np.load(io.BytesIO(read(f"{name}.npz", folder)))
        has_meta = f"{name}.json" in SUMS or (folder != FOLDER and (folder / f"{name}.json").exists())
        self.meta = json.loads(read(f"{name}.json", folder)) if has_meta else {}

    def keys(self, prefix: str = "") -> Iterator[str]:
        """Keys that begin with ``prefix``."""
        stored = [k for k, v in self.meta.items() if isinstance(v, dict) and "npz_key" in v] or list(self.data)
        return (key for key in stored if key.startswith(prefix))

    def expected(self, key: str) -> np.ndarray:
        """The stored part."""
        return self.data[self.meta[key]["npz_key"] if self.meta else key]

    def part(self, key: str, array: np.ndarray) -> np.ndarray:
        """That part of a full array.

        Raises:
            AssertionError: the array has another shape.
        """
        entry, array = self.meta[key], np.asarray(array)
        assert list(array.shape) == entry["shape"], f"{key}: shape {array.shape}, expected {tuple(entry['shape'])}"
        return take(array, entry["index"])

    def error(self, key: str, array: np.ndarray) -> float:
        """Relative L2 distance of a full array from the recorded part."""
        actual, expected = self.part(key, array).astype(np.float64), self.expected(key).astype(np.float64)
        assert actual.shape == expected.shape, f"{key}: {actual.shape}, expected {expected.shape}"
        return float(np.linalg.norm(actual - expected) / (np.linalg.norm(expected) + 1e-300))

    def floor(self, key: str) -> float | None:
        """Relative L2 error of the original's own float32; None where it was not recorded."""
        floor = self.meta.get(key, {}).get("f32_vs_f64")
        return floor[1] if floor else None


def read(name: str, folder: Path = FOLDER) -> bytes:
    """Content of a recording's file, which must be the one that was recorded."""
    try:
        content = (folder / name).read_bytes()
    except OSError as error:
        raise RecordingError(f"the recording {folder / name} is missing: reinstall mimdet") from error
    if folder == FOLDER and hashlib.sha256(content).hexdigest() != SUMS[name]:
        raise RecordingError(f"the recording {folder / name} is altered: its SHA-256 is not {SUMS[name][:12]}...; "
                             "reinstall mimdet")  # fmt: skip
    try:
        weights.self_check()
    except AssertionError as error:
        raise RecordingError("this NumPy draws other random numbers than the recordings hold: take another") from error
    return content


def check() -> None:
    """Raise RecordingError unless all recordings of the package are there, unaltered."""
    for name in SUMS:
        read(name)


def take(array: np.ndarray, index: str) -> np.ndarray:
    """Apply a recorded index such as '[:, ::2]' or 'flatten()[::7]'."""
    if not index:
        return array
    if index.startswith("flatten()"):
        array, index = array.reshape(-1), index[len("flatten()") :]
    if not re.fullmatch(r"\[[0-9:, ]+\]", index):
        raise ValueError("not a plain index: " + index)
    parts = []
    for part in index[1:-1].split(","):
        numbers = [int(n) if n.strip() else None for n in part.split(":")]
        parts.append(slice(*numbers) if len(numbers) > 1 else numbers[0])
    return array[tuple(parts)]
