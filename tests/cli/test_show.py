"""Pages of training samples and of what a detector computes."""

import pytest
import torch

from mimdet.config import load
from mimdet.data import DataError
from mimdet.data.synthetic import generate_shapes
from mimdet.show import _DROPPED, data_page, kept_tokens


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("show")
    generate_shapes(folder / "shapes", 4, 2)
    return folder


def config(shapes, *overrides, name="demo"):
    return load(name, [f"train.output_dir={shapes}", *overrides])


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_kept_tokens_are_the_share_of_the_image(ratio):
    kept = kept_tokens((100, 170), 16, ratio, seed=3)
    assert kept.shape == (7, 11)
    assert kept.sum() == int(77 * ratio)
    assert torch.equal(kept, kept_tokens((100, 170), 16, ratio, seed=3))
    assert ratio == 1.0 or not torch.equal(kept, kept_tokens((100, 170), 16, ratio, seed=4))


def test_kept_tokens_of_a_checkerboard():
    row, column = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    assert torch.equal(kept_tokens((64, 96), 16, 0.5, "grid"), (row + column) % 2 == 0)


def test_a_page_of_training_samples(shapes):
    page = data_page(config(shapes), count=3)
    assert page.dtype == torch.uint8
    assert page.shape[0] == 3
    assert page.shape[1] > 3 * 420  # annotations, samples, tokens
    assert torch.equal(page, data_page(config(shapes), count=3))
    assert page.shape != data_page(config(shapes), count=3, seed=1).shape or not torch.equal(
        page, data_page(config(shapes), count=3, seed=1)
    )


def test_a_lower_ratio_darkens_more(shapes):
    bright, dark = (data_page(config(shapes), count=2, ratio=ratio)[:, -400:].float().mean() for ratio in (1.0, 0.1))
    assert dark < bright * (1 + _DROPPED) / 2


def test_test_images_and_other_backbones_have_no_tokens(shapes):
    pages = [data_page(config(shapes), split="test"), data_page(config(shapes), count=2)]
    assert pages[0].shape[1] < pages[1].shape[1] / 2
    data = {
        f"dataloader.{split}.dataset.{key}": value
        for split, name in (("train", "train"), ("test", "val"))
        for key, value in {
            "names": "null",
            "json_file": shapes / f"shapes/annotations/instances_{name}.json",
            "image_root": shapes / "shapes" / name,
        }.items()
    }
    cfg = load("benchmarking_b_25ep", [f"{key}={value}" for key, value in data.items()])
    assert 800 < data_page(cfg, count=1).shape[1] < 1000  # annotations and samples
    with pytest.raises(ValueError, match="the config's backbone samples no tokens"):
        data_page(cfg, ratio=0.5)


def test_an_unreadable_image_is_named_and_left_out(tmp_path, caplog):
    generate_shapes(tmp_path / "shapes", 2, 1)
    broken = sorted((tmp_path / "shapes/train").iterdir())
    broken[0].write_bytes(b"no image")
    assert data_page(config(tmp_path), count=2).shape[2] < data_page(config(tmp_path), split="test").shape[2] * 2
    assert broken[0].name in caplog.text
    broken[1].write_bytes(b"no image")
    with pytest.raises(DataError, match="no image of the dataset can be shown"):
        data_page(config(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "val"}, "'val' is unknown; choose from train, test"),
        ({"count": 0}, "must be at least 1, got 0"),
        ({"ratio": 1.5}, r"keep ratio must be in \(0, 1\], got 1.5"),
    ],
)
def test_bad_arguments(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        data_page(config(shapes), **options)
