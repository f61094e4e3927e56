"""rasterize_polygons: every implementation sets the pixels that pycocotools sets, without exception."""

import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from support.kernels import BF16, F16, F32, IMPLS, here, mocked_gpu, native, needs_compiler, on_all, usable

from mimdet.kernels import KernelUnavailableError, rasterize_polygons
from mimdet.testing.plain import rasterize_by_pycocotools

OP = "rasterize_polygons"
F64 = torch.float64
SQUARE = np.array([[2.0, 3.0], [22.0, 3.0], [22.0, 17.0], [2.0, 17.0]])
pytestmark = pytest.mark.usefixtures("poisoned")


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


def pycocotools(instances, index, windows, size):
    masks = [rasterize_by_pycocotools(instances[i], window, size) for i, window in zip(index, windows, strict=True)]
    return torch.from_numpy(np.array(masks, dtype=bool).reshape(-1, size, size))


@cache
def answered(seed, kind, size):
    # pycocotools walks along millions of points of a large polygon.
    case = random_case(seed, kind, *here((6, 6) if kind == "large" else (24, 30), (6, 12)))
    return case, pycocotools(*case, size)


def rasterize(instances, index, windows, size, impl, device="cpu", dtype=F64):
    tensors = *packed(instances), torch.as_tensor(index), torch.as_tensor(windows, dtype=dtype)
    return rasterize_polygons(*(t.to(device) for t in tensors), size, impl=impl).cpu()


@on_all(OP)
@pytest.mark.parametrize("size", here([7, 14, 28], [7, 28]))
@pytest.mark.parametrize("kind", KINDS)
def test_is_pycocotools(kind, size, impl, device):
    filled = 0
    for seed in range(here(6, 3)):
        case, expected = answered(seed, kind, size)
        assert torch.equal(rasterize(*case, size, impl, device), expected), seed
        filled += int(expected.sum())
    assert filled or kind == "collinear"


@on_all(OP)
@pytest.mark.parametrize("size", here([1, 2, 3, 16, 31, 32, 33, 63, 64], [1, 33, 64]))
def test_sizes(size, impl, device):
    case = random_case(size, "tenths", *here((24, 30), (3, 12)))
    assert torch.equal(rasterize(*case, size, impl, device), pycocotools(*case, size))


@pytest.mark.parametrize("impl", here(IMPLS, []))
def test_more_rows_than_a_word_has_bits(impl):
    case = random_case(0, "tenths")
    assert torch.equal(rasterize(*case, 112, impl), pycocotools(*case, 112))


@native
@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_gpu_kernels_say_what_they_cannot_hold(impl):
    message = f"{impl} cannot run: bitmaps have at most 64 x 64 pixels"
    with mocked_gpu(), pytest.raises(KernelUnavailableError, match=message):
        rasterize([[SQUARE]], [0], [[0, 0, 9, 9]], 65, impl)


@on_all(OP)
def test_long_outlines(impl, device):
    # More edges than a GPU's program looks at together.
    rng = np.random.default_rng(1)
    angles = np.sort(rng.uniform(0, 2 * np.pi, here(3000, 300)))
    radii = rng.uniform(4, 14, len(angles))
    instances = [[np.stack([14 + radii * np.cos(angles), 14 + radii * np.sin(angles)], axis=1), SQUARE]]
    case = instances, [0, 0], np.array([[0.0, 0.0, 28.0, 28.0], [5.1, 3.3, 9.7, 20.0]])
    assert torch.equal(rasterize(*case, 28, impl, device), pycocotools(*case, 28))


@on_all(OP)
def test_products_are_rounded_before_sums(impl, device):
    # a * b + c in one rounding fills these otherwise.
    triangles = [
        [[0.8, -1.8], [-4.2, 12.8], [34.0, 2.6]],
        [[6.8, 31.6], [0.2, 26.6], [11.2, 6.6]],
        [[8.6, 14.0], [-0.4, 22.2], [26.6, -2.4]],
        [[4.0, 20.6], [0.0, 30.2], [34.6, -3.6]],
        [[29.2, 1.0], [-2.2, 28.0], [13.0, 10.0]],
        [[20.4, 12.0], [26.2, 23.0], [2.4, -0.8]],
    ]
    case = [[np.array(t)] for t in triangles], range(6), np.array([[0.0, 0.0, 28.0, 28.0]] * 6)
    assert torch.equal(rasterize(*case, 28, impl, device), pycocotools(*case, 28))


@on_all(OP)
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_boxes_of_any_dtype_are_taken_as_they_are(dtype, impl, device):
    instances, index, windows = random_case(3, "plain", *here((24, 30), (3, 12)))
    windows = torch.tensor(windows, dtype=dtype)
    expected = pycocotools(instances, index, windows.double().numpy(), 14)
    assert torch.equal(rasterize(instances, index, windows, 14, impl, device, dtype), expected)


@on_all(OP)
def test_joins_the_polygons_of_an_instance(impl, device):
    hole = SQUARE / 2 + 4
    joined, whole = (rasterize([[SQUARE, hole]], [0], [[0, 0, 28, 28]], 28, impl, device)), SQUARE
    assert torch.equal(joined, rasterize([[whole]], [0], [[0, 0, 28, 28]], 28, impl, device))
    assert int(joined.sum()) == 20 * 14


@on_all(OP)
def test_nothing_to_do(impl, device):
    empty = rasterize([[]], [0, 0], [[0, 0, 9, 9]] * 2, 7, impl, device)
    assert empty.shape == (2, 7, 7)
    assert not empty.any()
    assert rasterize([[SQUARE]], torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), 7, impl, device).shape == (
        0, 7, 7,
    )  # fmt: skip
    assert rasterize([], torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), 7, impl, device).shape == (0, 7, 7)
    # A polygon without points, one of two and one of one have no inside.
    few = [[SQUARE[:0], SQUARE[:2], SQUARE[:1]]]
    assert not rasterize(few, [0], [[0, 0, 28, 28]], 28, impl, device).any()


@on_all(OP)
def test_what_no_integer_holds_is_far_away(impl, device):
    # Half of the plane: pycocotools would walk along billions of points, or overflow.
    far = np.array([[-1e300, -1e300], [4.0, -1e300], [4.0, 1e300], [-1e300, 1e300]])
    out = rasterize([[far]], [0], [[0, 0, 28, 28]], 28, impl, device)[0]
    assert out[:, :4].all()
    assert not out[:, 4:].any()
    strange = np.array([[np.nan, 3.0], [np.inf, -np.inf], [4.0, 5.0]])
    for window in ([0.0, 0.0, 9.0, 9.0], [np.nan, 0.0, np.inf, 3.0]):
        rasterize([[strange]], [0], [window], 28, impl, device)


@pytest.mark.parametrize("impl", here(IMPLS, []))
def test_points_beyond_two_to_the_31_bytes(tmp_path, impl):
    # A sparse file: gigabytes of addresses, a few kilobytes of disk. 32-bit products of point and stride wrap.
    count = 2**28 + 8
    points = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * count, dtype=F64).view(count, 2)
    points[-4:] = torch.from_numpy(SQUARE)
    starts = torch.tensor([0, 0, count - 4, count], dtype=torch.int32)
    instances = torch.tensor([2, 3], dtype=torch.int32)
    box = torch.tensor([[0.0, 0.0, 28.0, 28.0]])
    assert rasterize_polygons(points, starts, instances, torch.tensor([0]), box, 28, impl=impl).sum() == 20 * 14


@native
@pytest.mark.parametrize("impl", [name for name in ("eager", "cpp") if usable(OP, name, "cpu")])
def test_real_annotations(impl):
    if "MIMDET_COCO_SAMPLE" not in os.environ:
        pytest.skip("MIMDET_COCO_SAMPLE is not set")
    rng = np.random.default_rng(0)
    for file in sorted((Path(os.environ["MIMDET_COCO_SAMPLE"]) / "annotations").glob("instances_*.json")):
        annotations = [a for a in json.loads(file.read_text())["annotations"] if isinstance(a["segmentation"], list)]
        instances = [[np.array(p, dtype=np.float64).reshape(-1, 2) for p in a["segmentation"]] for a in annotations]
        boxes = np.array([a["bbox"] for a in annotations], dtype=np.float32)
        boxes[:, 2:] += boxes[:, :2]
        # As proposals are: moved by up to a third of a side.
        index = np.arange(len(boxes)).repeat(3)
        sides = boxes[:, 2:] - boxes[:, :2]
        shift = rng.uniform(-1 / 3, 1 / 3, (len(index), 4)) * np.tile(sides[index], 2)
        windows = (boxes[index] + shift).astype(np.float32).astype(np.float64)
        windows[::3] = boxes
        for size in (7, 14, 28):
            expected = pycocotools(instances, index, windows, size)
            assert torch.equal(rasterize(instances, index, windows, size, impl), expected), (file.name, size)


def arguments():
    instances, index, windows = random_case(8, "tenths", 5)
    return *packed(instances), torch.as_tensor(index), torch.as_tensor(windows)


@pytest.mark.parametrize(
    ("place", "value", "error", "message"),
    [
        ((3, 1), -1, IndexError, r"index\[1\] is -1"),
        ((3, 1), 6, IndexError, r"index\[1\] is 6"),
        ((1, 2), 10_000, IndexError, r"polygon_starts\[2\] is 10000"),
        ((1, 2), 0, ValueError, r"polygon_starts.*2"),
        ((2, 0), -1, IndexError, r"instance_starts\[0\] is -1"),
        ((2, 6), 99, IndexError, r"instance_starts\[6\] is 99"),
    ],
    ids=str,
)
def test_what_is_out_of_range_is_named(monkeypatch, place, value, error, message):
    tensors = [t.clone() for t in arguments()]
    tensors[place[0]][place[1]] = value
    if usable(OP, "cpp", "cpu"):
        with pytest.raises(RuntimeError, match=message):
            rasterize_polygons(*tensors, 14, impl="cpp")
    monkeypatch.setenv("MIMDET_DEBUG_KERNELS", "1")
    with pytest.raises(error, match=message):
        rasterize_polygons(*tensors, 14, impl="eager")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"points": torch.zeros(3, 2)}, TypeError, "points must be float64, got torch.float32"),
        ({"points": torch.zeros(6, dtype=F64)}, ValueError, r"points must be \(P, 2\), got \(6,\)"),
        ({"points": torch.zeros(2, 3, dtype=F64)}, ValueError, r"points must be \(P, 2\), got \(2, 3\)"),
        ({"polygon_starts": torch.zeros(2)}, TypeError, "polygon_starts must be int32 or int64"),
        ({"polygon_starts": torch.zeros(0).int()}, ValueError, r"polygon_starts must be \(Q \+ 1,\), got \(0,\)"),
        ({"instance_starts": torch.zeros(1, 2).int()}, ValueError, r"instance_starts must be \(N \+ 1,\)"),
        ({"index": torch.zeros(5)}, TypeError, "index must be int32 or int64"),
        ({"index": torch.zeros(5, 1).int()}, ValueError, r"index must be \(R,\), got \(5, 1\)"),
        ({"boxes": torch.zeros(5, 4).int()}, TypeError, "boxes must be of a float dtype"),
        ({"boxes": torch.zeros(4, 4)}, ValueError, r"boxes must be \(5, 4\), got \(4, 4\)"),
        ({"boxes": torch.zeros(5, 5)}, ValueError, r"boxes must be \(5, 4\), got \(5, 5\)"),
        ({"size": 0}, ValueError, "size must be 1 or more, got 0"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_bad_input(change, error, message):
    names = ("points", "polygon_starts", "instance_starts", "index", "boxes")
    with pytest.raises(error, match=f"rasterize_polygons: {message}"):
        rasterize_polygons(**{**dict(zip(names, arguments(), strict=True)), "size": 14, **change})


@needs_compiler
@pytest.mark.parametrize("capability", [80, 90, 100, "gfx942"], ids=str)
@pytest.mark.parametrize("size", [7, 28, 64])
def test_compiles_within_the_budget(capability, size):
    from support.aot import compile_pair

    (one,) = compile_pair(OP, capability, lambda: rasterize_polygons(*arguments(), size, impl="triton"))
    assert one.stack == 0, one
    assert one.registers <= 96, one


def fused(capability, assembly, pattern, **options):
    """How many fused products and sums of doubles the compiler made."""
    from support.aot import count_instructions

    run = lambda: rasterize_polygons(*arguments(), 28, impl="triton")  # noqa: E731
    return count_instructions(OP, capability, assembly, pattern, run, **options)


@needs_compiler
def test_triton_does_not_fuse_products_with_sums():
    assert fused(90, "ptx", r"fma\.rn\.f64", enable_fp_fusion=True) > 0
    assert fused(90, "ptx", r"fma\.rn\.f64") == 0
    # A division on AMD consists of five.
    assert fused("gfx942", "amdgcn", "v_fmac?_f64") == 5 * fused("gfx942", "amdgcn", "v_div_fmas_f64")
