"""Augmentations, against recorded sizes, pixels and polygons."""

import json

import numpy as np
import pytest
import shapely
from PIL import Image
from support.fill_weights import image
from support.paths import RECORDINGS

from mimdet.data import DataError
from mimdet.data.transforms import (
    MAX_PIXELS,
    AugmentationList,
    FixedSizeCrop,
    RandomApply,
    RandomCrop,
    RandomFlip,
    ResizeScale,
    ResizeShortestEdge,
    clip_targets,
    crop_polygon,
    crop_targets,
    flat_polygons,
    mask_boxes,
)

GOLDEN = json.loads((RECORDINGS / "resize_crop.json").read_text())


def make_image():
    return Image.fromarray(image(301, 40, 60).astype(np.uint8).transpose(1, 2, 0))


def make_targets(*rectangles):
    """Targets whose polygons are the outlines of their boxes."""
    boxes = np.array(rectangles, dtype=np.float64).reshape(-1, 4)
    masks = [[np.array([x0, y0, x1, y0, x1, y1, x0, y1])] for x0, y0, x1, y1 in boxes]
    return {"boxes": boxes, "labels": np.arange(len(boxes)), "masks": masks}


def rng(seed=0):
    return np.random.default_rng(seed)


def area(polygons):
    return sum(shapely.Polygon(polygon.reshape(-1, 2)).area for polygon in polygons)


@pytest.mark.parametrize(
    ("key", "length", "max_size"),
    [("short800_max1333", 800, 1333), ("short480_max1333", 480, 1333), ("short400_nomax", 400, None)],
)
def test_target_sizes(key, length, max_size):
    for size, expected in GOLDEN[key].items():
        height, width = map(int, size.split("x"))
        assert ResizeShortestEdge.output_size(height, width, length, max_size) == tuple(expected), size


@pytest.mark.parametrize(("height", "width"), [(60, 90), (25, 37), (40, 60)])
def test_resized_pixels(height, width):
    expected = np.load(RECORDINGS / "resize_pixels.npz")[f"resized_{height}x{width}"]
    # A cap gives the one recorded size that a shortest edge alone would round to 25x38.
    resized, _ = ResizeShortestEdge(height, max_size=width)(make_image(), None, rng())
    np.testing.assert_array_equal(np.asarray(resized), expected)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1, 1), (800, 800)), ((3000, 1), (1333, 1)), ((1, 3000), (1, 1333)), ((10000, 3), (1333, 1))],
    ids=str,
)
def test_thin_images_keep_a_pixel(size, expected):
    width, height = size
    targets = make_targets((0, 0, width, height), (0, 0, 0.5, 0.5))
    resized, moved = ResizeShortestEdge(800, 1333)(Image.new("RGB", size), targets, rng())
    assert resized.size == expected
    moved = clip_targets(moved, *resized.size)
    assert moved["boxes"][0].tolist() == [0, 0, *expected]
    assert len(moved["boxes"]) == len(moved["masks"]) == 2
    assert moved["masks"][0][0].reshape(-1, 2).max(axis=0).tolist() == list(expected)


@pytest.mark.parametrize(("height", "width"), [(1, 3000), (3, 10000), (3000, 1)])
def test_thin_images_do_not_become_huge(height, width):
    # without a cap of the longer side these had 0.5 to 1.1 thousand million pixels
    new_height, new_width = ResizeShortestEdge.output_size(height, width, 600)
    assert 0.99 * MAX_PIXELS < new_height * new_width < 1.01 * MAX_PIXELS
    assert new_height / new_width == pytest.approx(height / width, rel=0.01)


def test_an_image_without_pixels_is_refused():
    with pytest.raises(DataError, match="no pixels: it is 0x5"):
        AugmentationList([ResizeShortestEdge(80)])(Image.new("RGB", (0, 5)), None, rng())


def test_resize_moves_targets():
    targets = make_targets((6, 4, 30, 20))
    resized, moved = ResizeShortestEdge(80)(make_image(), targets, rng())
    assert resized.size == (120, 80)
    assert moved["boxes"].tolist() == [[12, 8, 60, 40]]
    assert moved["masks"][0][0].tolist() == [12, 8, 60, 8, 60, 40, 12, 40]
    assert targets["boxes"].tolist() == [[6, 4, 30, 20]], "the input must not change"


@pytest.mark.parametrize(
    ("style", "lengths", "expected"),
    [("choice", (20, 30, 70), {20, 30, 70}), ("range", (20, 23), {20, 21, 22, 23})],
)
def test_resize_draws_the_length(style, lengths, expected):
    resize, generator = ResizeShortestEdge(lengths, sample_style=style), rng()
    assert {resize(make_image(), None, generator)[0].height for _ in range(60)} == expected


def test_horizontal_flip():
    flipped, targets = RandomFlip(prob=1.0)(make_image(), make_targets((6, 4, 30, 20)), rng())
    np.testing.assert_array_equal(np.asarray(flipped), np.asarray(make_image())[:, ::-1])
    assert targets["boxes"].tolist() == [[30, 4, 54, 20]]
    assert targets["masks"][0][0].tolist() == [54, 4, 30, 4, 30, 20, 54, 20]


def test_vertical_flip():
    flipped, targets = RandomFlip(horizontal=False, vertical=True, prob=1.0)(
        make_image(), make_targets((6, 4, 30, 20)), rng()
    )
    np.testing.assert_array_equal(np.asarray(flipped), np.asarray(make_image())[::-1])
    assert targets["boxes"].tolist() == [[6, 20, 30, 36]]


@pytest.mark.parametrize("prob", [0.0, 0.3, 1.0])
def test_probability(prob):
    generator = rng()
    flips = [RandomFlip(prob=prob)(make_image(), make_targets((0, 0, 9, 9)), generator)[1] for _ in range(300)]
    share = np.mean([targets["boxes"][0, 0] != 0 for targets in flips])
    assert share == pytest.approx(prob, abs=0.08 if 0 < prob < 1 else 0)
    generator = rng()
    apply = RandomApply(AugmentationList([ResizeShortestEdge(20)]), prob)
    share = np.mean([apply(make_image(), None, generator)[0].height == 20 for _ in range(300)])
    assert share == pytest.approx(prob, abs=0.08 if 0 < prob < 1 else 0)


@pytest.mark.parametrize("key", ["crop_polygon", "crop_polygon_split"])
def test_cropped_polygons(key):
    polygon = np.array(GOLDEN[key]["polygon"]).reshape(-1)
    parts = crop_polygon(polygon, *GOLDEN[key]["crop_xywh"])
    assert [part.reshape(-1, 2).tolist() for part in parts] == GOLDEN[key]["result"]


def test_polygon_inside_the_window_is_only_moved():
    assert crop_polygon(np.array([5.0, 5, 9, 5, 5, 9]), 5, 3, 10, 10)[0].tolist() == [0, 2, 4, 2, 0, 6]


@pytest.mark.parametrize(("x", "y"), [(10, 0), (0, 10), (50, 50)])
def test_polygon_outside_the_window_vanishes(x, y):
    assert crop_polygon(np.array([0.0, 0, 10, 0, 10, 10, 0, 10]), x, y, 10, 10) == []


def test_self_crossing_polygon_keeps_both_lobes():
    bow_tie = np.array([0.0, 0, 20, 20, 20, 0, 0, 20])
    assert area(crop_polygon(bow_tie, 5, 0, 100, 100)) == pytest.approx(200 - 75)


def test_holes_are_cut_open():
    ring = shapely.box(0, 0, 20, 20) - shapely.box(4, 4, 8, 8) - shapely.box(12, 10, 18, 18)
    parts = flat_polygons(ring)
    shapes = [shapely.Polygon(part.reshape(-1, 2)) for part in parts]
    assert area(parts) == pytest.approx(ring.area)
    assert shapely.union_all(shapes).symmetric_difference(ring).area == pytest.approx(0)


def test_boxes_are_clipped_but_not_fitted_to_polygons():
    # Half of the triangle's box remains, of the triangle only a smaller part.
    targets = make_targets((0, 0, 20, 20))
    targets["masks"] = [[np.array([0.0, 0, 20, 0, 0, 20])]]
    cropped = clip_targets(crop_targets(targets, 10, 5, 30, 30), 30, 30)
    assert cropped["boxes"].tolist() == [[0, 0, 10, 15]]
    assert cropped["masks"][0][0].reshape(-1, 2)[:, 1].max() == 5


def test_instances_without_box_or_polygon_are_dropped():
    targets = make_targets((0, 0, 20, 20), (0, 0, 10, 10), (0, 0, 10 + 5e-6, 20), (5, 5, 15, 15))
    targets["masks"][3] = [np.array([5.0, 5, 9, 5, 5, 15])]  # its box reaches the window, its mask does not
    cropped = clip_targets(crop_targets(targets, 10, 0, 30, 30), 30, 30)
    assert cropped["labels"].tolist() == [0]
    assert len(cropped["masks"]) == len(cropped["boxes"]) == 1


def test_clipping_without_masks_or_instances():
    kept = clip_targets({"boxes": np.array([[-5.0, 0, 70, 20]]), "labels": np.array([3])}, 60, 40)
    assert kept["boxes"].tolist() == [[0, 0, 60, 20]]
    assert len(clip_targets(make_targets(), 60, 40)["boxes"]) == 0


def test_crop_image_and_targets_agree():
    whole = make_image()
    crop, generator = RandomCrop("absolute_range", (10, 30)), rng(3)
    x, y, width, height = crop.window(40, 60, rng(3))
    cropped, targets = crop(whole, make_targets((0, 0, 60, 40)), generator)
    np.testing.assert_array_equal(np.asarray(cropped), np.asarray(whole)[y : y + height, x : x + width])
    assert targets["boxes"].tolist() == [[-x, -y, 60 - x, 40 - y]]


@pytest.mark.parametrize(
    ("height", "width", "heights", "widths"),
    [(40, 60, (20, 25), (20, 25)), (22, 60, (20, 22), (20, 25)), (10, 60, (10, 10), (20, 25))],
    ids=["inside", "high limited", "lower than lowest"],
)
def test_crop_windows_cover_the_range(height, width, heights, widths):
    crop, generator = RandomCrop("absolute_range", (20, 25)), rng()
    windows = np.array([crop.window(height, width, generator) for _ in range(3000)])
    x, y, w, h = windows.T
    assert set(h) == set(range(heights[0], heights[1] + 1))
    assert set(w) == set(range(widths[0], widths[1] + 1))
    assert (x.min(), y.min()) == (0, 0)
    assert ((x + w).max(), (y + h).max()) == (width, height)
    assert np.bincount(w)[widths[0] :] / len(w) == pytest.approx(1 / (widths[1] - widths[0] + 1), abs=0.03)


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        ((480, 640), 1.0, (768, 1024)),
        ((640, 480), 0.5, (512, 384)),
        ((427, 640), 1.7, (1161, 1741)),  # 1161.44 and 1740.8
        ((4, 1000), 0.1, (1, 102)),
    ],
    ids=str,
)
def test_resize_scale_fits_the_target(size, scale, expected):
    assert ResizeScale(0.1, 2.0, 1024, 1024).output_size(*size, scale) == expected


def test_resize_scale_draws_the_scale_and_moves_targets():
    resize, generator = ResizeScale(0.1, 2.0, 80, 80), rng()
    widths = []
    for _ in range(200):
        resized, moved = resize(make_image(), make_targets((6, 4, 30, 20)), generator)
        widths.append(resized.width)
        scale = np.array([resized.width / 60, resized.height / 40] * 2)
        np.testing.assert_allclose(moved["boxes"][0], np.array([6, 4, 30, 20]) * scale)
    assert min(widths) < 12 < 150 < max(widths)
    assert 8 <= min(widths) <= max(widths) <= 160
    assert np.mean(widths) == pytest.approx(80 * 1.05, rel=0.1)


def test_fixed_size_crop_crops_pads_or_both():
    whole = np.asarray(make_image())
    places = set()
    for seed in range(40):
        cropped, targets = FixedSizeCrop((50, 30))(make_image(), make_targets((0, 0, 60, 40)), rng(seed))
        x = round(rng(seed).random() * 30)
        places.add(x)
        pixels = np.asarray(cropped)
        np.testing.assert_array_equal(pixels[:40], whole[:, x : x + 30])
        assert pixels.shape == (50, 30, 3)
        assert (pixels[40:] == 128).all()
        assert targets["boxes"].tolist() == [[-x, 0, 60 - x, 40]]
    assert len(places) > 15


def test_fixed_size_crop_without_padding_and_targets():
    cropped, targets = FixedSizeCrop((50, 30), pad=False)(make_image(), None, rng())
    assert cropped.size == (30, 40)
    assert targets is None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ResizeShortestEdge((1, 2, 3)), "short_edge_length"),
        (lambda: ResizeShortestEdge((3, 2)), "short_edge_length"),
        (lambda: ResizeShortestEdge(10, sample_style="uniform"), "sample_style"),
        (lambda: ResizeShortestEdge((), sample_style="choice"), "short_edge_length"),
        (lambda: ResizeShortestEdge(0), "short_edge_length"),
        (lambda: ResizeShortestEdge(2.5), "short_edge_length"),
        (lambda: ResizeShortestEdge("8"), "short_edge_length"),
        (lambda: ResizeShortestEdge(10**30), "short_edge_length"),
        (lambda: RandomFlip(prob=1.5), "prob"),
        (lambda: RandomApply(None, -0.1), "prob"),
        (lambda: RandomCrop("relative", (0.5, 0.5)), "crop_"),
        (lambda: RandomCrop("absolute_range", (30, 20)), "crop_"),
        (lambda: ResizeScale(0, 2, 8, 8), "min_scale"),
        (lambda: ResizeScale(2, 1, 8, 8), "min_scale"),
        (lambda: FixedSizeCrop((0, 8)), "crop_size"),
    ],
    ids=range(15),
)
def test_bad_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_boxes_are_judged_in_float32():
    """A width of 2e-5 at x = 600 rounds to 0 in float32: its regression target would be infinite."""
    targets = make_targets((600, 0, 600 + 2e-5, 9), (0, 0, 2e-5, 9))
    kept = clip_targets(targets, 700, 40)
    assert kept["boxes"].dtype == np.float32
    assert kept["labels"].tolist() == [1]


def test_mask_boxes_are_tight():
    masks = [[np.array([1.0, 2, 5, 2, 5, 9]), np.array([3.0, 1, 8, 4, 7, 7])], [np.array([0.5, 0, 2, 0, 2, 3])]]
    assert mask_boxes(masks).tolist() == [[1, 1, 8, 9], [0.5, 0, 2, 3]]
    assert mask_boxes([]).shape == (0, 4)
    assert mask_boxes([[], masks[1]]).tolist() == [[0, 0, 0, 0], [0.5, 0, 2, 3]]


def test_masks_follow_the_image_through_the_whole_pipeline():
    """A bright rectangle on black stays where the polygons are."""
    pixels = np.zeros((200, 300, 3), np.uint8)
    pixels[60:150, 100:220] = 255
    resize, crop = ResizeShortestEdge((160, 220), sample_style="choice"), RandomCrop("absolute_range", (120, 200))
    last = ResizeShortestEdge((200, 240, 280), sample_style="choice", max_size=400)
    augment = AugmentationList([RandomFlip(), RandomApply(AugmentationList([resize, crop]), 0.5), last])
    generator = rng(1)
    for _ in range(20):
        result, targets = augment(Image.fromarray(pixels), make_targets((100, 60, 220, 150)), generator)
        targets = clip_targets(targets, result.width, result.height)
        bright = np.asarray(result)[..., 0] > 127
        if not len(targets["boxes"]):
            assert bright.mean() < 0.01
            continue
        rows, columns = np.where(bright)
        extent = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        np.testing.assert_allclose(targets["boxes"][0], extent, atol=1.5)
        assert area(targets["masks"][0]) == pytest.approx(bright.sum(), rel=0.03)


def test_randomness_comes_from_the_generator_alone():
    augment = AugmentationList([RandomFlip(), ResizeShortestEdge((20, 60)), RandomCrop("absolute_range", (10, 30))])
    np.random.seed(0)
    state = np.random.get_state()[1].copy()
    first, second = (np.asarray(augment(make_image(), None, rng(5))[0]) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(np.random.get_state()[1], state)


@pytest.mark.parametrize("max_size", [0, -1, float("nan"), "8", [8]])
def test_resize_refuses_a_cap(max_size):
    with pytest.raises(ValueError, match="max_size must be positive, or None"):
        ResizeShortestEdge(8, max_size)


@pytest.mark.parametrize("build", [lambda x: AugmentationList([x]), RandomApply])
def test_what_cannot_be_called_is_no_augmentation(build):
    with pytest.raises(TypeError, match="'RandomFlip' cannot be"):
        build("RandomFlip")


def test_a_flip_is_told_its_axis_by_true_or_false():
    with pytest.raises(ValueError, match="must be true or false, got 'yes' and False"):
        RandomFlip(horizontal="yes")
