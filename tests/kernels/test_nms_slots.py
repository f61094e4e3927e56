"""nms_slots: every implementation keeps the boxes that torchvision's CPU code keeps, problem by problem."""

import math

import numpy as np
import pytest
import torch
from support.kernels import BF16, F32, IMPLS, here, mocked_gpu, native, needs_compiler, on_all

from mimdet.kernels import KernelUnavailableError, library, nms_slots
from mimdet.kernels.nms_slots import ops, reference
from mimdet.testing.plain import nms_slots as torchvisions

OP = "nms_slots"
F64 = torch.float64
NAN, INF = math.nan, math.inf
pytestmark = pytest.mark.usefixtures("poisoned")


def suppress(boxes, valid, threshold, stop_at=None, *, impl, device="cpu"):
    return nms_slots(boxes.to(device), valid.to(device), threshold, stop_at, impl=impl).cpu()


def all_valid(boxes):
    return torch.ones(boxes.shape[:2], dtype=torch.bool)


def uniform(generator, *shape):
    return torch.rand(*shape, generator=generator)


def crowded(generator, problems, rows):
    corners = uniform(generator, problems, rows, 2) * 40
    return torch.cat([corners, corners + uniform(generator, problems, rows, 2) * 30], dim=-1)


def on_a_grid(generator, problems, rows):
    """Many equal boxes, touching ones, ones without an area, and exact values of IoU."""
    return (crowded(generator, problems, rows) / 6).round()


def clustered(generator, problems, rows):
    """Around a few objects, as proposals are."""
    centers, sides = uniform(generator, 8, 2) * 900, 20 + 150 * uniform(generator, 8, 2)
    which = torch.randint(8, (problems, rows), generator=generator)
    center = centers[which] + torch.randn(problems, rows, 2, generator=generator) * sides[which] / 8
    side = sides[which] * (torch.randn(problems, rows, 2, generator=generator) / 6).exp()
    return torch.cat([center - side / 2, center + side / 2], dim=-1)


def turned(generator, problems, rows):
    """Corners in any order: areas, intersections and unions that are negative or zero."""
    return (uniform(generator, problems, rows, 4) * 8).round()


def chain(generator, problems, rows):
    """Each box overlaps only its neighbors: every row depends on the one before."""
    start = torch.arange(rows, dtype=F32).expand(problems, rows)
    return torch.stack([start, torch.zeros_like(start), start + 2, torch.ones_like(start)], dim=-1)


def extreme(generator, problems, rows):
    """Products that overflow, or are too small for normal numbers."""
    scale = torch.tensor([1e-23, 1e-20, 1.0, 1e15, 1e19])[torch.randint(5, (problems, 1, 1), generator=generator)]
    return on_a_grid(generator, problems, rows) * scale


def not_finite(generator, problems, rows):
    boxes = on_a_grid(generator, problems, rows)
    for value in (NAN, INF, -INF):
        boxes[uniform(generator, *boxes.shape) < 0.06] = value
    return boxes


KINDS = [crowded, on_a_grid, clustered, turned, chain, extreme, not_finite]
SIZES = here([1, 2, 63, 64, 65, 127, 129, 300], [1, 64, 65, 129])


@on_all(OP)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_is_torchvision(kind, impl, device):
    suppressed = 0
    for rows in SIZES:
        for seed in range(here(6, 1)):
            generator = torch.Generator().manual_seed(1000 * seed + rows)
            boxes = kind(generator, here(4, 2), rows)
            valid = uniform(generator, *boxes.shape[:2]) < (1.0, 0.7)[seed % 2 if seed else rows % 2]
            for threshold in here((0.0, 0.1, 0.3, 1 / 3, 0.5, 0.7, 1.0), (1 / 3,)):
                expected = torchvisions(boxes, valid, threshold)
                assert torch.equal(suppress(boxes, valid, threshold, impl=impl, device=device), expected), (rows, seed)
                suppressed += int((valid & ~expected).sum())
    assert suppressed


@native
@on_all(OP)
@pytest.mark.parametrize("kind", [clustered, chain, on_a_grid], ids=lambda kind: kind.__name__)
def test_many_rows(kind, impl, device):
    boxes = kind(torch.Generator().manual_seed(0), 2, 2000)
    valid = uniform(torch.Generator().manual_seed(1), 2, 2000) < 0.9
    for threshold in (0.3, 0.7):
        expected = torchvisions(boxes, valid, threshold)
        assert torch.equal(suppress(boxes, valid, threshold, impl=impl, device=device), expected)


@on_all(OP)
def test_alternating_chain(impl, device):
    # IoU of neighbors is 1/3: the first row suppresses the second, which would have suppressed the third.
    boxes = chain(None, 1, here(1000, 130))
    keep = suppress(boxes, all_valid(boxes), 0.3, impl=impl, device=device)[0]
    assert keep[::2].all()
    assert not keep[1::2].any()


def iou_of(first, second):
    """As float32 numbers, the way that torchvision computes it."""
    (a, b), sides = np.array([first, second], np.float32), lambda box: box[2:] - box[:2]
    shared = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), np.float32(0))
    shared = shared[0] * shared[1]
    return float(shared / (np.prod(sides(a)) + np.prod(sides(b)) - shared))


@on_all(OP)
def test_iou_at_the_threshold(impl, device):
    """It does not suppress; and the threshold stays the double that it is."""
    generator = torch.Generator().manual_seed(0)
    pairs = here(300, 12)
    for pair in crowded(generator, pairs, 2):
        iou = iou_of(*pair.numpy())
        if 0.0 < iou < 1.0:
            for threshold in (iou, np.nextafter(iou, 1), np.nextafter(iou, 0), float(np.nextafter(np.float32(iou), 0))):
                keep = suppress(pair[None], all_valid(pair[None]), float(threshold), impl=impl, device=device)[0]
                assert keep.tolist() == [True, not iou > threshold], (pair, iou, threshold)
    # 0.7 is below the float32 next to it, which is this IoU: 7 of 10 cells.
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 1.0], [0.0, 0.0, 7.0, 1.0]]])
    assert iou_of(*boxes[0].numpy()) == float(np.float32(0.7)) != 0.7
    for threshold in (0.7, float(np.float32(0.7))):
        assert torch.equal(
            suppress(boxes, all_valid(boxes), threshold, impl=impl, device=device),
            torchvisions(boxes, all_valid(boxes), threshold),
        )


@pytest.mark.parametrize("number", [0.0, 1.0, 0.5, 0.7, 0.1, 1 / 3, 1e-50, 5e-46, 1e-40, 1 - 1e-12, 0.7 + 1e-9])
@native
def test_float_below(number):
    below = ops.float_below(number)
    assert below == float(np.float32(below)) <= number
    assert float(np.nextafter(np.float32(below), np.float32(2))) > number


@on_all(OP)
def test_every_step_is_rounded(impl, device):
    """A fused product and sum, or a division through a reciprocal, decides some of these otherwise."""
    rng = np.random.default_rng(0)
    count = here(4000, 40)
    first = np.stack([np.zeros(count), np.zeros(count), *rng.uniform(5, 9, (2, count))], axis=1).astype(np.float32)
    second = first + rng.uniform(0, 2, (count, 4)).astype(np.float32)
    boxes = torch.from_numpy(np.stack([first, second], axis=1))
    # The threshold of all is one step below or at the IoU of some: there every rounding counts.
    for i in range(here(200, 8)):
        iou = iou_of(*boxes[i].numpy())
        for threshold in (iou, float(np.nextafter(np.float32(iou), 0))):
            part = boxes[i : i + 1]
            keep = suppress(part, all_valid(part), threshold, impl=impl, device=device)
            assert keep[0, 1] == (threshold == iou), i


@on_all(OP)
@pytest.mark.parametrize("rows", here([1, 64, 65, 300], [1, 65]))
def test_stop_at(rows, impl, device):
    boxes = clustered(torch.Generator().manual_seed(rows), 3, rows)
    valid = uniform(torch.Generator().manual_seed(1), 3, rows) < 0.8
    complete = suppress(boxes, valid, 0.6, impl=impl, device=device)
    counts = complete.cumsum(1)
    for stop_at in sorted({0, 1, 2, int(counts.max()) // 2, int(counts.max()), rows, rows + 5, 2**40}):
        keep = suppress(boxes, valid, 0.6, stop_at, impl=impl, device=device)
        assert torch.equal(keep, complete & (counts <= stop_at)), stop_at


@on_all(OP)
def test_rows_that_are_not_valid_change_nothing(impl, device):
    generator = torch.Generator().manual_seed(0)
    boxes = on_a_grid(generator, 3, 130)
    valid = uniform(generator, 3, 130) < 0.5
    # A whole word of rows, and a whole problem.
    valid[0, 64:128] = False
    valid[1] = False
    expected = torchvisions(boxes, valid, 0.3)
    for value in here((NAN, INF, -INF, 1e30, -1e30, 0.0), (NAN, 1e30)):
        boxes[~valid] = value
        assert torch.equal(suppress(boxes, valid, 0.3, impl=impl, device=device), expected), value
    assert not expected[1].any()
    assert expected.any(1).tolist() == [True, False, True]


@on_all(OP)
def test_a_box_with_a_nan_is_kept_and_suppresses_nothing(impl, device):
    for i in range(4):
        for row in range(3):
            boxes = torch.tensor([0.0, 0.0, 9.0, 9.0]).repeat(1, 3, 1)
            boxes[0, row, i] = NAN
            keep = suppress(boxes, all_valid(boxes), 0.0, impl=impl, device=device)
            assert torch.equal(keep, torchvisions(boxes, all_valid(boxes), 0.0))
            # Of the two others the first.
            assert keep[0].tolist() == [place in (row, int(row == 0)) for place in range(3)]


@on_all(OP)
def test_problems_do_not_touch(impl, device):
    boxes = torch.zeros(3, 2, 4)
    boxes[..., 2:] = 5
    keep = suppress(boxes, torch.tensor([[True, True], [False, True], [False, False]]), 0.5, impl=impl, device=device)
    assert keep.tolist() == [[True, False], [False, True], [False, False]]


@pytest.mark.parametrize("impl", IMPLS)
def test_one_problem_for_all(impl):
    # Strides of 0.
    boxes = on_a_grid(torch.Generator().manual_seed(2), 1, 70)
    keep = nms_slots(boxes.expand(3, -1, -1), all_valid(boxes).expand(3, -1), 0.3, impl=impl)
    assert torch.equal(keep, torchvisions(boxes, all_valid(boxes), 0.3).expand(3, -1))


@native
def test_eager_compares_few_pairs_at_a_time(monkeypatch):
    boxes = clustered(torch.Generator().manual_seed(0), 7, 150)
    valid = uniform(torch.Generator().manual_seed(1), 7, 150) < 0.8
    most, overlap = [], reference._overlap

    def watched(*arguments):
        result = overlap(*arguments)
        most.append(result.numel())
        return result

    monkeypatch.setattr(reference, "_overlap", watched)
    monkeypatch.setattr(reference, "_PAIRS", 2 * 128 * 150)
    assert torch.equal(nms_slots(boxes, valid, 0.5, impl="eager"), torchvisions(boxes, valid, 0.5))
    assert max(most) == 2 * 128 * 150


@native
@pytest.mark.usefixtures("cpp")
def test_numbers_beyond_two_to_the_31(tmp_path):
    # A sparse file: gigabytes of addresses, a few kilobytes of disk. 32-bit products of problem, row and 4 wrap.
    # Other implementations would take gigabytes of memory for the rest.
    problems, rows = 2**29 // 2**16 + 1, 2**16
    boxes = torch.from_file(str(tmp_path / "sparse"), shared=True, size=problems * rows * 4, dtype=F32)
    boxes, valid = boxes.view(problems, rows, 4), torch.zeros(problems, rows, dtype=torch.bool)
    boxes[-1, -3:] = chain(None, 1, 3)
    valid[-1, -3:] = True
    keep = nms_slots(boxes, valid, 0.3, impl="cpp")
    assert keep[-1, -3:].tolist() == [True, False, True]
    assert not keep[:-1].any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"boxes": torch.zeros(2, 3, 4, dtype=F64)}, TypeError, "boxes must be float32, got torch.float64"),
        ({"boxes": torch.zeros(2, 3, 4, dtype=BF16)}, TypeError, "boxes must be float32, got torch.bfloat16"),
        ({"boxes": torch.zeros(2, 3, 4).int()}, TypeError, "boxes must be of a float dtype, got torch.int32"),
        ({"boxes": torch.zeros(3, 4)}, ValueError, r"boxes must be \(Z, n, 4\), got \(3, 4\)"),
        ({"boxes": torch.zeros(2, 3, 5)}, ValueError, r"boxes must be \(Z, n, 4\), got \(2, 3, 5\)"),
        ({"valid": torch.ones(2, 3)}, TypeError, "valid must be bool, got torch.float32"),
        ({"valid": torch.ones(2, 4).bool()}, ValueError, r"valid must be \(2, 3\), got \(2, 4\)"),
        ({"valid": torch.ones(6).bool()}, ValueError, r"valid must be \(2, 3\), got \(6,\)"),
        ({"iou_threshold": -0.1}, ValueError, r"iou_threshold must be in \[0, 1\], got -0.1"),
        ({"iou_threshold": 1.5}, ValueError, r"iou_threshold must be in \[0, 1\], got 1.5"),
        ({"iou_threshold": NAN}, ValueError, r"iou_threshold must be in \[0, 1\], got nan"),
        ({"iou_threshold": "0.5"}, TypeError, "iou_threshold must be a number, got str"),
        ({"iou_threshold": None}, TypeError, "iou_threshold must be a number, got NoneType"),
        ({"stop_at": "7"}, TypeError, "stop_at must be an integer or None, got str"),
        ({"stop_at": -1}, ValueError, "stop_at must be 0 or more, got -1"),
        ({"stop_at": 2.0}, TypeError, "stop_at must be an integer or None, got float"),
        ({"stop_at": True}, TypeError, "stop_at must be an integer or None, got bool"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_bad_input(change, error, message):
    boxes = torch.zeros(2, 3, 4)
    with pytest.raises(error, match=f"nms_slots: {message}"):
        nms_slots(**{"boxes": boxes, "valid": all_valid(boxes), "iou_threshold": 0.5, **change})


@native
@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_what_cannot_run_says_why(impl):
    boxes = torch.zeros(1, ops.LARGEST + 1, 4)
    message = f"{impl} cannot run: a problem has at most 65536 rows"
    with mocked_gpu(), pytest.raises(KernelUnavailableError, match=message):
        nms_slots(boxes, all_valid(boxes), 0.5, impl=impl)


@native
def test_cuda_source_on_a_cpu(monkeypatch, tmp_path):
    from support.cuda_on_cpu import run_cuda_on_cpu
    from support.kernel_cases import pretend

    from mimdet.kernels.nms_slots import cuda

    run_cuda_on_cpu(monkeypatch, tmp_path, "NmsSlotsCUDA.cu")
    monkeypatch.setattr(cuda, "call_cuda", library.call_cuda)
    with pretend("cuda", OP):
        for kind in KINDS:
            generator = torch.Generator().manual_seed(0)
            boxes = kind(generator, 2, 130)
            valid = uniform(generator, 2, 130) < 0.8
            valid[1, 30:] = False
            complete = torchvisions(boxes, valid, 1 / 3)
            for stop_at in (None, 20):
                keep = nms_slots(boxes, valid, 1 / 3, stop_at, impl="cuda")
                assert torch.equal(keep, complete & (complete.cumsum(1) <= (stop_at or 130))), (kind, stop_at)
        # More words than a warp has lanes.
        boxes, valid = clustered(generator, 1, 2200), torch.zeros(1, 2200, dtype=torch.bool)
        valid[:, ::65] = True
        assert torch.equal(nms_slots(boxes, valid, 0.5, impl="cuda"), torchvisions(boxes, valid, 0.5))


def compiled_for(capability, rows, stop_at=None):
    from support.aot import compile_pair

    boxes = torch.zeros(1, rows, 4)
    return compile_pair(OP, capability, lambda: nms_slots(boxes, all_valid(boxes), 0.5, stop_at, impl="triton"))


@needs_compiler
@pytest.mark.parametrize("capability", [80, 90, 100, "gfx942"], ids=str)
@pytest.mark.parametrize("rows", [1, 40, 2000])
def test_compiles_within_the_budget(capability, rows):
    pairs, scan = compiled_for(capability, rows, min(rows, 1000))
    assert pairs.stack == scan.stack == 0, (pairs, scan)
    assert max(pairs.registers, scan.registers) <= 128, (pairs, scan)


@needs_compiler
def test_most_words_compile_without_spilling(monkeypatch):
    # Scratch of so many rows is half a gigabyte, of which the compiler needs only the shape.
    from mimdet.kernels.nms_slots import triton as kernels

    words = torch.zeros(1, dtype=torch.int64).expand(1, 65536, 1024)
    monkeypatch.setattr(kernels, "overlap_words", lambda boxes: words)
    for capability in (80, "gfx942"):
        pairs, scan = compiled_for(capability, 65536)
        assert pairs.stack == scan.stack == 0, (pairs, scan)


def instructions(capability, assembly, pattern, **options):
    """Of both kernels."""
    from support.aot import count_instructions

    boxes = torch.zeros(1, 100, 4)
    run = lambda: nms_slots(boxes, all_valid(boxes), 0.5, impl="triton")  # noqa: E731
    return count_instructions(OP, capability, assembly, pattern, run, **options)


@needs_compiler
def test_triton_rounds_every_step():
    assert instructions(90, "ptx", r"fma\.rn\.f32", enable_fp_fusion=True) > 0
    assert instructions(90, "ptx", r"fma\.rn\.f32") == 0
    assert instructions(90, "ptx", r"div\.rn\.f32") > 0
    assert instructions(90, "ptx", r"div\.(full|approx)|rcp|\.ftz") == 0
    # A division on AMD consists of five; only with fusion there are more.
    divisions = 5 * instructions("gfx942", "amdgcn", "v_div_fmas_f32")
    assert instructions("gfx942", "amdgcn", "v_(pk_)?(fmac?|mad)_f32") == divisions > 0
    assert instructions("gfx942", "amdgcn", "v_(pk_)?(fmac?|mad)_f32", enable_fp_fusion=True) > divisions
