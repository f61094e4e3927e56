"""Polygons that are hard to rasterize, windows on them, and pycocotools' answer."""

import numpy as np
import torch

from mimdet.testing.plain import rasterize_by_pycocotools

__all__ = ["KINDS", "SIDES", "packed", "random_case", "rasterize_by_pycocotools", "windows"]


def packed(instances):
    """points, polygon_starts and instance_starts of lists of (K, 2) arrays."""
    polygons = [polygon for instance in instances for polygon in instance]
    starts = (np.cumsum([0, *map(len, parts)]) for parts in (polygons, instances))
    points = torch.from_numpy(np.concatenate([np.zeros((0, 2)), *polygons]))
    return points, *(torch.from_numpy(s.astype(np.int32)) for s in starts)


def _plain(rng, count):
    return rng.uniform(-15, 45, (count, 2))


def _axis_parallel(rng, count):
    points = np.repeat(rng.uniform(-15, 45, (count, 2)).round(1), 2, axis=0)
    points[1::2, 0] = np.roll(points[::2, 0], -1)
    return points


def _collinear(rng, count):
    return np.outer(np.linspace(-1, 2, count), rng.uniform(5, 25, 2)) + rng.choice([0.0, 0.1, 3.3])


def _repeated(rng, count):
    points = rng.uniform(-15, 45, (count, 2)).round()
    points[rng.integers(count, size=3)] = points[0]
    return np.repeat(points, rng.integers(1, 4, len(points)), axis=0)


# name -> (generator, count) -> (count or more, 2) points; most cross themselves.
KINDS = {
    "plain": _plain,
    "tenths": lambda rng, count: _plain(rng, count).round(1),
    "fifths": lambda rng, count: (_plain(rng, count) * 5).round() / 5,
    "fifths-and-a-little": lambda rng, count: (
        (_plain(rng, count) * 5).round() / 5 + rng.choice([1e-12, -1e-12, 1e-7, -1e-7], (count, 2))
    ),
    "halves-of-fifths": lambda rng, count: ((_plain(rng, count) * 5).round() + 0.5) / 5,
    "negative": lambda rng, count: _plain(rng, count) - 25,
    "axis-parallel": _axis_parallel,
    "collinear": _collinear,
    "repeated": _repeated,
    "tiny": lambda rng, count: rng.uniform(3, 3.2, (count, 2)),
    "large": lambda rng, count: rng.uniform(-2000, 3000, (count, 2)),
}
SIDES = (0.01, 0.3, 5.0, 14.0, 28.0, 56.0, 100.0, 2000.0)


def windows(rng, count):
    """(count, 4) float64: of all sizes, some of a negative or no width."""
    sides = rng.choice([*SIDES, 0.0, -3.0], (count, 2))
    corners = rng.uniform(-10, 35, (count, 2))
    corners[::3] = corners[::3].round()
    corners[1::3] = (corners[1::3] * 5).round() / 5
    corners[2::3] = rng.uniform(2.9, 3.1, corners[2::3].shape)  # where the tiny ones are
    return np.concatenate([corners, corners + sides], axis=1)


def random_case(seed, kind, boxes=24, longest=30):
    """(instances, index, windows): instances of zero to three polygons of one kind."""
    rng = np.random.default_rng(seed)
    instances = [[KINDS[kind](rng, rng.integers(3, longest)) for _ in range(count)] for count in (1, 0, 2, 1, 3, 1)]
    return instances, rng.integers(0, len(instances), boxes), windows(rng, boxes)
