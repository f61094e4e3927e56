"""Parts of the detector, and input that it refuses."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.fill_weights import fill_module
from support.slots import sizes_of, truth_of

from mimdet.config import instantiate
from mimdet.detection import (
    Box2BoxTransform,
    DefaultAnchorGenerator,
    MaskRCNNConvUpsampleHead,
    Matcher,
    ROIPooler,
    StandardRPNHead,
)
from mimdet.detection import masks as detection_masks
from mimdet.detection.assignment import clip_boxes, nonempty, sample_slots, subsample_labels, top_scores
from mimdet.detection.layers import get_norm
from mimdet.detection.masks import paste_in_parts, paste_masks
from mimdet.evaluation.results import encode_masks
from mimdet.modeling import ShapeSpec
from mimdet.polygons import PackedPolygons
from mimdet.testing import tiny_config
from mimdet.testing.small import make_images, target


def random_boxes(count, size=100.0):
    corner, side = torch.rand(count, 2) * size, torch.rand(count, 2) * size + 1
    return torch.cat([corner, corner + side], dim=1)


def test_box_coding_goes_there_and_back_and_stays_finite():
    torch.manual_seed(0)
    coder = Box2BoxTransform((10, 10, 5, 5))
    source, boxes = random_boxes(50), random_boxes(50)
    torch.testing.assert_close(coder.apply_deltas(coder.get_deltas(source, boxes), source), boxes, atol=1e-3, rtol=0)
    assert coder.apply_deltas(torch.zeros(0, 8), torch.zeros(0, 4)).shape == (0, 8)
    assert coder.apply_deltas(torch.tensor([[0.0, 0.0, 500.0, 500.0]]), random_boxes(1)).isfinite().all()


def test_boxes_clip_and_emptiness():
    boxes = torch.tensor([[-5.0, 2.0, 30.0, 40.0], [50.0, 50.0, 60.0, 60.0]])
    clipped = clip_boxes(boxes[None], sizes_of([(20, 25)]))
    assert clipped.tolist() == [[[0, 2, 25, 20], [25, 20, 25, 20]]]
    assert nonempty(clipped).tolist() == [[True, False]]


def test_anchors_follow_cells_and_areas():
    anchors = DefaultAnchorGenerator([[32], [64]], [0.5, 1.0, 2.0], [8, 16], offset=0.0)
    first, second = anchors([torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 1, 2)])
    assert first.shape == (2 * 3 * 3, 4)
    assert second.shape == (2 * 3, 4)
    torch.testing.assert_close(first[1], torch.tensor([-16.0, -16.0, 16.0, 16.0]))
    torch.testing.assert_close(first[4] - first[1], torch.tensor([8.0, 0.0, 8.0, 0.0]))
    size = first[:, 2:] - first[:, :2]
    torch.testing.assert_close(size.prod(1), torch.full((18,), 1024.0))
    torch.testing.assert_close((size[:, 1] / size[:, 0])[:3], torch.tensor([0.5, 1.0, 2.0]))


def boxes_of(*rows):
    return {"boxes": torch.tensor(rows).view(-1, 4).float(), "labels": torch.zeros(len(rows), dtype=torch.int64)}


def test_matcher_bands_and_low_quality():
    # Overlaps with the first object: 0.1, 0.5, 0.8, 0; with the second, which is elsewhere: 0, 0, 0, 0.25.
    truth = truth_of([boxes_of([0, 0, 10, 10], [50, 0, 60, 10]), boxes_of()], masks=False)
    candidates = torch.tensor([[0.0, 0, 10, 1], [0, 0, 10, 5], [0, 0, 10, 8], [50, 0, 60, 2.5]])
    index, labels = Matcher([0.3, 0.7], [0, -1, 1])(truth, candidates)
    assert index.tolist() == [[0, 0, 0, 1], [0] * 4]
    assert labels.tolist() == [[0, -1, 1, 0], [0] * 4]
    # The second object's best candidate counts although its overlap is low.
    matcher = Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True)
    assert matcher(truth, candidates)[1].tolist() == [[0, -1, 1, 1], [0] * 4]


def test_subsample_counts_and_membership():
    torch.manual_seed(0)
    labels = torch.tensor([[1] * 30 + [0] * 50 + [-1] * 20, [1] * 2 + [0] * 98, [1] * 90 + [0] * 10])
    index, used = subsample_labels(labels, 40, 0.25, torch.rand(3, 100))
    chosen = labels.gather(1, index)
    assert [(int((chosen[i][used[i]] == 1).sum()), int((chosen[i][used[i]] == 0).sum())) for i in range(3)] == [
        (10, 30),
        (2, 38),
        (10, 10),
    ]
    for row, keep in zip(index, used, strict=True):
        assert len(row[keep].unique()) == int(keep.sum())


def test_subsample_takes_the_smallest_numbers_and_the_first_of_equals():
    labels = torch.tensor([[0, 0, 0, 1, 1, 1]])
    index, used = subsample_labels(labels, 3, 0.34, torch.tensor([[0.9, 0.1, 0.5, 0.3, 0.2, 0.8]]))
    assert index[used].tolist() == [4, 1, 2]
    index, used = subsample_labels(labels, 3, 0.34, torch.full((1, 6), 0.5))
    assert index[used].tolist() == [3, 0, 1]


def test_subsample_of_nothing():
    index, used = subsample_labels(torch.full((2, 0), 0), 8, 0.25, torch.rand(2, 0))
    assert used.sum() == 0
    assert index.shape == used.shape


def test_sampled_slots_are_the_subsample_without_gaps():
    torch.manual_seed(0)
    labels = torch.tensor([[1] * 30 + [0] * 50, [1] * 2 + [0] * 78, [1] * 70 + [0] * 10, [-1] * 79 + [0]])
    noise = torch.rand(labels.shape)
    index, used = sample_slots(labels, 40, 0.25, noise)
    assert index.shape == (4, 40)
    assert used.sum(1).tolist() == [40, 40, 20, 1]
    every, drawn = subsample_labels(labels, 40, 0.25, noise)
    for i in range(4):
        assert index[i][used[i]].tolist() == every[i][drawn[i]].tolist()
        assert used[i, : used[i].sum()].all()


def test_pooler_picks_levels_and_keeps_order():
    pooler = ROIPooler(7, (1 / 4, 1 / 8, 1 / 16, 1 / 32))
    sides = torch.tensor([300.0, 20.0, 120.0, 900.0, 60.0])
    boxes = torch.stack([torch.zeros(5), torch.zeros(5), sides, sides], dim=1)[None]
    levels = [torch.full((1, 2, 1024 // s, 1024 // s), i + 1.0) for i, s in enumerate((4, 8, 16, 32))]
    valid = torch.tensor([[True, True, True, True, False]])
    assert pooler(levels, boxes, valid)[:, 0, 3, 3].tolist() == [3, 1, 2, 4, 0]
    assert pooler(levels, boxes[:, :0], valid[:, :0]).shape == (0, 2, 7, 7)


@pytest.mark.parametrize(
    ("dims", "keys"), [([-1], {"conv.weight"}), ([-1, 8], {"conv.conv0.weight", "conv.conv1.weight"})]
)
def test_rpn_head_keys(dims, keys):
    head = StandardRPNHead(16, 3, conv_dims=dims)
    assert {k for k in head.state_dict() if k.startswith("conv") and k.endswith("weight")} == keys


def masks_of(*images):
    return truth_of([{**boxes_of(*[[0, 0, 1, 1]] * len(m)), "masks": m} for m in images]).masks


SQUARE = [np.array([10.0, 10, 50, 10, 50, 50, 10, 50])]


def bitmap_of_square(count=1):
    bitmap = torch.zeros(count, 64, 64, dtype=torch.bool)
    bitmap[:, 10:50, 10:50] = True
    return bitmap


def test_mask_targets_of_polygons_and_bitmaps_agree():
    boxes, index = torch.tensor([[[10.0, 10, 50, 50], [0, 0, 60, 60], [0, 0, 60, 60]]]), torch.zeros(1, 3).long()
    valid = torch.tensor([[True, True, False]])
    (from_polygons,), (from_bitmap,) = (
        masks_of(masks).targets(index, boxes, valid, 28) for masks in ([SQUARE], bitmap_of_square())
    )
    assert from_polygons[0].all()
    assert from_bitmap[0].all()
    assert (from_polygons[1] != from_bitmap[1]).float().mean() < 0.05
    assert not from_polygons[2].any()
    assert not from_bitmap[2].any()


def masks_of_three_images():
    """Polygons of two instances, none at all, and three; index and boxes of four slots each."""
    draw = np.random.default_rng(0)
    boxes = torch.from_numpy(draw.uniform(0, 10, (3, 4, 4)).astype(np.float32))
    boxes[..., 2:] += 40
    masks = [
        PackedPolygons.pack([[draw.uniform(0, 60, 10) for _ in range(k + 1)] for k in range(count)])
        for count in (2, 0, 3)
    ]
    valid = torch.tensor([[True, True, True, False], [False] * 4, [True] * 4])
    return masks, torch.tensor([[1, 0, 1, 0], [0] * 4, [2, 0, 1, 2]]), boxes, valid


def test_mask_targets_of_a_batch_are_those_of_its_images(monkeypatch):
    calls = []
    run = detection_masks.rasterize_polygons
    monkeypatch.setattr(detection_masks, "rasterize_polygons", lambda *a: calls.append(a) or run(*a))
    masks, *slots = masks_of_three_images()
    together = masks_of(*masks).targets(*slots, 28)
    assert len(calls) == 1
    for i, image in enumerate(masks):
        (alone,) = masks_of(image).targets(*(x[i : i + 1] for x in slots), 28)
        assert torch.equal(together[i], alone)
    assert torch.equal(together.any(dim=(2, 3)), slots[-1])


def test_mask_targets_of_polygons_beside_bitmaps():
    masks, *slots = masks_of_three_images()
    got = masks_of(*masks[:2], bitmap_of_square(3)).targets(*slots, 28)
    for images in (slice(0, 2), slice(2, 3)):
        alone = masks_of(*[*masks[:2], bitmap_of_square(3)][images]).targets(*(x[images] for x in slots), 28)
        assert torch.equal(got[images], alone)


@pytest.mark.parametrize("box", [[5.0, 5, 5, 9], [5.0, 5, 5.001, 5.001]], ids=["no-area", "tiny"])
def test_masks_of_degenerate_boxes(box):
    triangle = PackedPolygons.pack([[np.array([0.0, 0, 9, 0, 9, 9])]])
    every = torch.ones(1, 1, dtype=torch.bool)
    masks = masks_of(triangle).targets(torch.zeros(1, 1).long(), torch.tensor([[box]]), every, 28)
    assert masks.shape == (1, 1, 28, 28)


def test_pasted_mask_fills_its_box_only():
    mask = paste_masks(torch.ones(1, 28, 28), torch.tensor([[4.0, 6, 20, 16]]), (32, 40))[0]
    assert mask[6:16, 4:20].all()
    assert mask.sum() == 10 * 16


def some_detections(count=5, size=(37, 53)):
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values
    boxes = (1.2 * corners - 0.1).flatten(1) * torch.tensor([size[1], size[0]]).repeat(2)
    return torch.rand(count, 28, 28, generator=generator), boxes, size


@pytest.mark.parametrize("lines", [0, 1, 10])
def test_bands_do_not_change_pasted_masks(monkeypatch, lines):
    maps, boxes, size = some_detections()
    whole = paste_masks(maps, boxes, size)
    assert whole.any()
    monkeypatch.setattr("mimdet.detection.masks._CPU_PIXELS", lines * size[1])
    assert paste_masks(maps, boxes, size).equal(whole)


@pytest.mark.parametrize("together", [0, 2, 9])
def test_masks_pasted_in_parts_are_the_same(monkeypatch, together):
    maps, boxes, size = some_detections()
    monkeypatch.setattr("mimdet.detection.masks._PART_PIXELS", together * size[0] * size[1])
    parts = list(paste_in_parts(maps, boxes, size))
    assert [len(part) for part in parts] == {0: [1] * 5, 2: [2, 2, 1], 9: [5]}[together]
    assert torch.cat(parts).equal(paste_masks(maps, boxes, size))
    assert encode_masks(paste_in_parts(maps, boxes, size)) == encode_masks(torch.cat(parts))
    assert encode_masks(paste_in_parts(maps[:0], boxes[:0], size)) == []


@torch.no_grad()
def test_masks_can_be_left_unpasted(model):
    images, sizes = make_images(sizes=[(64, 96)]), [(128, 180)]
    (pasted,) = model.eval()(images, output_sizes=sizes)
    (soft,) = model(images, output_sizes=sizes, paste=False)
    assert len(soft["boxes"]) > 0
    assert soft.keys() == {"boxes", "scores", "labels", "mask_probabilities"}
    masks = paste_masks(soft.pop("mask_probabilities"), soft["boxes"], sizes[0])
    for key, value in {**soft, "masks": masks}.items():
        torch.testing.assert_close(value, pasted[key], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Matcher([0.7, 0.3], [0, -1, 1]), "matcher"),
        (lambda: Matcher([0.5], [0, -1, 1]), "matcher"),
        (lambda: Matcher([0.5], [0, 2]), "matcher"),
        (lambda: Matcher([0.0], [0, 1]), "matcher"),
        (lambda: ROIPooler(7, (1 / 4, 1 / 8), pooler_type="ROIAlign"), "pooler"),
        (lambda: ROIPooler(7, (1 / 4, 1 / 16)), "pooler"),
        (lambda: get_norm("XN", 8), "unknown norm 'XN'"),
    ],
    ids=range(7),
)
def test_bad_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.fixture(scope="module")
def model():
    model = instantiate(tiny_config("mimdet_b_mask_rcnn").model)
    fill_module(model)
    return model


def test_inference_is_reproducible_and_sorted(model):
    model.eval()
    with torch.no_grad():
        first, second = (model(make_images([(96, 128), (64, 64)])) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a["boxes"], b["boxes"])
        assert torch.equal(a["masks"], b["masks"])
        assert torch.equal(a["scores"], a["scores"].sort(descending=True).values)
        assert len(a["scores"]) <= 100
    assert first[1]["masks"].shape[1:] == (64, 64)


def test_uint8_and_float_images_are_the_same(model):
    model.eval()
    floats = make_images([(96, 128)])
    with torch.no_grad():
        a, b = model(floats)[0], model([floats[0].to(torch.uint8)])[0]
    assert torch.equal(a["scores"], b["scores"])


TINY = (64, 96)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, "non-empty list"),
        ({"images": [torch.zeros(64, 96)]}, r"images\[0\] must be \(3, H, W\)"),
        ({"images": [torch.zeros(4, 64, 96)]}, r"images\[0\] must be \(3, H, W\)"),
        ({"images": [np.zeros((3, 64, 96))]}, r"images\[0\] must be a tensor"),
        ({"images": [torch.zeros(3, 64, 96, dtype=torch.int64)]}, "uint8 or floating"),
        ({"targets": None}, "needs targets"),
        ({"targets": [{"boxes": torch.zeros(1, 4), "labels": torch.zeros(1)}]}, r"targets\[0\] has no masks"),
        ({"boxes": torch.zeros(1, 5)}, r"must be \(N, 4\)"),
        ({"boxes": torch.tensor([[5.0, 5, 5, 9]])}, r"\['boxes'\]\[0\] has no area"),
        ({"boxes": torch.tensor([[5.0, 5, float("nan"), 9]])}, "NaN"),
        ({"labels": torch.tensor([80])}, r"classes 0\.\.79"),
        ({"labels": torch.tensor([-1])}, r"classes 0\.\.79"),
        ({"labels": torch.tensor([1, 2])}, "1 boxes"),
        ({"masks": []}, "0 masks"),
        ({"masks": [[np.zeros(6), np.zeros(4)]]}, r"targets\[0\]\['masks'\]\[0\]\[1\] has 4 numbers"),
        ({"masks": [[np.zeros(7)]]}, r"\['masks'\]\[0\]\[0\] has 7 numbers"),
        ({"masks": [[[0, 0, 9, 0, float("nan"), 9]]]}, r"\['masks'\]\[0\]\[0\] holds NaN or infinity"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else None,
)
def test_bad_input_is_named(model, change, message):
    truth = target(5, TINY, 1)
    arguments = {"images": make_images([TINY]), "targets": [truth]}
    for key, value in change.items():
        (arguments if key in arguments else truth)[key] = value
    with pytest.raises((ValueError, TypeError), match=message):
        model.train()(**arguments)


def test_output_sizes_must_fit(model):
    with pytest.raises(ValueError, match="output_sizes"):
        model.eval()(make_images([TINY]), output_sizes=[(1, 1), (2, 2)])


@pytest.mark.parametrize("rows", [0, 5])
def test_the_mask_head_computes_each_rows_class_alone(rows):
    torch.manual_seed(0)
    head = MaskRCNNConvUpsampleHead(ShapeSpec(channels=6, height=4, width=4), num_classes=3, conv_dims=[8, 8])
    x = torch.randn(rows, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    classes = torch.tensor([2, 0, 2, 1, 0])[:rows]
    logits = head.double()(x, classes)
    maps = []
    hook = head.deconv.register_forward_hook(lambda module, inputs, output: maps.append(output))
    head(x, classes)
    hook.remove()
    expected = head.predictor(F.relu(maps[0]))[torch.arange(rows), classes]
    torch.testing.assert_close(logits, expected.float(), rtol=1e-6, atol=1e-7)
    inputs = (x, *head.predictor.parameters())
    weight = torch.randn(expected.shape)
    ours, theirs = (torch.autograd.grad((y * weight).sum(), inputs) for y in (logits, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_top_scores_have_one_order():
    """Of equal scores the earlier one comes first, -0 is 0, and NaN comes before all."""
    nan, inf = float("nan"), float("inf")
    scores = torch.tensor([[0.0, -inf, 1.0, -0.0, nan, -1e-45, inf, 1.0, -2.0]])
    values, index = top_scores(scores, 8)
    assert index.tolist() == [[4, 6, 2, 7, 0, 3, 5, 8]]
    torch.testing.assert_close(values, scores.gather(1, index), equal_nan=True, rtol=0, atol=0)
    coarse = torch.randint(-3, 4, (2, 5000)) / 7  # thousands of ties
    values, index = top_scores(coarse, 2000)
    expected = coarse.sort(dim=1, descending=True, stable=True)
    assert torch.equal(index, expected.indices[:, :2000])
    assert torch.equal(values, expected.values[:, :2000])
    assert top_scores(torch.zeros(2, 0), 5)[1].shape == (2, 0)
