"""roi_align_levels: torchvision's ROIAlign level by level, within the budget; invalid slots leave no trace."""

import math

import pytest
import torch
from support.kernels import BF16, F32, IMPLS, here, native, needs_compiler, quantized
from torchvision.ops import roi_align

from mimdet.kernels import KernelUnavailableError, roi_align_levels
from mimdet.kernels.roi_align_levels import ops
from mimdet.kernels.roi_align_levels.api import LARGEST, assign_levels
from mimdet.testing import assert_within_budget

OP = "roi_align_levels"
F64 = torch.float64
SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
# Under the slow interpreter maps and boxes are of half the size.
ZOOM = here(1.0, 0.5)
GRIDS = here(((23, 30), (12, 15), (6, 8), (3, 4)), ((12, 15), (6, 8), (3, 4), (2, 2)))
# Boxes of about this side go to the second level.
CANONICAL = {"canonical_size": 32 * ZOOM, "canonical_level": 3}
pytestmark = pytest.mark.usefixtures("poisoned")


def inputs(batch=2, slots=9, channels=5, levels=4, dtype=F32, device="cpu"):
    """Maps, boxes of all sizes, some over the ends of the maps, and their slots, some without a box."""
    features = [quantized(batch, channels, *grid, dtype=dtype, seed=i) for i, grid in enumerate(GRIDS[:levels])]
    features = [f.to(device, memory_format=torch.channels_last) for f in features]
    corners = quantized(batch, slots, 2, seed=10, mean=25.0, std=30.0)
    sides = (quantized(batch, slots, 2, seed=11) * 1.1 + 3.0).exp()
    valid = torch.arange(slots) % 4 != 2
    return features, ZOOM * torch.cat([corners, corners + sides], -1).to(device), valid.repeat(batch, 1).to(device)


def pool(features, boxes, valid, size=3, ratio=0, **options):
    return roi_align_levels(features, boxes, valid, size, SCALES[: len(features)], ratio, **CANONICAL | options)


def differentiate(features, *arguments, function=pool, **options):
    """The result, and the gradients of all maps."""
    leaves = [f.detach().requires_grad_() for f in features]
    out = function(leaves, *arguments, **options)
    grad = torch.empty_like(out).copy_(quantized(*out.shape, dtype=BF16, seed=20))
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def plainly(features, boxes, valid, size=3, ratio=0, sizes=None):
    """torchvision's, one box at a time."""
    work = F64 if features[0].dtype == F64 else F32
    levels = assign_levels(boxes, SCALES[: len(features)], *CANONICAL.values())
    parts = []
    for i, image in enumerate(boxes):
        for box, is_box, level in zip(image, valid[i], levels[i], strict=True):
            if not is_box or level < 0:
                parts.append(features[0].new_zeros(1, features[0].shape[1], size, size))
                continue
            rows, columns = (None, None) if sizes is None else sizes[level, i].tolist()
            map_ = features[level][i : i + 1, :, :rows, :columns].to(work)
            pooled = roi_align(map_, [box[None].to(work)], size, SCALES[level], ratio, aligned=True)
            parts.append(pooled.to(features[0].dtype))
    # So that a map without boxes has a gradient too.
    return torch.cat(parts) + sum(f.sum() * 0 for f in features)


def judge(actual, features, boxes, valid, *arguments, **options):
    same = differentiate(features, boxes, valid, *arguments, function=plainly, **options)
    exact = differentiate([f.double() for f in features], boxes, valid, *arguments, function=plainly, **options)
    for i, (value, a, b) in enumerate(zip(actual, same, exact, strict=True)):
        assert_within_budget(value, a.to(value.dtype), b, terms=boxes.shape[1] if i else 1, name=f"result {i}")


CASES = here(
    [(size, ratio, channels, levels) for size, ratio, channels in ((7, 0, 64), (14, 0, 17), (3, 2, 130), (1, 3, 1))
     for levels in (1, 4)],
    [(3, 0, 5, 4), (2, 2, 17, 1)],
)  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_torchvisions_level_by_level(runner, case, dtype):
    (size, ratio, channels, levels), (impl, device) = case, runner
    arguments = inputs(channels=channels, levels=levels, dtype=dtype, device=device)
    actual = differentiate(*arguments, size, ratio, impl=impl)
    assert actual[0].dtype == dtype
    assert all(g.is_contiguous(memory_format=torch.channels_last) for g in actual)
    maps, boxes, valid = arguments
    judge([g.cpu() for g in actual], [f.cpu() for f in maps], boxes.cpu(), valid.cpu(), size, ratio)
    eager = differentiate(*arguments, size, ratio, impl="eager")
    assert eager[0].is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(actual, eager, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 if dtype == F32 else 0.05, rtol=1e-5 if dtype == F32 else 0.02)


@pytest.mark.parametrize("ratio", [0, 2])
def test_ends_with_the_valid_areas(runner, ratio):
    impl, device = runner
    features, boxes, valid = inputs(slots=here(9, 4), device=device)
    sizes = torch.tensor([[[rows, columns // 3 + 1], [1, columns]] for rows, columns in GRIDS], device=device)
    for f, areas in zip(features, sizes.tolist(), strict=True):
        for image, (rows, columns) in zip(f, areas, strict=True):
            image[:, rows:] = image[:, :, columns:] = torch.nan
    actual = differentiate(features, boxes, valid, 3, ratio, sizes=sizes, impl=impl)
    clean = [f.nan_to_num().cpu() for f in features]
    judge([g.cpu() for g in actual], clean, boxes.cpu(), valid.cpu(), 3, ratio, sizes=sizes.cpu())
    assert not any(gradient.masked_select(f.isnan()).any() for gradient, f in zip(actual[1:], features, strict=True))


# x1, y1, x2, y2 on maps of 120 x 92 pixels, before ZOOM.
ODD = {
    "left of the map": (-90, 10, -40, 60),
    "below the map": (10, 150, 60, 200),
    "over all ends": (-300, -200, 500, 400),
    "a point": (33, 17, 33, 17),
    "a line": (33, 17, 70, 17),
    "at the map's end": (118, 90, 120, 92),
    "one past the end": (119, 91, 125, 96),
    "tiny": (33, 17, 33.001, 17.001),
    "wide": (-100_000, 20, 100_000, 21),
    "inverted": (70, 60, 20, 10),
    "not a number": (10, math.nan, 60, 50),
    "infinite": (10, 10, math.inf, 60),
    "too large": (0, 0, 4 * LARGEST, 60),
}


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("name", ODD)
def test_odd_boxes(runner, name, ratio):
    impl, device = runner
    features, boxes, valid = inputs(1, 3, 2, device=device)
    boxes[0, 1] = ZOOM * torch.tensor(ODD[name], device=device)
    actual = [g.cpu() for g in differentiate(features, boxes, valid, 2, ratio, impl=impl)]
    judge(actual, [f.cpu() for f in features], boxes.cpu(), valid.cpu(), 2, ratio)
    if name in ("left of the map", "below the map", "inverted", "not a number", "infinite", "too large"):
        assert not actual[0][1].any()


@native
def test_a_box_of_any_size_ends(cpp):
    features, boxes, valid = inputs(1, 3, 2)
    boxes[0, 1] = torch.tensor([-LARGEST, -LARGEST, LARGEST, LARGEST])
    actual = differentiate(features, boxes, valid, impl="cpp")
    # Of the nine bins, the one in the middle has all of the map: its samples are too many for their sum to be large.
    assert actual[0][1].abs().max() < 1e-3
    assert all(g.isfinite().all() for g in actual)


@pytest.mark.parametrize("impl", ["eager"])
@pytest.mark.parametrize("exponent", range(-3, 4))
def test_levels_at_their_boundaries(impl, exponent):
    """Areas a unit in the last place beside each power of two have the pooler's levels."""
    side = torch.tensor(224.0 * 2**exponent)
    below, above = side.nextafter(torch.tensor(0.0)), side.nextafter(torch.tensor(1e9))
    sides = torch.stack([below, side, above])
    boxes = torch.stack([torch.zeros(3), torch.zeros(3), sides, sides], dim=1)
    expected = torch.floor(4 + torch.log2((sides * sides).sqrt() / 224 + 1e-8)).clamp(2, 5).long() - 2
    assert torch.equal(assign_levels(boxes, SCALES), expected)
    assert expected[2] == min(max(exponent + 2, 0), 3)
    # And the pooled maps are of that level.
    features = [torch.full((1, 1, 1024 // s, 1024 // s), float(i)) for i, s in enumerate((4, 8, 16, 32))]
    out = roi_align_levels(features, boxes[None], torch.ones(1, 3, dtype=torch.bool), 1, SCALES, 1, impl=impl)
    assert torch.equal(out.flatten().long(), expected)


@pytest.mark.parametrize("poison", here([math.nan, math.inf, -math.inf, 1e30], [math.nan]))
def test_invalid_slots_leave_no_trace(runner, poison):
    impl, device = runner
    features, boxes, valid = inputs(slots=here(9, 4), device=device)
    first = differentiate(features, boxes, valid, impl=impl)
    second = differentiate(features, boxes.masked_fill(~valid[..., None], poison), valid, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not first[0].view(2, -1, 5, 3, 3)[~valid].any()
    # Nor does their gradient.
    leaves = [f.detach().requires_grad_() for f in features]
    out = pool(leaves, boxes, valid, impl=impl)
    grad = torch.ones_like(out)
    clean = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    grad.view(2, -1, 5, 3, 3)[~valid] = poison
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out, leaves, grad), clean, strict=True))


def test_no_valid_slots(runner):
    impl, device = runner
    features, boxes, valid = inputs(slots=3, device=device)
    actual = differentiate(features, boxes, torch.zeros_like(valid), impl=impl)
    assert not any(g.any() for g in actual)


def test_boxes_have_no_gradient(runner):
    features, boxes, valid = inputs(slots=3, device=runner[1])
    pool([f.requires_grad_() for f in features], boxes.requires_grad_(), valid, impl=runner[0]).sum().backward()
    assert boxes.grad is None


def test_an_image_is_the_same_alone(runner):
    impl, device = runner
    features, boxes, valid = inputs(3, here(9, 3), device=device)
    together = differentiate(features, boxes, valid, impl=impl)[0]
    alone = pool([f[1:2] for f in features], boxes[1:2], valid[1:2], impl=impl)
    assert torch.equal(together.view(3, -1, 5, 3, 3)[1], alone)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "f32"])
def test_maps_beyond_two_to_the_31(tmp_path, runner, dtype):
    if runner[1] != "cpu":
        pytest.skip("a sparse file is in the CPU's memory")
    # A sparse file: gigabytes of addresses, a few pages of disk. 32-bit products of row and width wrap.
    height, width, channels = 2**14 + 8, 2**14, 8
    path, count = str(tmp_path / "sparse"), height * width * channels
    map_ = torch.from_file(path, shared=True, size=count, dtype=dtype).view(1, height, width, channels)
    map_[0, -6:, -6:] = 3.0
    feature = map_.permute(0, 3, 1, 2)
    box = torch.tensor([[[width - 4.0, height - 4.0, width - 2.0, height - 2.0]]])
    out = roi_align_levels([feature], box, torch.ones(1, 1, dtype=torch.bool), 2, [1.0], impl=runner[0])
    assert torch.equal(out, torch.full_like(out, 3.0))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("place", [(1, 0, 1), (0, 1, 0)])
def test_debug_mode_names_bad_sizes(monkeypatch, impl, place):
    monkeypatch.setenv("MIMDET_DEBUG_KERNELS", "1")
    features, boxes, valid = inputs(slots=3, levels=2)
    sizes = torch.tensor([[[10, 11], [2, 15]], [[6, 6], [1, 8]]])
    pool(features, boxes, valid, sizes=sizes, impl=impl)
    sizes[place] = 31 * place[0]
    with pytest.raises(ValueError, match=rf"sizes\[{place[0]}\]\[{place[1]}, {place[2]}\] is {31 * place[0]}, outside"):
        pool(features, boxes, valid, sizes=sizes, impl=impl)


def test_cpp_never_reads_outside(cpp):
    features, boxes, valid = inputs(slots=3, levels=1)
    with pytest.raises(RuntimeError, match=r"sizes\[0, 1\] is 24, 30, outside of 1 .. 23 and 1 .. 30"):
        pool(features, boxes, valid, sizes=torch.tensor([[[23, 30], [24, 30]]]), impl="cpp")
    # Levels that the public function never makes.
    levels = torch.tensor([[4, -7, 0]] * 2, dtype=torch.int32)
    out = ops.run(features, boxes, levels, None, 3, [0.25], 0, "cpp").reshape(2, 3, -1)
    assert not out[:, :2].any()
    assert out[:, 2].any()


MAPS, BOXES, VALID = [torch.zeros(2, 8, 6, 6), torch.zeros(2, 8, 3, 3)], torch.zeros(2, 5, 4), torch.ones(2, 5) > 0
GOOD = {"features": MAPS, "boxes": BOXES, "valid": VALID, "size": 2, "scales": [0.25, 0.125]}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"features": MAPS[0]}, TypeError, "features must be a list of tensors, got Tensor"),
        ({"features": []}, TypeError, "features must be a list of tensors"),
        ({"features": [MAPS[0], 3]}, TypeError, r"features\[1\] must be a tensor, got int"),
        ({"features": [MAPS[0], MAPS[1].int()]}, TypeError, r"features\[1\] must be of a float dtype"),
        ({"features": [MAPS[0], MAPS[1].half()]}, TypeError, r"features\[1\] must be torch.float32 like features\[0\]"),
        ({"features": [MAPS[0], MAPS[1][0]]}, ValueError, r"features\[1\] must be \(B, C, H, W\), got \(8, 3, 3\)"),
        ({"features": [MAPS[0], MAPS[1][:1]]}, ValueError, r"features\[1\] must be \(2, 8, 'H', 'W'\) like"),
        ({"features": [MAPS[0], MAPS[1][..., :0]]}, ValueError, r"features\[1\] must have rows and columns"),
        ({"boxes": BOXES[0]}, ValueError, r"boxes must be \(2, S, 4\), got \(5, 4\)"),
        ({"boxes": BOXES[:1]}, ValueError, r"boxes must be \(2, S, 4\), got \(1, 5, 4\)"),
        ({"boxes": BOXES.int()}, TypeError, "boxes must be of a float dtype"),
        ({"valid": VALID.int()}, TypeError, "valid must be bool, got torch.int32"),
        ({"valid": VALID[:, :4]}, ValueError, r"valid must be \(2, 5\), got \(2, 4\)"),
        ({"scales": [0.25]}, ValueError, "scales must have 2 numbers like features, got 1"),
        ({"scales": [0.25, 0.25]}, ValueError, "scales must be 1/4, 1/8, ... each half"),
        ({"scales": [0.3, 0.15]}, ValueError, "scales must be 1/4, 1/8"),
        ({"scales": [0.0, 0.0]}, ValueError, "scales must be 1/4, 1/8"),
        ({"scales": [2.0, 1.0]}, ValueError, "scales must be 1/4, 1/8"),
        ({"size": 0}, ValueError, "size must be positive"),
        ({"sampling_ratio": -1}, ValueError, "size must be positive and sampling_ratio not negative, got 2 and -1"),
        ({"sizes": torch.ones(2, 2, 2)}, TypeError, "sizes must be int32 or int64"),
        ({"sizes": torch.ones(2, 2).int()}, ValueError, r"sizes must be \(2, 2, 2\), got \(2, 2\)"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=f"roi_align_levels: {message}"):
        roi_align_levels(**GOOD | changes)


@native
@pytest.mark.parametrize(("levels", "size"), [(9, 2), (1, 65)], ids=["levels", "size"])
def test_what_gpu_kernels_do_not_take(levels, size):
    features, scales = [torch.zeros(1, 2, 4, 4)] * levels, [2.0**-i for i in range(levels)]
    with pytest.raises(KernelUnavailableError, match="at most 8 levels and 64 cells a side, got"):
        roi_align_levels(features, BOXES[:1], VALID[:1], size, scales, impl="triton")
    assert roi_align_levels(features, BOXES[:1], VALID[:1], size, scales).shape == (5, 2, size, size)


@needs_compiler
@pytest.mark.parametrize("capability", [80, 90], ids="sm_{}".format)
@pytest.mark.parametrize(
    ("channels", "dtype", "size", "areas"), [(256, BF16, 7, True), (256, F32, 14, False), (17, F32, 7, False)], ids=str
)
def test_compiles_within_the_budget(capability, channels, dtype, size, areas):
    from support.aot import compile_pair

    features, boxes, valid = inputs(channels=channels, dtype=dtype)
    sizes = torch.ones(4, 2, 2, dtype=torch.int32) if areas else None
    run = lambda: differentiate(features, boxes, valid, size, sizes=sizes, impl="triton")  # noqa: E731
    kernels = compile_pair(OP, capability, run)
    assert [one.name.split("_")[-2] for one in kernels] == ["axes", "fwd", "axes", "bwd"]
    for one in kernels:
        assert one.stack == 0, one
        assert one.registers <= 128, one
        if channels % 16 == 0 and "axes" not in one.name:
            assert one.stores_16, one
            assert one.loads_16 or "bwd" in one.name, one
