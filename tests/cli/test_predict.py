import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file
from support.paths import TESTS

from mimdet.checkpoint.read import CheckpointError
from mimdet.config import LazyCall, to_yaml
from mimdet.config.trusted import TRUSTED
from mimdet.data import COCO_CATEGORIES, DataError, DatasetMapper, ResizeShortestEdge
from mimdet.predict import Predictor, find_images, open_image, predict_files
from mimdet.visualize import save_png

RED = (250, 10, 10)


class RedBoxDetector(torch.nn.Module):
    """A detector that finds the red pixels, twice with falling scores, and nothing in other images."""

    def __init__(self, num_classes=3, roi_heads=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def forward(self, images, output_sizes, paste=True):
        assert not self.training
        assert not paste
        return [self._detect(image, *size) for image, size in zip(images, output_sizes, strict=True)]

    def _detect(self, image, height, width):
        self.seen.append(tuple(image.shape))
        red = (image[0] > 200) & (image[2] < 100)
        count = 2 if red.any() else 0
        ys, xs = red.nonzero().unbind(1) if count else (torch.zeros(1), torch.zeros(1))
        sx, sy = width / image.shape[2], height / image.shape[1]
        box = torch.stack([xs.min() * sx, ys.min() * sy, (xs.max() + 1) * sx, (ys.max() + 1) * sy])
        return {
            "boxes": box.repeat(2, 1)[:count],
            "scores": torch.tensor([0.9, 0.3])[:count],
            "labels": torch.tensor([2, 0])[:count],
            "mask_probabilities": torch.ones(2, 28, 28)[:count],
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


def sample(width=120, height=80, box=(30, 20, 60, 50)):
    pixels = np.full((height, width, 3), 128, dtype=np.uint8)
    x0, y0, x1, y1 = box
    pixels[y0:y1, x0:x1] = RED
    return Image.fromarray(pixels)


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


@pytest.mark.parametrize("kind", ["path", "str", "pil", "array", "tensor"])
def test_every_kind_of_image_gives_the_same(tmp_path, predictor, kind):
    path = save(sample(), tmp_path / "a.png")
    array = np.asarray(sample())
    request = {
        "path": path,
        "str": str(path),
        "pil": sample(),
        "array": array,
        "tensor": torch.from_numpy(array.copy()).permute(2, 0, 1),
    }[kind]
    result = predictor(request)
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
    path = save(sample(), tmp_path / "a.png", exif=exif)
    result = predictor(path)
    assert result["masks"].shape == (1, 120, 80)
    np.testing.assert_allclose(result["boxes"], [[30, 30, 60, 60]], atol=1.5)


def test_bgr_models_get_bgr(tmp_path):
    # seen in BGR, a blue patch is red
    blue = Image.fromarray(np.asarray(sample())[:, :, ::-1].copy())
    predictor = Predictor(config(image_format="BGR"), weights(tmp_path, META), device="cpu")
    assert predictor(blue)["class_names"] == ["cone"]
    assert predictor(sample())["class_names"] == []


def test_score_threshold(tmp_path):
    predictor = Predictor(config(), weights(tmp_path, META), device="cpu", score_threshold=0.3)
    assert predictor(sample())["class_names"] == ["cone", "ball"]
    assert predictor(sample())["boxes"].shape == (2, 4)


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
        assert predictor(sample())["class_names"] == ["cone"]
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
        (Image.new("RGB", (0, 0)), "no pixels: 0x0"),
        (Image.new("L", (0, 7)), "no pixels: 0x7"),
    ],
    ids=["gray-array", "float-array", "tensor-hwc", "empty", "16-bit", "empty-pil", "no-columns"],
)
def test_other_kinds_are_refused(image, message):
    with pytest.raises(DataError, match=message):
        open_image(image)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_8_bit_mode_becomes_rgb(tmp_path, mode):
    path = save(sample().convert(mode), tmp_path / "a.tif")
    assert open_image(path).mode == "RGB"
    assert open_image(path).size == (120, 80)


def written(folder):
    return sorted(path.name for path in folder.iterdir())


def test_folders_are_walked_and_results_written(tmp_path, predictor):
    save(sample(), tmp_path / "in" / "a.png")
    save(sample(700, 660), tmp_path / "in" / "deep" / "b.JPG", format="JPEG")
    save(sample(box=(0, 0, 0, 0)), tmp_path / "in" / "nothing.webp", lossless=True)
    save(sample(), tmp_path / "in" / ".hidden.png")
    (tmp_path / "in" / "notes.txt").write_text("not an image")
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
        save(sample(), path)
    report = predict_files(inputs, tmp_path / "out", predictor, progress=False)
    names = [path.name.casefold() for path in report.drawings]
    assert len(set(names)) == len(inputs)
    assert len(written(tmp_path / "out")) == len(inputs) + 1
    assert names[0] == "x_a.png"
    assert names[-1] == "b.png"


def test_names_that_cannot_be_written_are_changed(tmp_path, predictor):
    names = [125 * "ä" + "1", 125 * "ä" + "2", "folder"]
    for name in names:
        save(sample(), tmp_path / "in" / f"{name}.png")
    (tmp_path / "out" / "folder.png").mkdir(parents=True)
    report = predict_files(tmp_path / "in", tmp_path / "out", predictor, progress=False)
    assert report.skipped == []
    assert [path.name for path in report.drawings] == ["folder_2.png", f"{100 * 'ä'}.png", f"{100 * 'ä'}_2.png"]


def test_inputs_are_never_overwritten(tmp_path, predictor):
    path = save(sample(), tmp_path / "a.png")
    before = path.read_bytes()
    report = predict_files([path, path], tmp_path, predictor, progress=False)
    assert path.read_bytes() == before
    assert [drawing.name for drawing in report.drawings] == ["a_2.png"]
    with pytest.raises(DataError, match="both input and output"):
        predict_files(tmp_path, tmp_path, predictor, progress=False)


def test_a_second_run_does_not_take_drawings_for_inputs(tmp_path, predictor):
    save(sample(), tmp_path / "a.png")
    for _ in range(2):
        predict_files(tmp_path, tmp_path / "out", predictor, progress=False)
    assert written(tmp_path / "out") == ["a.png", "predictions.json"]


def test_unreadable_files_are_skipped_and_named(tmp_path, predictor, caplog):
    good = save(sample(), tmp_path / "in" / "good.png")
    (tmp_path / "in" / "cut.png").write_bytes(good.read_bytes()[:100])
    (tmp_path / "in" / "empty.jpg").write_bytes(b"")
    (tmp_path / "in" / "text.jpg").write_text("hello")
    save(Image.fromarray(np.zeros((9, 9), dtype=np.uint16)), tmp_path / "in" / "deep.png")
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "in" / "pipe.png")
    names = ["cut.png", "deep.png", "empty.jpg", "link.png", "pipe.png", "text.jpg"]
    report = predict_files(tmp_path / "in", tmp_path / "out", predictor, progress=False)
    assert [path.name for path, _ in report.skipped] == names
    assert [path.name for path in report.drawings] == ["good.png"]
    for name in names:
        assert name in caplog.text
    good.unlink()
    with pytest.raises(DataError, match=r"none of the 6 images can be processed.*cut\.png"):
        predict_files(tmp_path / "in", tmp_path / "out2", predictor, progress=False)
    assert json.loads((tmp_path / "out2" / "predictions.json").read_text()) == []


def three_images(tmp_path):
    for name in "abc":
        save(sample(), tmp_path / "in" / f"{name}.png")
    return tmp_path / "in"


def fail_at(predictor, number, error):
    """Let the detection of an image, counted from 0, raise ``error``."""
    detect, calls = predictor.model.forward, []

    def forward(*args, **kwargs):
        calls.append(1)
        if len(calls) == number + 1:
            raise error
        return detect(*args, **kwargs)

    predictor.model.forward = forward


def files_with_objects(report):
    return [Path(detection["file_name"]).name for detection in json.loads(report.read_text())]


@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt(), torch.AcceleratorError("CUDA error: an illegal memory access")],
    ids=["ctrl-c", "broken-gpu"],
)
def test_what_was_done_is_kept(tmp_path, predictor, error):
    fail_at(predictor, 2, error)
    with pytest.raises(type(error)):
        predict_files(three_images(tmp_path), tmp_path / "out", predictor, progress=False)
    assert written(tmp_path / "out") == ["a.png", "b.png", "predictions.json"]
    assert files_with_objects(tmp_path / "out" / "predictions.json") == ["a.png", "b.png"]


def test_a_full_disk_ends_the_run_and_names_the_file(tmp_path, predictor, monkeypatch):
    def fail_for_b(image, path):
        if path.name == "b.png":
            raise OSError(errno.ENOSPC, "No space left on device")
        save_png(image, path)

    monkeypatch.setattr("mimdet.predict.save_png", fail_for_b)
    with pytest.raises(OSError, match=r"cannot write .*out/b\.png: No space left"):
        predict_files(three_images(tmp_path), tmp_path / "out", predictor, progress=False)
    assert files_with_objects(tmp_path / "out" / "predictions.json") == ["a.png", "b.png"]


@pytest.mark.parametrize(
    "error",
    [
        ValueError("height and width must be > 0"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] can't allocate memory\nframe #0"),
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        ZeroDivisionError("division by zero"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_image_that_cannot_be_detected_is_skipped_and_named(tmp_path, predictor, caplog, error):
    fail_at(predictor, 1, error)
    report = predict_files(three_images(tmp_path), tmp_path / "out", predictor, progress=False)
    assert written(tmp_path / "out") == ["a.png", "c.png", "predictions.json"]
    assert files_with_objects(report.predictions) == ["a.png", "c.png"]
    ((path, reason),) = report.skipped
    assert path.name == "b.png"
    assert f"{path} cannot be processed: {type(error).__name__}" in reason
    assert "\n" not in reason
    assert reason in caplog.text
    assert str(report) == "2 objects in 2 of 2 images"


def test_detections_stay_where_drawing_fails(tmp_path, predictor, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("no font")

    monkeypatch.setattr("mimdet.predict.draw_instances", fail)
    report = predict_files(three_images(tmp_path), tmp_path / "out", predictor, progress=False)
    assert files_with_objects(report.predictions) == ["a.png", "b.png", "c.png"]
    assert report.drawings == []
    assert [reason.split(" cannot be ")[1] for _, reason in report.skipped] == ["drawn: ValueError: no font"] * 3


@pytest.mark.parametrize("size", [(3000, 1), (1, 3000), (10000, 3), (1, 1)], ids=str)
def test_thin_images_do_not_lose_the_others(tmp_path, predictor, size):
    save(sample(*size, box=(0, 0, *size)), three_images(tmp_path) / "aa.png")
    report = predict_files(tmp_path / "in", tmp_path / "out", predictor, progress=False)
    assert {"a.png", "b.png", "c.png"} <= {drawing.name for drawing in report.drawings}
    assert len(report.drawings) + len(report.skipped) == 4


def test_names_with_line_breaks_are_drawn_and_kept(tmp_path):
    classes = ["ball\nred", "a\x00b", "tra\x1bffic\r\n\tcone \ud800" + 500 * "x"]
    predictor = Predictor(config(), weights(tmp_path, {**META, "classes": classes}), device="cpu", score_threshold=0)
    report = predict_files(three_images(tmp_path), tmp_path / "out", predictor, progress=False)
    assert report.skipped == []
    assert len(report.drawings) == 3
    names = {detection["category_name"] for detection in json.loads(report.predictions.read_text())}
    assert names == {classes[0], classes[2]}


def test_the_output_is_checked_first(tmp_path, predictor):
    folder = three_images(tmp_path)
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match=r"cannot write to .*: .*/file is not a folder"):
            predict_files(folder, output, predictor, progress=False)
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(0o555)
    if not os.access(tmp_path / "locked", os.W_OK):  # root may write anywhere
        with pytest.raises(PermissionError, match="no right to write"):
            predict_files(folder, tmp_path / "locked" / "new", predictor, progress=False)
    assert predictor.model.seen == []


def test_a_threshold_below_the_configs_own_is_said(tmp_path, caplog):
    cfg = config()
    cfg.model.roi_heads.box_predictor = [{"test_score_thresh": 0.05}, {"test_score_thresh": 0.2}]
    for threshold in (0.5, 0.2):
        Predictor(cfg, weights(tmp_path, META), device="cpu", score_threshold=threshold)
    assert caplog.text == ""
    Predictor(cfg, weights(tmp_path, META), device="cpu", score_threshold=0.1)
    assert "the config finds nothing below 0.2" in caplog.text
    assert "override model.roi_heads.box_predictor.1.test_score_thresh=0.1\n" in caplog.text
    for threshold in (-0.1, float("nan")):
        with pytest.raises(ValueError, match=r"score_threshold must be in \[0, 1\]"):
            Predictor(cfg, weights(tmp_path, META), device="cpu", score_threshold=threshold)


def test_an_unknown_device_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match="'banana' is not a device: use auto, cpu, cuda"):
        Predictor(config(), tmp_path / "missing.pth", device="banana")


def test_safetensors_hold_weights_too(tmp_path):
    save_file({"weight": torch.ones(1)}, tmp_path / "model.safetensors")
    assert Predictor(config(), tmp_path / "model.safetensors", device="cpu").model.weight.item() == 1
    with pytest.raises(CheckpointError, match="carries no config"):
        Predictor(None, tmp_path / "model.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-2])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors cannot be read"):
        Predictor(config(), tmp_path / "cut.safetensors")


MANY_MASKS = """
import resource, sys, tracemalloc
from pathlib import Path
import numpy as np
import torch
from PIL import Image
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/cli"]
from test_predict import META, config, weights
from mimdet.predict import Predictor, predict_files

class Many:
    def __call__(self, images, output_sizes, paste):
        ((height, width),) = output_sizes
        corners = torch.rand(100, 2, generator=torch.Generator().manual_seed(0)) * 0.3
        boxes = torch.cat([corners, 1 - corners.flip(1)], 1) * torch.tensor([width, height]).repeat(2)
        found = {"boxes": boxes, "scores": torch.ones(100), "labels": torch.zeros(100).long()}
        return [{**found, "mask_probabilities": torch.ones(100, 28, 28)}]

folder = Path(sys.argv[2])
predictor = Predictor(config(), weights(folder, META), device="cpu", score_threshold=0)
predictor.model = Many()
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "small.png")
predict_files(folder / "small.png", folder / "out", predictor, progress=False)
before = peak()
size = int(sys.argv[3])
Image.new("RGB", (size, size)).save(folder / "large.png")
report = predict_files(folder / "large.png", folder / "out", predictor, progress=False)
assert report.objects == {folder / "large.png": 100}, report
print((peak() - before) * 1024 / size**2)
"""


def test_memory_does_not_grow_with_the_number_of_masks(tmp_path):
    """100 masks of an image held at once would be 100 bytes a pixel, and twice that while they are encoded."""
    command = [sys.executable, "-c", MANY_MASKS, str(TESTS), str(tmp_path), "1200"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 100


def test_nothing_found_is_an_error(tmp_path):
    (tmp_path / "notes.txt").write_text("not an image")
    with pytest.raises(DataError, match=r"no images found.*\.jpeg"):
        find_images([tmp_path])
    with pytest.raises(DataError, match="no input given"):
        find_images([])
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*missing\.jpg"):
        find_images([tmp_path / "missing.jpg"])


def test_an_image_given_twice_is_found_once(tmp_path):
    path = save(sample(), tmp_path / "in" / "a.png")
    save(sample(), tmp_path / "in" / "b.dat", format="PNG")
    assert find_images([path, tmp_path / "in", tmp_path / "in" / "b.dat"]) == [path, tmp_path / "in" / "b.dat"]


def test_progress_bar_counts_the_images(tmp_path, predictor, capsys, monkeypatch):
    monkeypatch.setitem(os.environ, "COLUMNS", "100")
    save(sample(), tmp_path / "in" / "a.png")
    predict_files(tmp_path / "in", tmp_path / "out", predictor)
    assert "100%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": 5}, r"meta\.classes is not a list of names: 5"),
        ({"classes": "ball"}, r"meta\.classes is not a list of names: 'ball'"),
        ({"classes": []}, r"meta\.classes is not a list of names"),
        ({"classes": [1, 2, 3]}, r"meta\.classes is not a list of names"),
        ({"category_ids": [1]}, r"meta\.category_ids is not a number for each class: \[1\]"),
        ({"category_ids": ["a", "b", "c"]}, r"meta\.category_ids is not a number for each class"),
        ({"category_ids": 4}, r"meta\.category_ids is not a number for each class: 4"),
    ],
)
def test_classes_of_a_checkpoint_are_checked(tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        Predictor(config(), weights(tmp_path, {**META, **change}), device="cpu")


@pytest.mark.parametrize("text", ["{}", "model: 5", "model: {}\ndataloader: {}", "model: {}\ndataloader: null"])
def test_a_config_without_the_needed_sections_is_named(tmp_path, text):
    file = weights(tmp_path, {**META, "config": text})
    with pytest.raises(ValueError, match=rf"{file.name}: its config has no section (model|dataloader\.test\.mapper)"):
        Predictor(None, file, device="cpu")
