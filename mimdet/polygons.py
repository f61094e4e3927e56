"""The polygons of many instances in three arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True, eq=False)
class PackedPolygons:
    """N instances' polygons. ``len`` is N; an index gives the list of an instance's polygons, flat float64 arrays
    [x0, y0, x1, y1, ...].

    They are arrays rather than tensors: a tensor from a worker of DataLoader keeps a file open until it is freed.

    Attributes:
        points: (P, 2) float64, x and y.
        polygon_starts: (Q + 1,) int32, where each polygon begins in ``points``, and the end of the last.
        instance_starts: (N + 1,) int32, where each instance begins among the polygons, and the end of the last.
    """

    points: np.ndarray
    polygon_starts: np.ndarray
    instance_starts: np.ndarray

    @classmethod
    def pack(cls, instances: Sequence[Sequence[np.ndarray]], name: str = "masks") -> PackedPolygons:
        """From N lists of polygons [x0, y0, x1, y1, ...]; an instance may have none.

        Raises:
            ValueError: a polygon of fewer than three points, of an odd count of numbers, or with a number that is not
                finite. The message names it as a member of ``name``.
        """
        polygons = [np.asarray(polygon, dtype=np.float64).reshape(-1) for polygons in instances for polygon in polygons]
        sizes = np.array([polygon.size for polygon in polygons], dtype=np.int64)
        numbers = np.concatenate([np.zeros(0), *polygons])
        instance_starts = np.cumsum([0, *map(len, instances)], dtype=np.int32)
        malformed = (sizes < 6) | (sizes % 2 == 1)
        if not malformed.any() and np.isfinite(numbers).all():
            return cls(numbers.reshape(-1, 2), np.cumsum([0, *sizes // 2], dtype=np.int32), instance_starts)
        number = next(q for q, polygon in enumerate(polygons) if malformed[q] or not np.isfinite(polygon).all())
        instance = int(np.searchsorted(instance_starts, number, side="right")) - 1
        if malformed[number]:
            problem = f"has {sizes[number]} numbers: give x and y of at least 3 points"
        else:
            problem = "holds NaN or infinity"
        raise ValueError(f"{name}[{instance}][{number - instance_starts[instance]}] {problem}")

    @classmethod
    def join(cls, parts: Sequence[PackedPolygons]) -> PackedPolygons:
        """The instances of all parts, which must be one or more, in their order."""
        return cls(
            np.concatenate([part.points for part in parts]),
            _join_starts([part.polygon_starts for part in parts]),
            _join_starts([part.instance_starts for part in parts]),
        )

    def padded(self, count: int) -> PackedPolygons:
        """With instances without polygons at the end, so that there are ``count``."""
        more = np.full(count - len(self), self.instance_starts[-1], dtype=np.int32)
        return PackedPolygons(self.points, self.polygon_starts, np.concatenate([self.instance_starts, more]))

    def __len__(self) -> int:
        return len(self.instance_starts) - 1

    def __getitem__(self, index: int) -> list[np.ndarray]:
        index = range(len(self))[index]
        first, last = self.instance_starts[index : index + 2]
        return [self.points[i:j].reshape(-1) for i, j in pairwise(self.polygon_starts[first : last + 1])]


def _join_starts(parts: Sequence[np.ndarray]) -> np.ndarray:
    before = np.cumsum([0, *(part[-1] for part in parts)], dtype=np.int32)
    return np.concatenate([*(part[:-1] + start for part, start in zip(parts, before, strict=False)), before[-1:]])
