"""The synthetic dataset: format, exact masks, determinism, safety of existing files."""

import errno
import json

import numpy as np
import pytest
import shapely
from PIL import Image

from mimdet.data import CocoDataset, DataError, DatasetMapper, synthetic
from mimdet.data.synthetic import CLASSES, MIN_VISIBLE, generate_shapes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return generate_shapes(tmp_path_factory.mktemp("data") / "shapes", num_train=30, num_val=5, image_size=(64, 96))


def load(root, split, **options):
    return CocoDataset(json_file=root / "annotations" / f"instances_{split}.json", image_root=root / split, **options)


def test_loads_as_coco(root, caplog):
    train, val = load(root, "train", filter_empty=False), load(root, "val", filter_empty=False)
    assert (len(train), len(val)) == (30, 5)
    assert train.classes == list(CLASSES)
    assert not caplog.records, "no instance may be skipped"
    assert set(np.concatenate([record["labels"] for record in train])) == {0, 1, 2, 3}
    sample = DatasetMapper(True, [])(train[0], None)
    assert sample["image"].shape[1:] == tuple(train.sizes[0])


def test_images_vary_in_size(root):
    sizes = load(root, "train").sizes
    assert ((sizes >= 64) & (sizes <= 96)).all()
    assert 0 < (sizes[:, 1] > sizes[:, 0]).mean() < 1


def test_boxes_and_areas_belong_to_the_masks(root):
    dataset = load(root, "train")
    for annotation in dataset.coco.anns.values():
        shapes = [shapely.Polygon(np.reshape(p, (-1, 2))) for p in annotation["segmentation"]]
        x, y, width, height = annotation["bbox"]
        assert shapely.union_all(shapes).bounds == pytest.approx((x, y, x + width, y + height), abs=0.02)
        assert sum(shape.area for shape in shapes) == pytest.approx(annotation["area"], abs=1)


def test_masks_are_what_is_drawn(monkeypatch):
    """Each instance's color is inside its visible mask and nowhere else."""
    colors = np.eye(3)
    colors = np.concatenate([colors, 1 - colors, [[1, 1, 1], [1, 0.4, 0], [0, 0.4, 1]]])
    checked = 0
    for seed in range(12):
        height, width = 120, 150
        scene = synthetic._scene(np.random.default_rng(seed), height, width)
        order = iter(range(len(scene) - 1, -1, -1))
        monkeypatch.setattr(synthetic, "_contrasting", lambda *_: colors[next(order)])  # noqa: B023
        monkeypatch.setattr(synthetic, "_fill", lambda rng, color, shape: color)
        canvas = np.zeros((height, width, 3))
        synthetic._draw(canvas, scene, np.random.default_rng(0))
        norms = np.linalg.norm(canvas, axis=2, keepdims=True)
        unit = colors / np.linalg.norm(colors, axis=1, keepdims=True)
        owner = np.where(norms[..., 0] > 0.1, (canvas / norms.clip(1e-9) @ unit.T).argmax(axis=2), -1)
        y, x = np.mgrid[:height, :width] + 0.5
        for number, (_, shape, visible) in enumerate(scene):
            inside = shapely.contains_xy(visible.buffer(-1), x, y)
            hidden = shapely.contains_xy(shape, x, y) & ~shapely.contains_xy(visible.buffer(2), x, y)
            assert (owner[inside] == number).all()
            # Where two others meet, anti-aliasing may mix their colors to this one's.
            assert (owner[hidden] == number).sum() <= 0.05 * hidden.sum()
            checked += inside.sum()
    assert checked > 10_000


def test_scenes_overlap_and_split_but_stay_visible():
    scenes = [synthetic._scene(np.random.default_rng(seed), 128, 160) for seed in range(60)]
    shapes = [entry for scene in scenes for entry in scene]
    share = np.array([visible.area / shape.area for _, shape, visible in shapes])
    assert share.min() >= MIN_VISIBLE
    assert 0.1 < (share < 0.95).mean() < 0.7
    assert any(len(synthetic.flat_polygons(visible)) > 1 for _, _, visible in shapes)
    for scene in scenes:
        parts = [visible for _, _, visible in scene]
        assert shapely.union_all(parts).area == pytest.approx(sum(part.area for part in parts), rel=1e-6)
    counts = np.bincount([label for label, _, _ in shapes], minlength=len(CLASSES))
    assert counts.min() > 0.15 * counts.sum()
    diameters = [np.sqrt(visible.area) for _, _, visible in shapes]
    assert min(diameters) < 12
    assert max(diameters) > 50


def test_images_depend_on_the_seed_alone(root, tmp_path):
    again = generate_shapes(tmp_path / "again", num_train=3, num_val=5, image_size=(64, 96))
    other = generate_shapes(tmp_path / "other", num_train=3, num_val=0, image_size=(64, 96), seed=1)
    for name in ("train/000002.jpg", "val/000004.jpg"):
        assert (again / name).read_bytes() == (root / name).read_bytes()
    assert (other / "train/000002.jpg").read_bytes() != (root / "train/000002.jpg").read_bytes()
    assert (root / "train/000002.jpg").read_bytes() != (root / "val/000002.jpg").read_bytes()


def test_complete_set_is_kept(root):
    before = (root / "train/000000.jpg").stat().st_mtime_ns
    generate_shapes(root, num_train=30, num_val=5, image_size=(64, 96))
    assert (root / "train/000000.jpg").stat().st_mtime_ns == before


def test_other_files_are_never_overwritten(root, tmp_path):
    with pytest.raises(DataError, match="holds a dataset made with"):
        generate_shapes(root, num_train=31, num_val=5, image_size=(64, 96))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(DataError, match="not a synthetic dataset"):
        generate_shapes(tmp_path / "mine", num_train=1, num_val=1)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_interrupted_generation_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic, "_draw", fail)
    with pytest.raises(KeyboardInterrupt):
        generate_shapes(tmp_path / "shapes", num_train=1, num_val=1)
    assert list(tmp_path.iterdir()) == []


def test_set_finished_by_another_process_is_accepted(tmp_path, monkeypatch):
    root = tmp_path / "shapes"
    draw = synthetic._draw

    def meanwhile(*arguments):
        monkeypatch.setattr(synthetic, "_draw", draw)
        generate_shapes(root, num_train=1, num_val=1)
        draw(*arguments)

    monkeypatch.setattr(synthetic, "_draw", meanwhile)
    generate_shapes(root, num_train=1, num_val=1)
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]
    parameters = json.loads((root / "shapes.json").read_text())
    assert (parameters["num_train"], parameters["seed"]) == (1, 0)
    assert Image.open(root / "val/000000.jpg").mode == "RGB"


def test_a_full_disk_names_the_folder(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(synthetic, "_write_split", full)
    with pytest.raises(OSError, match=r"No space left on device, .* free: '.*shapes'"):
        synthetic.generate_shapes(tmp_path / "shapes", 1, 1)
    assert not list(tmp_path.iterdir())
