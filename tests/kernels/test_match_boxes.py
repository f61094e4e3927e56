"""match_boxes: every implementation gives the integers of torchvision's box_iou and of the matcher, to the last one."""

import math

import numpy as np
import pytest
import torch
from support.kernels import here, mocked_gpu, native, needs_compiler, on_all, usable
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import box_iou

from mimdet.kernels import KernelUnavailableError, match_boxes
from mimdet.kernels.match_boxes import reference
from mimdet.testing import plain

OP = "match_boxes"
BANDS = (0.3, 0.7), (0, -1, 1)
SQUARE = [0.0, 0.0, 10.0, 10.0]
pytestmark = pytest.mark.usefixtures("poisoned")
nan, inf = float("nan"), float("inf")


def random_boxes(generator, kind, *shape):
    """(*shape, 4) of one kind."""

    def uniform(least, most):
        return least + (most - least) * torch.rand(*shape, 2, generator=generator)

    corners, sides = uniform(0, 90), uniform(1, 60)
    if kind == "ties":  # few different boxes, and few different overlaps
        corners, sides = (corners / 30).round() * 30, (sides / 30).round() * 30
    if kind == "zero area":
        sides = sides * (torch.rand(*shape, 2, generator=generator) < 0.6)
    if kind == "inside out":
        sides = sides * (1 - 2 * (torch.rand(*shape, 2, generator=generator) < 0.3))
    if kind == "apart":  # many boxes touch nothing
        corners, sides = 10 * corners, sides / 4
    if kind == "tiny":  # areas are subnormal, or 0
        corners, sides = corners * 1e-20, sides * 1e-20
    boxes = torch.cat([corners, corners + sides], dim=-1)
    if kind == "not finite":
        strange = torch.tensor([nan, inf, -inf, 1e30, -1e30, 3e38])
        which = torch.randint(len(strange), boxes.shape, generator=generator)
        boxes = torch.where(torch.rand(boxes.shape, generator=generator) < 0.1, strange[which], boxes)
    return boxes


KINDS = ("plain", "ties", "zero area", "inside out", "apart", "tiny", "not finite")


def random_case(seed, kind="plain", slots=5, count=300, batch=6, shared=True, outside="none"):
    """Arguments up to the bands; images with no, one, all, and some real boxes; strange numbers in the other slots."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(slots + 1, (batch,), generator=generator, dtype=torch.int32)
    counts[:3] = torch.tensor([slots, 0, min(slots, 1)])[:batch]
    boxes = random_boxes(generator, kind, batch, slots)
    poison = torch.tensor([nan, 1e30, inf, 0.0])[torch.randint(4, boxes.shape, generator=generator)]
    boxes = torch.where((torch.arange(slots) < counts[:, None])[..., None], boxes, poison)
    candidates = random_boxes(generator, kind, *(() if shared else (batch,)), count)
    mask = None
    if outside != "none":
        mask = torch.rand(batch, count, generator=generator) < 0.3
        mask[0] |= outside == "all of one"
    return boxes, counts, candidates, mask


def matched(boxes, counts, candidates, outside=None, *, impl, device="cpu", bands=BANDS, low_quality=True):
    tensors = (None if t is None else t.to(device) for t in (boxes, counts, candidates))
    outside = None if outside is None else outside.to(device)
    index, label = match_boxes(*tensors, *bands, low_quality, outside, impl=impl)
    assert (index.dtype, label.dtype) == (torch.int32, torch.int8)
    return index.cpu(), label.cpu()


def assert_matched(boxes, counts, candidates, outside=None, *, bands=BANDS, low_quality=True, **where):
    index, label = matched(boxes, counts, candidates, outside, bands=bands, low_quality=low_quality, **where)
    expected = plain.match_boxes(boxes, counts, candidates, outside, *bands, low_quality)
    assert torch.equal(index, expected[0])
    assert torch.equal(label, expected[1])
    return index, label


@on_all(OP)
@pytest.mark.parametrize("low_quality", [False, True], ids=["by-threshold", "low-quality"])
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_matcher(kind, low_quality, impl, device):
    seen = set()
    for seed, shared in here([(0, True), (1, False), (2, True), (3, False)], [(0, True), (1, False)]):
        for outside in ("none", "some", "all of one"):
            example = random_case(seed, kind, shared=shared, outside=outside)
            _, label = assert_matched(*example, impl=impl, device=device, low_quality=low_quality)
            seen |= set(label.flatten().tolist())
    assert 1 in seen or not low_quality


@on_all(OP)
@pytest.mark.parametrize("slots", here([0, 1, 2, 33, 128], [0, 1, 9]))
@pytest.mark.parametrize("count", here([0, 1, 7, 255, 256, 257, 2051], [0, 1, 513]))
def test_sizes(count, slots, impl, device):
    assert_matched(*random_case(count, "ties", slots, count, batch=4, outside="some"), impl=impl, device=device)
    assert_matched(*random_case(count, "plain", slots, count, batch=1, shared=False), impl=impl, device=device)


@on_all(OP)
def test_the_first_of_equal_boxes(impl, device):
    boxes = torch.tensor([[[50.0, 50.0, 60.0, 60.0], SQUARE, SQUARE]])
    index, label = matched(boxes, torch.tensor([3]), torch.tensor([SQUARE, [90.0, 90.0, 99.0, 99.0]]), impl=impl,
                           device=device, low_quality=False)  # fmt: skip
    assert index.tolist() == [[1, 0]]
    assert label.tolist() == [[1, 0]]


@on_all(OP)
@pytest.mark.parametrize("height", [3.0, 7.0])
def test_an_overlap_at_the_threshold(height, impl, device):
    """PyTorch rounds the number of ``tensor >= number`` to the tensor's float32: float32(0.7) is below 0.7."""
    overlap = np.float32(height) / np.float32(10)
    assert overlap == box_iou(torch.tensor([SQUARE]), torch.tensor([[0.0, 0.0, 10.0, height]])).item()
    below, above = (float(np.nextafter(overlap, np.float32(end))) for end in (0, 1))
    of_float64 = [math.nextafter(height / 10, end) for end in (0, 1)]
    for threshold, reached in [(height / 10, True), (float(overlap), True), (below, True), (above, False),
                               *((t, True) for t in of_float64)]:  # fmt: skip
        assert (torch.tensor(overlap) >= threshold) == reached
        _, label = assert_matched(
            torch.tensor([[SQUARE]]), torch.tensor([1]), torch.tensor([[0.0, 0.0, 10.0, height]]), impl=impl,
            device=device, bands=((threshold,), (0, 1)), low_quality=False,
        )  # fmt: skip
        assert label.item() == reached


@on_all(OP)
def test_bands(impl, device):
    """One threshold, equal ones, as many as the GPU kernels take, and labels in any order."""
    example = random_case(3)
    for bands in [
        ((0.5,), (1, -1)),
        ((0.2, 0.2, 0.6), (0, 1, -1, 0)),
        (tuple(n / 10 for n in range(1, 9)), (0, 1, -1) * 3),
        ((1e-40, inf), (-1, 0, 1)),
    ]:
        assert_matched(*example, impl=impl, device=device, bands=bands, low_quality=False)


@on_all(OP)
def test_a_box_that_nothing_overlaps(impl, device):
    """As in Detectron2 it makes every candidate foreground that does not overlap it; slots without a box do not."""
    candidates = torch.tensor([SQUARE, [20.0, 20.0, 30.0, 30.0]]).repeat(here(300, 2), 1)
    far = [500.0, 500.0, 510.0, 510.0]
    boxes = torch.tensor([[SQUARE, far], [SQUARE, far], [SQUARE, [nan] * 4]])
    counts = torch.tensor([1, 2, 2])
    _, label = assert_matched(boxes, counts, candidates, impl=impl, device=device)
    assert label[:, :2].tolist() == [[1, 0], [1, 1], [1, 1]]
    outside = torch.zeros(3, len(candidates), dtype=torch.bool)
    outside[:, 1::2] = True
    _, label = assert_matched(boxes, counts, candidates, outside, impl=impl, device=device)
    assert label[:, :2].tolist() == [[1, -1]] * 3
    # The one that overlaps is outside.
    _, label = assert_matched(boxes, counts, candidates, ~outside, impl=impl, device=device)
    assert label[:, :2].tolist() == [[-1, 1]] * 3


@on_all(OP)
def test_what_is_in_unused_slots_changes_nothing(impl, device):
    boxes, counts, candidates, outside = random_case(4, outside="some")
    results = []
    unused = (torch.arange(boxes.shape[1]) >= counts[:, None])[..., None]
    for box in ([0.0] * 4, [nan] * 4, [inf] * 4, [1e30] * 4, [20.0, 20.0, 80.0, 80.0]):
        filled = torch.where(unused, torch.tensor(box), boxes)
        results.append(matched(filled, counts, candidates, outside, impl=impl, device=device))
    for index, label in results[1:]:
        assert torch.equal(index, results[0][0])
        assert torch.equal(label, results[0][1])


@on_all(OP)
def test_every_operation_is_rounded_once(impl, device):
    """The thresholds are the overlap and the next number: only the very same bits are between them."""
    boxes, candidates = random_boxes(torch.Generator().manual_seed(5), "plain", 2, 3000)
    low, high = torch.maximum(boxes[:, :2], candidates[:, :2]), torch.minimum(boxes[:, 2:], candidates[:, 2:])
    w, h = (high - low).clamp(min=0).unbind(1)
    areas = [(b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (boxes, candidates)]
    rounded = w * h / (sum(areas) - w * h)
    fused = w * h / (sum(areas).double() - w.double() * h.double()).float()
    differ = ((rounded != fused) & (rounded > 0)).nonzero().squeeze(1)
    assert len(differ) >= 20
    for i in differ[: here(20, 5)]:
        overlap = rounded[i].numpy()
        bands = (float(overlap), float(np.nextafter(overlap, np.float32(1)))), (0, 1, -1)
        _, label = matched(boxes[i][None, None], torch.tensor([1]), candidates[i][None], impl=impl, device=device,
                           bands=bands, low_quality=False)  # fmt: skip
        assert label.item() == 1


@on_all(OP)
def test_one_images_candidates_and_mask_for_all(impl, device):
    boxes, counts, candidates, outside = random_case(5, shared=False, outside="some")
    shared, mask = candidates[0], outside[:1].expand(outside.shape)
    one = matched(boxes, counts, shared, mask, impl=impl, device=device)
    other = matched(boxes, counts, shared.expand(len(boxes), -1, -1), mask.contiguous(), impl=impl, device=device)
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


@native
def test_eager_takes_some_slots_at_a_time(monkeypatch):
    example = random_case(8, "ties", slots=7, outside="some")
    for pairs in (1, 2 * example[0].shape[0] * example[2].shape[0], 2**40):
        monkeypatch.setattr(reference, "_PAIRS", pairs)
        assert_matched(*example, impl="eager")


@native
@pytest.mark.parametrize("impl", ["eager", "triton", "cuda"])
def test_nothing_waits_for_the_gpu(impl):
    """Tensors of a GPU that is not here: no value is read, nothing is copied between devices."""

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            devices = {t.device.type for t in [*args, out] if isinstance(t, torch.Tensor)}
            assert len(devices) < 2, function
            return out

    with mocked_gpu(), FakeTensorMode(), Copies():
        tensors = torch.empty(3, 5, 4, device="cuda"), torch.empty(3, dtype=torch.int64, device="cuda")
        candidates = torch.empty(1000, 4, device="cuda")
        outside = torch.empty(3, 1000, dtype=torch.bool, device="cuda")
        for mask in (None, outside):
            index, label = match_boxes(*tensors, candidates, *BANDS, True, mask, impl=impl)
            assert index.shape == label.shape == (3, 1000)
            assert index.device.type == "cuda"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("many", [False, True], ids=["small", "more-than-two-to-the-31"])
@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_last_of_many_images(impl, many):
    """2**31 coordinates later, too."""
    if many and torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs a GPU of 40 GB")
    count = 2**18 + 3 if many else 301
    batch = 2**11 + 1 if many else 6
    boxes, counts, candidates, _ = random_case(10, count=count, batch=1, shared=False)
    wide = torch.zeros(batch, count, 4, device="cuda")
    wide[-1] = candidates[0]
    many_boxes = boxes.expand(batch, -1, -1).contiguous().cuda()
    many_counts = torch.zeros(batch, dtype=torch.int32, device="cuda")
    many_counts[-1] = counts[0]
    index, label = match_boxes(many_boxes, many_counts, wide, *BANDS, True, impl=impl)
    expected = plain.match_boxes(boxes, counts, candidates, None, *BANDS, True)
    assert torch.equal(index[-1].cpu(), expected[0][0])
    assert torch.equal(label[-1].cpu(), expected[1][0])
    assert not index[:-1].any()
    assert not label[:-1].any()


@pytest.mark.parametrize("count", [-1, 6])
def test_a_count_out_of_range_is_named(monkeypatch, count):
    boxes, counts, candidates, _ = random_case(13)
    counts[2] = count
    message = rf"match_boxes: counts\[2\] is {count}, outside of 0 \.\. 5"
    if usable(OP, "cpp", "cpu"):
        with pytest.raises(RuntimeError, match=message):
            match_boxes(boxes, counts, candidates, *BANDS, impl="cpp")
    monkeypatch.setenv("MIMDET_DEBUG_KERNELS", "1")
    with pytest.raises(IndexError, match=message):
        match_boxes(boxes, counts, candidates, *BANDS, impl="eager")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"boxes": torch.zeros(2, 3, 4).double()}, TypeError, "boxes must be float32, got torch.float64"),
        ({"boxes": torch.zeros(2, 3, 4).int()}, TypeError, "boxes must be of a float dtype, got torch.int32"),
        ({"boxes": torch.zeros(3, 4)}, ValueError, r"boxes must be \(B, G, 4\), got \(3, 4\)"),
        ({"boxes": torch.zeros(2, 3, 5)}, ValueError, r"boxes must be \(B, G, 4\), got \(2, 3, 5\)"),
        ({"counts": torch.zeros(2)}, TypeError, "counts must be int32 or int64, got torch.float32"),
        ({"counts": torch.zeros(3).int()}, ValueError, r"counts must be \(2,\), got \(3,\)"),
        ({"candidates": torch.zeros(7, 4).bfloat16()}, TypeError, "candidates must be float32, got torch.bfloat16"),
        ({"candidates": torch.zeros(7)}, ValueError, r"candidates must be \(N, 4\) or \(2, N, 4\), got \(7,\)"),
        ({"candidates": torch.zeros(7, 5)}, ValueError, r"candidates must be \(N, 4\) or \(2, N, 4\), got \(7, 5\)"),
        ({"candidates": torch.zeros(3, 7, 4)}, ValueError, r"candidates must be .*, got \(3, 7, 4\)"),
        ({"outside": torch.zeros(2, 7)}, TypeError, "outside must be bool, got torch.float32"),
        ({"outside": torch.zeros(7).bool()}, ValueError, r"outside must be \(2, 7\), got \(7,\)"),
        ({"thresholds": (0.7, 0.3)}, ValueError, r"thresholds must be .* ascending .*, got \[0.7, 0.3\]"),
        ({"thresholds": (0.0, 0.3)}, ValueError, r"thresholds must be .* above 0, got \[0.0, 0.3\]"),
        ({"thresholds": (0.3, nan)}, ValueError, r"thresholds must be .*, got \[0.3, nan\]"),
        ({"thresholds": (nan, 0.3)}, ValueError, r"thresholds must be .*, got \[nan, 0.3\]"),
        ({"thresholds": (), "labels": (0,)}, ValueError, r"thresholds must be one or more .*, got \[\]"),
        ({"labels": (0, 1)}, ValueError, r"labels must be 3, one more than thresholds, got \[0, 1\]"),
        ({"labels": (0, 2, 1)}, ValueError, r"labels must be -1, 0 or 1, got \[0, 2, 1\]"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_bad_input(change, error, message):
    arguments = {
        "boxes": torch.zeros(2, 3, 4),
        "counts": torch.zeros(2, dtype=torch.int32),
        "candidates": torch.zeros(7, 4),
        "thresholds": BANDS[0],
        "labels": BANDS[1],
    }
    match_boxes(**arguments)
    with pytest.raises(error, match=f"match_boxes: {message}"):
        match_boxes(**{**arguments, **change})


@native
@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_gpu_kernels_say_what_they_cannot_hold(impl):
    arguments = random_case(14)[:3]
    bands = [n / 10 for n in range(1, 10)], [0] * 10
    with mocked_gpu(), pytest.raises(KernelUnavailableError, match="take at most 8 thresholds, got 9"):
        match_boxes(*arguments, *bands, impl=impl)
    for usable_one in ("eager", "auto"):
        match_boxes(*arguments, *bands, impl=usable_one)


@needs_compiler
@pytest.mark.parametrize("capability", [80, 90, 100, "gfx942"], ids=str)
@pytest.mark.parametrize("low_quality", [False, True])
@pytest.mark.parametrize("outside", ["none", "some"])
def test_compiles_within_the_budget(capability, low_quality, outside):
    from support.aot import compile_pair

    boxes, counts, candidates, mask = random_case(15, outside=outside)
    run = lambda: match_boxes(boxes, counts, candidates, *BANDS, low_quality, mask, impl="triton")  # noqa: E731
    kernels = compile_pair(OP, capability, run)
    assert len(kernels) == 1 + low_quality
    for one in kernels:
        assert one.stack == 0, one
        assert one.registers <= 64, one


def fused(capability, assembly, pattern, **options):
    """How many fused products and sums the compiler made in both kernels."""
    from support.aot import count_instructions

    run = lambda: match_boxes(*random_case(16)[:3], *BANDS, True, impl="triton")  # noqa: E731
    return count_instructions(OP, capability, assembly, pattern, run, **options)


@needs_compiler
def test_triton_does_not_fuse_products_with_sums():
    assert fused(90, "ptx", r"fma\.rn\.f32", enable_fp_fusion=True) > 0
    assert fused(90, "ptx", r"fma\.rn\.f32") == 0
    assert fused(90, "ptx", "ftz|approx|div.full") == 0
    # A division on AMD consists of five.
    assert fused("gfx942", "amdgcn", "v_fmac?_f32") == 5 * fused("gfx942", "amdgcn", "v_div_fmas_f32")
