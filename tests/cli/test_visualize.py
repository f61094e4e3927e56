import itertools
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from mimdet.evaluation.results import encode_masks
from mimdet.visualize import (
    class_color,
    comparison_grid,
    draw_instances,
    image_grid,
    plot_training,
    polygons_to_masks,
    save_png,
)
from mimdet.visualize.curves import read_metrics, running_median

CLASSES = ["person", "traffic light"]


def gray(height, width):
    return torch.full((3, height, width), 100, dtype=torch.uint8)


def rectangle_mask(height, width, x0, y0, x1, y1):
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return mask


def test_class_colors_are_stable_distinct_and_visible():
    colors = [class_color(label) for label in range(80)]
    assert colors == [class_color(label) for label in range(80)]
    assert len(set(colors)) == 80
    assert all(max(color) - min(color) > 60 for color in colors)
    for first, second in itertools.pairwise(colors):
        assert math.dist(first, second) > 60


def test_mask_box_and_label_are_drawn_in_the_class_color():
    image = gray(700, 800)
    masks = rectangle_mask(700, 800, 200, 300, 400, 500)[None]
    drawn = draw_instances(
        image, torch.tensor([[200.0, 300.0, 500.0, 600.0]]), [1], CLASSES, scores=[0.9], masks=masks, alpha=0.5
    )
    color = torch.tensor(class_color(1))
    assert drawn.shape == image.shape
    assert drawn.dtype == torch.uint8
    assert drawn[:, 400, 300].tolist() == pytest.approx((0.5 * (color + 100)).tolist(), abs=1)  # mask
    assert drawn[:, 450, 500].tolist() == color.tolist()  # box
    assert drawn[:, 400, 399].tolist() == color.tolist()  # outline of the mask
    assert drawn[:, 285:299, 205:260].eq(color.view(3, 1, 1)).all(0).float().mean() > 0.3  # label
    assert drawn[:, 550, 450].tolist() == [100] * 3
    assert image.eq(100).all()


def test_overlapping_masks_keep_the_color_of_the_smaller_instance():
    masks = torch.stack([rectangle_mask(640, 640, 100, 100, 200, 200), rectangle_mask(640, 640, 50, 50, 600, 600)])
    boxes = torch.tensor([[100.0, 100.0, 200.0, 200.0], [50.0, 50.0, 600.0, 600.0]])
    drawn = draw_instances(gray(640, 640), boxes, torch.tensor([0, 1]), CLASSES, masks=masks, alpha=1.0)
    assert drawn[:, 180, 150].tolist() == list(class_color(0))
    assert drawn[:, 400, 400].tolist() == list(class_color(1))


def test_small_images_are_enlarged_and_large_ones_kept():
    boxes, labels = torch.tensor([[2.0, 2.0, 9.0, 9.0]]), [0]
    assert draw_instances(gray(30, 40), boxes, labels, CLASSES).shape == (3, 480, 640)
    assert draw_instances(gray(900, 700), boxes, labels, CLASSES).shape == (3, 900, 700)
    assert draw_instances(gray(30, 40), boxes, labels, CLASSES, scale=2).shape == (3, 60, 80)
    assert draw_instances(gray(30, 40), torch.zeros(0, 4), [], CLASSES).shape == (3, 480, 640)


@pytest.mark.parametrize(
    "box",
    [(0, 0, 20, 20), (620, 0, 640, 20), (0, 620, 20, 640), (600, 600, 640, 640), (-30, -30, 700, 700), (5, 5, 5, 5)],
    ids=["top-left", "top-right", "bottom-left", "bottom-right", "beyond", "empty"],
)
def test_labels_stay_inside_the_image(box):
    def letters(*corners):
        drawn = draw_instances(gray(640, 640), torch.tensor([corners]).float(), [1], ["x", "a long name"])
        return (drawn < 50).all(0).sum().item()

    assert letters(*box) == pytest.approx(letters(300, 300, 340, 340), rel=0.1)


def test_neighboring_labels_do_not_cover_each_other():
    boxes = torch.tensor([[300.0, 300.0, 340.0, 340.0]]).repeat(3, 1)
    drawn = draw_instances(gray(640, 640), boxes, [0, 1, 2], ["aaaaaaaa", "bbbbbbbb", "cccccccc"])
    sizes = []
    for label in range(3):
        alone = draw_instances(gray(640, 640), boxes[:1], [label], ["aaaaaaaa", "bbbbbbbb", "cccccccc"])
        color = torch.tensor(class_color(label)).view(3, 1, 1)
        sizes.append(((drawn == color).all(0).sum() / (alone == color).all(0).sum()).item())
    assert min(sizes) > 0.75


def test_polygons_are_filled_as_masks():
    square = np.array([10.0, 10, 20, 10, 20, 20, 10, 20])
    masks = polygons_to_masks([[square, square + 20], [square]], 60, 50)
    assert masks.shape == (2, 60, 50)
    assert masks.sum(dim=(1, 2)).tolist() == [200, 100]
    assert masks[0, 15, 15]
    assert masks[0, 35, 35]
    boxes = torch.tensor([[10.0, 10, 40, 40], [10, 10, 20, 20]])
    from_polygons = draw_instances(gray(60, 50), boxes, [0, 1], CLASSES, masks=[[square, square + 20], [square]])
    assert from_polygons.equal(draw_instances(gray(60, 50), boxes, [0, 1], CLASSES, masks=masks))


def test_rles_and_pil_images_give_the_same_drawing():
    masks = torch.stack([rectangle_mask(700, 90, 10, 10, 50, 60), rectangle_mask(700, 90, 5, 30, 80, 690)])
    boxes = torch.tensor([[10.0, 10, 50, 60], [5, 30, 80, 690]])
    noise = torch.randint(0, 256, (3, 700, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    drawn = draw_instances(noise, boxes, [0, 1], CLASSES, masks=masks)
    image = to_pil_image(noise)
    again = draw_instances(image, boxes, [0, 1], CLASSES, masks=encode_masks(masks))
    np.testing.assert_array_equal(np.asarray(again), drawn.permute(1, 2, 0))
    np.testing.assert_array_equal(np.asarray(image), noise.permute(1, 2, 0))
    with pytest.raises(ValueError, match=r"RLEs of size \(700, 90\) like the image, got \(90, 700\)"):
        draw_instances(noise, boxes, [0, 1], CLASSES, masks=encode_masks(masks.transpose(1, 2)))


def test_bands_of_rows_do_not_show(monkeypatch):
    masks = torch.stack([rectangle_mask(700, 90, 10, 10, 50, 60), rectangle_mask(700, 90, 5, 30, 80, 690)])
    boxes = torch.tensor([[10.0, 10, 50, 60], [5, 30, 80, 690]])
    whole = draw_instances(gray(700, 90), boxes, [0, 1], CLASSES, masks=masks)
    for rows in (1, 7):
        monkeypatch.setattr("mimdet.visualize.draw._BAND_PIXELS", 90 * rows)
        assert draw_instances(gray(700, 90), boxes, [0, 1], CLASSES, masks=masks).equal(whole)


@pytest.mark.parametrize("name", ["two\nlines", "a\x00b\x1b", "\ud800", 500 * "long ", "", 7], ids=range(6))
def test_every_name_can_be_drawn(name):
    drawn = draw_instances(gray(640, 640), torch.tensor([[10.0, 300, 200, 400]]), [0], [name], scores=[0.5])
    assert drawn.shape == (3, 640, 640)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.zeros(3, 20, 20)}, "image must be uint8"),
        ({"labels": [0]}, "2 boxes but 1 labels"),
        ({"labels": [0, 2]}, "labels run from 0 to 2, but there are 2 classes"),
        ({"scores": [0.5]}, "2 boxes but 1 scores"),
        ({"masks": torch.zeros(2, 20, 19, dtype=torch.bool)}, "masks must be"),
        ({"masks": [[np.zeros(6)]]}, "2 boxes but 1 masks"),
        ({"image": Image.new("L", (20, 20))}, "must be in RGB, got L"),
    ],
    ids=["float-image", "labels", "unknown-label", "scores", "mask-size", "masks", "gray-image"],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"image": gray(20, 20), "boxes": torch.zeros(2, 4), "labels": [0, 1], "classes": CLASSES}
    with pytest.raises(ValueError, match=message):
        draw_instances(**{**arguments, **change})


def test_grid_pairs_truth_and_prediction(tmp_path):
    images = [gray(300, 400), gray(300, 200), gray(150, 150)]
    target = {"boxes": torch.tensor([[20.0, 20.0, 90.0, 90.0]]), "labels": torch.tensor([0])}
    prediction = {
        "boxes": target["boxes"].repeat(2, 1),
        "labels": torch.tensor([1, 0]),
        "scores": torch.tensor([0.9, 0.2]),
    }
    path = tmp_path / "new" / "grid.png"
    grid = comparison_grid(
        images, [target] * 3, [prediction] * 3, CLASSES, captions=["a", "b", "c"], path=path, columns=2, height=240
    )
    assert Image.open(path).size == (grid.shape[2], grid.shape[1])
    # two bands, each a caption and two images high
    assert 4 * 240 < grid.shape[1] < 4 * 240 + 120
    assert 320 + 160 < grid.shape[2] < 320 + 160 + 80
    first_row, second_row = grid[:, : grid.shape[1] // 4], grid[:, grid.shape[1] // 4 : grid.shape[1] // 2]

    def shown(part, label):
        return (part == torch.tensor(class_color(label)).view(3, 1, 1)).all(0).any().item()

    assert (shown(first_row, 0), shown(first_row, 1)) == (True, False)
    assert (shown(second_row, 0), shown(second_row, 1)) == (False, True)


def test_grid_rejects_uneven_rows():
    with pytest.raises(ValueError, match="same, non-zero length"):
        image_grid([[gray(5, 5)], []])
    with pytest.raises(ValueError, match="same, non-zero length"):
        image_grid([])


def test_long_captions_are_cut_to_their_column():
    images = [[gray(200, 120), gray(200, 120)]]
    plain = image_grid(images, captions=["", ""])
    captioned = image_grid(images, captions=["a caption that is much longer than its column", ""])
    assert captioned.shape == plain.shape
    assert (captioned != plain).any(0).nonzero()[:, 1].max() < 120 + 8


def test_png_is_written_whole(tmp_path):
    image = torch.randint(0, 256, (3, 9, 7), dtype=torch.uint8)
    save_png(image, tmp_path / "folder" / "a.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "folder" / "a.png")), image.permute(1, 2, 0))
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["a.png"]


def training_line(iteration, total=2.0):
    return {"iteration": iteration, "total_loss": total, "loss_cls": total / 2, "loss_mask": total / 2, "lr": 1e-4}


def evaluation_line(iteration, ap=0.4):
    return {"iteration": iteration, "bbox/AP": ap, "bbox/AP50": 0.6, "segm/AP": None, "bbox_per_class/cat": ap}


def write_lines(path, lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def test_metrics_of_a_resumed_run_are_read_once(tmp_path, caplog):
    lines = [training_line(0), training_line(20), evaluation_line(20), training_line(40), evaluation_line(40)]
    lines += [training_line(20, 7.0), evaluation_line(20, 0.5), training_line(60), '{"iteration": 80, "tot']
    training, evaluations = read_metrics(write_lines(tmp_path / "metrics.jsonl", lines))
    assert [(line["iteration"], line["total_loss"]) for line in training] == [(0, 2.0), (20, 7.0), (60, 2.0)]
    assert [(line["iteration"], line["bbox/AP"]) for line in evaluations] == [(20, 0.5)]
    assert "line 9" in caplog.text


@pytest.mark.parametrize(
    "lines",
    [
        [{**training_line(i), **({} if i % 3 else {"loss_cls": None})} for i in range(50)] + [evaluation_line(49)],
        [{**training_line(i), "loss_mask": None} for i in range(9)],
        [training_line(0)],
        [evaluation_line(9), evaluation_line(19)],
    ],
    ids=["losses-and-evaluation", "loss-never-finite", "one-line", "evaluations-only"],
)
@pytest.mark.filterwarnings("error")
def test_curves_are_drawn(tmp_path, lines):
    plot_training(write_lines(tmp_path / "metrics.jsonl", lines), tmp_path / "plots" / "curves.png")
    pixels = np.asarray(Image.open(tmp_path / "plots" / "curves.png").convert("L"))
    assert pixels.shape[1] == 1200
    assert (pixels < 128).mean() > 0.003


def test_curves_need_metrics(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.jsonl has no losses"):
        plot_training(write_lines(tmp_path / "metrics.jsonl", [""]), tmp_path / "curves.png")


def test_running_median_passes_over_spikes_and_gaps():
    values = np.array([1.0, 1.0, 100.0, 1.0, np.nan, 1.0, 2.0, 2.0, 2.0])
    np.testing.assert_array_equal(running_median(values, 3), [1, 1, 1, 50.5, 1, 1.5, 2, 2, 2])
    np.testing.assert_array_equal(running_median(values, 1), values)
