"""PackedPolygons: what goes in comes out, alone and joined."""

import pickle

import numpy as np
import pytest

from mimdet.polygons import PackedPolygons

INSTANCES = [[[0.0, 1, 2, 3, 4, 5]], [], [[6.0, 7, 8, 9, 10, 11, 12, 13], [14.0, 15, 16, 17, 18, 19]]]


def unpacked(packed):
    return [[polygon.tolist() for polygon in polygons] for polygons in packed]


@pytest.mark.parametrize("instances", [INSTANCES, INSTANCES[:1], [[]], []], ids=["three", "one", "empty", "none"])
def test_round_trip(instances):
    packed = PackedPolygons.pack([[np.array(polygon) for polygon in polygons] for polygons in instances])
    assert len(packed) == len(instances)
    assert unpacked(packed) == unpacked(pickle.loads(pickle.dumps(packed))) == instances
    dtypes = packed.points.dtype, packed.polygon_starts.dtype, packed.instance_starts.dtype
    assert dtypes == (np.float64, np.int32, np.int32)
    assert packed.points.shape == (packed.polygon_starts[-1], 2)


def test_indices():
    packed = PackedPolygons.pack(INSTANCES)
    assert packed[-1][1].tolist() == INSTANCES[2][1]
    for index in (3, -4):
        with pytest.raises(IndexError):
            packed[index]


def test_points_in_pairs_are_packed_as_flat_ones():
    pairs = [[np.reshape(polygon, (-1, 2)) for polygon in polygons] for polygons in INSTANCES]
    assert unpacked(PackedPolygons.pack(pairs)) == INSTANCES


def test_joined_are_the_instances_in_order():
    parts = [INSTANCES, [], [[]], INSTANCES[::-1]]
    joined = PackedPolygons.join([PackedPolygons.pack(part) for part in parts])
    assert unpacked(joined) == [instance for part in parts for instance in part]
    assert joined.polygon_starts.dtype == joined.instance_starts.dtype == np.int32


@pytest.mark.parametrize(
    ("polygon", "problem"),
    [
        ([], "has 0 numbers: give x and y of at least 3 points"),
        ([1.0, 2, 3, 4], "has 4 numbers"),
        ([1.0, 2, 3, 4, 5, 6, 7], "has 7 numbers"),
        ([1.0, 2, float("nan"), 4, 5, 6], "holds NaN or infinity"),
        ([1.0, 2, 3, 4, 5, float("-inf")], "holds NaN or infinity"),
    ],
    ids=["nothing", "two-points", "odd", "nan", "infinity"],
)
def test_errors_are_named(polygon, problem):
    with pytest.raises(ValueError, match=rf"^truth\[2\]\[1\] {problem}"):
        PackedPolygons.pack([INSTANCES[0], [], [INSTANCES[0][0], polygon]], "truth")
