import json
import os
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from mimdet.checkpoint.read import CheckpointError
from mimdet.config import LazyCall, to_yaml
from mimdet.config.trusted import TRUSTED
from mimdet.data import COCO_CATEGORIES, DataError, DatasetMapper, ResizeShortestEdge
from mimdet.predict import Predictor, find_pictures, predict_files, read_picture

RED = (250, 10, 10)


class RedBoxDetector(torch.nn.Module):
    """Stands for a detector: finds the red pixels, twice with falling scores, and nothing in other pictures."""

    def __init__(self, num_classes=3, roi_heads=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def forward(self, images, output_sizes):
        assert not self.training
        return [self._detect(image, *size) for image, size in zip(images, output_sizes, strict=True)]

    def _detect(self, image, height, width):
        self.seen.append(tuple(image.shape))
        red = (image[0] > 200) & (image[2] < 100)
        count = 2 if red.any() else 0
        ys, xs = red.nonzero().unbind(1) if count else (torch.zeros(1), torch.zeros(1))
        sx, sy = width / image.shape[2], height / image.shape[1]
        box = torch.stack([xs.min() * sx, ys.min() * sy, (xs.max() + 1) * sx, (ys.max() + 1) * sy])
        mask = torch.nn.functional.interpolate(red[None, None].float(), size=(height, width))[0].bool()
        return {
            "boxes": box.repeat(2, 1)[:count],
            "scores": torch.tensor([0.9, 0.3])[:count],
            "labels": torch.tensor([2, 0])[:count],
            "masks": mask.repeat(2, 1, 1)[:count],
        }


def config(num_classes=3, image_format="RGB"):
    cfg = OmegaConf.create(flags={"allow_objects": True})
    cfg.model = LazyCall(RedBoxDetector)(roi_heads={"num_classes": num_classes})
    cfg.dataloader = {
        "test": {
            "mapper": LazyCall(DatasetMapper)(
                is_train=False,
                augmentations=[LazyCall(ResizeShortestEdge)(short_edge_length=64, max_size=100)],
                image_format=image_format,
            )
        }
    }
    return cfg


META = {"classes": ["ball", "cube", "cone"], "category_ids": [4, 9, 11]}


def weights(folder, meta=None):
    path = Path(folder) / "model.pth"
    torch.save({"model": {"weight": torch.ones(1)}, **({"meta": meta} if meta else {})}, path)
    return path


@pytest.fixture
def predictor(tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    return Predictor(config(), weights(folder, META), device="cpu")


def picture(width=120, height=80, box=(30, 20, 60, 50)):
    pixels = np.full((height, width, 3), 128, dtype=np.uint8)
    x0, y0, x1, y1 = box
    pixels[y0:y1, x0:x1] = RED
    return Image.fromarray(pixels)


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


@pytest.mark.parametrize("form", ["path", "str", "pil", "array", "tensor"])
def test_every_form_of_a_picture_gives_the_same(tmp_path, predictor, form):
    path = save(picture(), tmp_path / "a.png")
    array = np.asarray(picture())
    given = {
        "path": path,
        "str": str(path),
        "pil": picture(),
        "array": array,
        "tensor": torch.from_numpy(array.copy()).permute(2, 0, 1),
    }[form]
    result = predictor(given)
    assert result["class_names"] == ["cone"]
    assert result["labels"].tolist() == [2]
    assert result["scores"].tolist() == pytest.approx([0.9])
    assert result["masks"].shape == (1, 80, 120)
    np.testing.assert_allclose(result["boxes"], [[30, 20, 60, 50]], atol=1.5)
    assert predictor.model.seen == [(3, 64, 96)]
    assert predictor.model.weight.item() == 1


def test_files_are_turned_as_their_exif_says(tmp_path, predictor):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    path = save(picture(), tmp_path / "a.png", exif=exif)
    result = predictor(path)
    assert result["masks"].shape == (1, 120, 80)
    np.testing.assert_allclose(result["boxes"], [[30, 30, 60, 60]], atol=1.5)


def test_bgr_models_get_bgr(tmp_path):
    # seen in BGR, a blue patch is red
    blue = Image.fromarray(np.asarray(picture())[:, :, ::-1].copy())
    predictor = Predictor(config(image_format="BGR"), weights(tmp_path, META), device="cpu")
    assert predictor(blue)["class_names"] == ["cone"]
    assert predictor(picture())["class_names"] == []


def test_score_threshold(tmp_path):
    predictor = Predictor(config(), weights(tmp_path, META), device="cpu", score_threshold=0.3)
    assert predictor(picture())["class_names"] == ["cone", "ball"]
    assert predictor(picture())["boxes"].shape == (2, 4)


@pytest.mark.parametrize(
    ("meta", "num_classes", "first", "last"),
    [
        (META, 3, ("ball", 4), ("cone", 11)),
        (META, 80, ("ball", 4), ("cone", 11)),
        (None, 80, ("person", 1), ("toothbrush", 90)),
        (None, 3, ("class_0", 1), ("class_2", 3)),
    ],
    ids=["checkpoint", "checkpoint-over-config", "coco", "unknown"],
)
def test_class_names(tmp_path, meta, num_classes, first, last):
    predictor = Predictor(config(num_classes), weights(tmp_path, meta), device="cpu")
    pairs = list(zip(predictor.classes, predictor.category_ids, strict=True))
    assert (pairs[0], pairs[-1]) == (first, last)
    assert len(pairs) == (len(COCO_CATEGORIES) if meta is None and num_classes == 80 else 3)


def test_config_from_a_file_or_from_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setitem(TRUSTED, "model", TRUSTED["model"] | {f"{__name__}.RedBoxDetector"})
    text = to_yaml(config())
    (tmp_path / "config.yaml").write_text(text)
    overrides = ["dataloader.test.mapper.augmentations.0.short_edge_length=32"]
    for cfg, meta in ((tmp_path / "config.yaml", META), (None, {**META, "config": text})):
        predictor = Predictor(cfg, weights(tmp_path, meta), device="cpu", overrides=overrides)
        assert predictor(picture())["class_names"] == ["cone"]
        assert predictor.model.seen == [(3, 32, 48)]
    for nothing in ({}, {"config": ""}):
        with pytest.raises(CheckpointError, match="carries no config"):
            Predictor(None, weights(tmp_path, {**META, **nothing}))


def test_the_given_config_is_left_alone(tmp_path):
    cfg = config(num_classes=80)
    Predictor(cfg, weights(tmp_path, META), device="cpu", overrides=["model.num_classes=7"])
    assert cfg == config(num_classes=80)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    torch.save({"model": {"other": torch.ones(1)}}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"model\.pth does not fit"):
        Predictor(config(), tmp_path / "model.pth", device="cpu")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8), dtype=np.uint8), r"array must be uint8 \(H, W, 3\), got uint8 \(8, 8\)"),
        (np.zeros((8, 8, 3), dtype=np.float32), r"array must be uint8 \(H, W, 3\), got float32"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"tensor must be uint8 \(3, H, W\)"),
        (np.zeros((0, 8, 3), dtype=np.uint8), "no pixels"),
        (Image.new("I;16", (8, 8)), "more than 8 bits"),
    ],
    ids=["gray-array", "float-array", "tensor-hwc", "empty", "16-bit"],
)
def test_other_forms_are_refused(image, message):
    with pytest.raises(DataError, match=message):
        read_picture(image)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_8_bit_mode_becomes_rgb(tmp_path, mode):
    path = save(picture().convert(mode), tmp_path / "a.tif")
    assert read_picture(path).mode == "RGB"
    assert read_picture(path).size == (120, 80)


def written(folder):
    return sorted(path.name for path in folder.iterdir())


def test_folders_are_walked_and_results_written(tmp_path, predictor):
    save(picture(), tmp_path / "in" / "a.png")
    save(picture(700, 660), tmp_path / "in" / "deep" / "b.JPG", format="JPEG")
    save(picture(box=(0, 0, 0, 0)), tmp_path / "in" / "nothing.webp", lossless=True)
    save(picture(), tmp_path / "in" / ".hidden.png")
    (tmp_path / "in" / "notes.txt").write_text("not a picture")
    out = tmp_path / "out"
    report = predict_files(tmp_path / "in", out, predictor, progress=False)
    assert written(out) == ["a.png", "b.png", "nothing.png", "predictions.json"]
    assert report.skipped == []
    assert sorted(report.drawings) == sorted(out / f"{name}.png" for name in ("a", "b", "nothing"))
    predictions = json.loads(report.predictions.read_text())
    assert [(Path(p["file_name"]).name, p["image_id"]) for p in predictions] == [("a.png", 1), ("b.JPG", 3)]
    assert (predictions[0]["category_id"], predictions[0]["category_name"]) == (11, "cone")
    assert predictions[0]["bbox"] == pytest.approx([30, 20, 30, 30], abs=3)
    assert predictions[0]["segmentation"]["size"] == [80, 120]
    assert mask_util.area(predictions[0]["segmentation"]) == pytest.approx(900, rel=0.1)
    assert Image.open(out / "a.png").size == (640, 427)  # enlarged
    assert Image.open(out / "b.png").size == (700, 660)


def test_same_names_do_not_overwrite_one_another(tmp_path, predictor):
    inputs = [tmp_path / part for part in ("x/a.png", "y/a.png", "y/A.bmp", "z/y/a.png", "z/y_a.png", "z/b.png")]
    for path in inputs:
        save(picture(), path)
    report = predict_files(inputs, tmp_path / "out", predictor, progress=False)
    names = [path.name.casefold() for path in report.drawings]
    assert len(set(names)) == len(inputs)
    assert len(written(tmp_path / "out")) == len(inputs) + 1
    assert names[0] == "x_a.png"
    assert names[-1] == "b.png"


def test_inputs_are_never_overwritten(tmp_path, predictor):
    path = save(picture(), tmp_path / "a.png")
    before = path.read_bytes()
    report = predict_files([path, path], tmp_path, predictor, progress=False)
    assert path.read_bytes() == before
    assert [drawing.name for drawing in report.drawings] == ["a_2.png"]
    with pytest.raises(DataError, match="both input and output"):
        predict_files(tmp_path, tmp_path, predictor, progress=False)


def test_a_second_run_does_not_take_drawings_for_inputs(tmp_path, predictor):
    save(picture(), tmp_path / "a.png")
    for _ in range(2):
        predict_files(tmp_path, tmp_path / "out", predictor, progress=False)
    assert written(tmp_path / "out") == ["a.png", "predictions.json"]


def test_unreadable_files_are_skipped_and_named(tmp_path, predictor, caplog):
    good = save(picture(), tmp_path / "in" / "good.png")
    (tmp_path / "in" / "cut.png").write_bytes(good.read_bytes()[:100])
    (tmp_path / "in" / "empty.jpg").write_bytes(b"")
    (tmp_path / "in" / "text.jpg").write_text("hello")
    save(Image.fromarray(np.zeros((9, 9), dtype=np.uint16)), tmp_path / "in" / "deep.png")
    report = predict_files(tmp_path / "in", tmp_path / "out", predictor, progress=False)
    assert [path.name for path, _ in report.skipped] == ["cut.png", "deep.png", "empty.jpg", "text.jpg"]
    assert [path.name for path in report.drawings] == ["good.png"]
    for name in ("cut.png", "deep.png", "empty.jpg", "text.jpg"):
        assert name in caplog.text
    good.unlink()
    with pytest.raises(DataError, match=r"none of the 4 pictures can be read.*cut\.png"):
        predict_files(tmp_path / "in", tmp_path / "out2", predictor, progress=False)
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError], ids=["ctrl-c", "error"])
def test_what_was_done_is_kept(tmp_path, predictor, error):
    for name in "abc":
        save(picture(), tmp_path / "in" / f"{name}.png")
    detect = predictor.model.forward

    def fail_at_the_third(*args, **kwargs):
        if len(predictor.model.seen) == 2:
            raise error
        return detect(*args, **kwargs)

    predictor.model.forward = fail_at_the_third
    with pytest.raises(error):
        predict_files(tmp_path / "in", tmp_path / "out", predictor, progress=False)
    assert written(tmp_path / "out") == ["a.png", "b.png", "predictions.json"]
    predictions = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [Path(p["file_name"]).name for p in predictions] == ["a.png", "b.png"]


def test_nothing_found_is_an_error(tmp_path):
    (tmp_path / "notes.txt").write_text("not a picture")
    with pytest.raises(DataError, match=r"no pictures found.*\.jpeg"):
        find_pictures([tmp_path])
    with pytest.raises(DataError, match="no input given"):
        find_pictures([])
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*missing\.jpg"):
        find_pictures([tmp_path / "missing.jpg"])


def test_a_picture_given_twice_is_found_once(tmp_path):
    path = save(picture(), tmp_path / "in" / "a.png")
    save(picture(), tmp_path / "in" / "b.dat", format="PNG")
    assert find_pictures([path, tmp_path / "in", tmp_path / "in" / "b.dat"]) == [path, tmp_path / "in" / "b.dat"]


def test_progress_bar_counts_the_pictures(tmp_path, predictor, capsys, monkeypatch):
    monkeypatch.setitem(os.environ, "COLUMNS", "100")
    save(picture(), tmp_path / "in" / "a.png")
    predict_files(tmp_path / "in", tmp_path / "out", predictor)
    assert "100%" in capsys.readouterr().out
