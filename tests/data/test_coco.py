"""Annotation files, images, dataset names and the mapper."""

import json
import logging
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_utils

from mimdet.data import (
    COCO_CATEGORIES,
    CocoDataset,
    DataError,
    DatasetMapper,
    FixedSizeCrop,
    RandomFlip,
    ResizeShortestEdge,
    catalog,
    read_image,
    register,
)
from mimdet.data.annotations import _text_runs
from mimdet.evaluation import COCOEvaluator
from mimdet.polygons import PackedPolygons

TRIANGLE = [10.0, 10.0, 30.0, 10.0, 10.0, 25.0]
RLE = {"size": [40, 60], "counts": [0, 5, 2395]}


def instance(id, image_id=7, category_id=9, **changes):
    return {
        "id": id,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [10, 10, 20, 15],
        "segmentation": [TRIANGLE],
        "iscrowd": 0,
        "area": 150.0,
        **changes,
    }


def content(annotations, images=(7,)):
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 60} for i in images],
        "annotations": annotations,
        "categories": [{"id": 9, "name": "cat"}, {"id": 4, "name": "dog"}],
    }


def changed(key, position, **fields):
    """Valid content except the fields of one entry."""
    data = content([instance(1)])
    data[key][position].update(fields)
    return data


@pytest.fixture
def write(tmp_path):
    """Writes an annotation file and images; returns the arguments of CocoDataset."""

    def write(data):
        (tmp_path / "images").mkdir(exist_ok=True)
        for image in data.get("images", ()) if isinstance(data, dict) else ():
            pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
            name = image.get("file_name")
            Image.fromarray(pixels).save(tmp_path / "images" / (name if name in ("7.png", "8.png") else "9.png"))
        (tmp_path / "set.json").write_text(json.dumps(data))
        return {"json_file": tmp_path / "set.json", "image_root": tmp_path / "images"}

    return write


def test_records_hold_boxes_labels_and_polygons(write, capsys):
    files = write(content([instance(1), instance(2, category_id=4), instance(3, iscrowd=1, segmentation=RLE)]))
    dataset = CocoDataset(**files)
    record = dataset[0]
    assert (dataset.name, dataset.classes, dataset.category_ids) == ("set", ["dog", "cat"], [4, 9])
    assert record["file_name"] == str(files["image_root"] / "7.png")
    assert (record["image_id"], record["height"], record["width"]) == (7, 40, 60)
    np.testing.assert_array_equal(record["boxes"], [[10, 10, 30, 25]] * 2)
    np.testing.assert_array_equal(record["labels"], [1, 0])
    assert [[p.tolist() for p in polygons] for polygons in record["masks"]] == [[TRIANGLE]] * 2
    assert len(dataset.coco.anns) == 3, "the evaluator must see the crowd"
    assert capsys.readouterr().out == ""


def test_records_behave_as_a_sequence(write):
    dataset = CocoDataset(**write(content([instance(1), instance(2, image_id=8)], images=(7, 8))))
    assert [record["image_id"] for record in dataset.records] == [7, 8]
    assert dataset.records[-1]["image_id"] == 8
    assert dataset.sizes.tolist() == [[40, 60]] * 2
    with pytest.raises(IndexError):
        dataset.records[2]


@pytest.mark.parametrize(("filter_empty", "images"), [(True, [8]), (False, [7, 8, 9])], ids=["filtered", "all"])
def test_filter_empty(write, caplog, filter_empty, images):
    annotations = [instance(1, image_id=8), instance(2, image_id=9, iscrowd=1)]
    with caplog.at_level(logging.INFO, "mimdet"):
        dataset = CocoDataset(**write(content(annotations, images=(7, 8, 9))), filter_empty=filter_empty)
    assert [record["image_id"] for record in dataset] == images
    assert ("dropped 2 of 3 images" in caplog.text) == filter_empty


def test_unusable_instances_are_skipped_with_one_warning(write, caplog):
    annotations = [
        instance(1),
        instance(2, bbox=[5, 5, 0, 10]),
        instance(3, bbox=[5, 5, 10, -1]),
        instance(4, bbox=[5, float("nan"), 10, 10]),
        instance(5, segmentation=[[1, 1, 5, 5]]),
        instance(6, segmentation=[[1, 1, 5, 5], TRIANGLE]),
        instance(7, segmentation=[]),
        instance(8, segmentation=[[1, 1, 5, 5, float("nan"), 9]]),
    ]
    dataset = CocoDataset(**write(content(annotations)))
    assert len(dataset[0]["labels"]) == 2
    assert [len(polygons) for polygons in dataset[0]["masks"]] == [1, 1]
    (record,) = caplog.records
    assert "set.json" in record.message
    assert "3 with a box without area or not finite (annotations 2, 3, 4)" in record.message
    assert "3 without a polygon of at least 3 points, all finite (annotations 5, 7, 8)" in record.message


def test_masks_are_not_needed_where_they_are_not_used(write, caplog):
    annotations = [instance(1), instance(2, segmentation=RLE), instance(3, segmentation=[]), instance(4)]
    del annotations[3]["segmentation"], annotations[3]["area"]
    dataset = CocoDataset(**write(content(annotations)), use_masks=False)
    assert len(dataset[0]["boxes"]) == len(dataset[0]["labels"]) == 4
    assert "masks" not in dataset[0]
    assert not caplog.records
    assert {key: a["area"] for key, a in dataset.coco.anns.items()} == {1: 150, 2: 150, 3: 150, 4: 300}
    mapper = {"is_train": True, "augmentations": [RandomFlip(horizontal=True, prob=1.0)]}
    rng = np.random.default_rng(0)
    assert DatasetMapper(**mapper, use_instance_mask=False)(dataset[0], rng)["targets"].keys() == {"boxes", "labels"}
    with pytest.raises(DataError, match=r"image 7 comes without masks.*use_instance_mask=False"):
        DatasetMapper(**mapper)(dataset[0], rng)


def without(data, *path):
    *parents, last = path
    entry = data
    for key in parents:
        entry = entry[key]
    del entry[last]
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param([{"image_id": 1, "score": 0.5}], "found a list", id="results file"),
        pytest.param(without(content([]), "annotations"), "'annotations' is missing", id="no annotations key"),
        pytest.param(without(content([]), "categories"), "'categories' is missing", id="no categories key"),
        pytest.param(without(content([]), "images", 0, "width"), r"images\[0\] must have", id="image key"),
        pytest.param(without(content([instance(1)]), "annotations", 0, "bbox"), "bbox", id="annotation key"),
        pytest.param(content([instance(1)], images=(7, 7)), "id 7 in images", id="image id twice"),
        pytest.param(content([instance(1)], images=("7",)), "'7' in images is not an integer", id="string id"),
        pytest.param(content([instance(5, image_id=8)]), "annotation 5 of image 8 refers", id="unknown image"),
        pytest.param(content([instance(5, category_id=1)]), "annotation 5 .*a category .*category_id 1", id="category"),
        pytest.param(content([instance(5, segmentation=RLE)]), "annotation 5 .*run-length", id="run lengths"),
        pytest.param(content([instance(5, bbox=[1, 2, 3])]), "annotation 5 .*bbox must be", id="short box"),
        pytest.param(content([instance(5, segmentation="x")]), "annotation 5 .*must be a list", id="text mask"),
        pytest.param(
            without(content([instance(1)]), "annotations", 0, "segmentation"),
            "no annotation has a segmentation.*use_masks=False",
            id="boxes only",
        ),
        pytest.param(content([]), "no image with a usable instance", id="nothing usable"),
        pytest.param(content([instance(1)], images=(True,)), "id True in images is not an integer", id="image id true"),
        pytest.param(content([instance(1.0)]), r"id 1\.0 in annotations is not an integer", id="float id"),
        pytest.param(content([instance(3), instance(3)]), "id 3 in annotations .*twice", id="annotation id twice"),
        pytest.param(content([instance(5, image_id=[7])]), r"annotation 5 .*image_id must be an integer", id="list id"),
        pytest.param(content([instance(5, category_id="9")]), "annotation 5 .*category_id must be", id="text id"),
        pytest.param(content([instance(5, bbox=["1", "2", "3", "4"])]), "annotation 5 .*bbox must be", id="text box"),
        pytest.param(content([instance(5, bbox=[1, 2, 3, True])]), "annotation 5 .*bbox must be", id="true in a box"),
        pytest.param(content([instance(5, bbox=[60, 0, 5, 5])]), "annotation 5 .*wholly outside .* 60x40", id="right"),
        pytest.param(content([instance(5, bbox=[5, -9, 5, 9])]), "annotation 5 .*wholly outside", id="above"),
        pytest.param(content([instance(5, area="150")]), "annotation 5 .*area must be a number", id="text area"),
        pytest.param(content([instance(5, area=-1)]), "annotation 5 .*area must be a number, 0 or more", id="area"),
        pytest.param(content([instance(5, iscrowd="0")]), "annotation 5 .*iscrowd must be 0 or 1, is '0'", id="crowd"),
        pytest.param(content([instance(5, ignore=2)]), "annotation 5 .*ignore must be 0 or 1, is 2", id="ignore"),
        pytest.param(content([instance(5, segmentation=TRIANGLE)]), "annotation 5 .*list of polygons", id="flat mask"),
        pytest.param(content([instance(5, segmentation=[["1"] * 6])]), "annotation 5 .*list of polygons", id="text xy"),
        pytest.param(changed("images", 0, file_name=7), "image 7: file_name must be the name", id="number as file"),
        pytest.param(changed("images", 0, file_name="a\nb"), "image 7: file_name must be the name", id="line break"),
        pytest.param(changed("images", 0, width=True), "image 7 has height 40, width True", id="true as width"),
        pytest.param(changed("images", 0, width=10**9), "image 7 has height 40, width 1000000000", id="too wide"),
        pytest.param(changed("categories", 0, name=3), "category 9: name must be a text", id="number as class"),
        pytest.param(changed("categories", 0, name=" "), "category 9: name must be .* not empty", id="blank class"),
        pytest.param(changed("categories", 0, name="a\nb"), r"category 9: name 'a\\nb' has a line", id="two lines"),
        pytest.param(changed("categories", 0, name="\ud800"), "category 9: .* cannot be drawn", id="surrogate"),
        pytest.param(changed("categories", 0, name="dog"), "category 4: name 'dog' occurs twice", id="class twice"),
    ],
)
def test_malformed_files_are_named(write, data, message):
    with pytest.raises(DataError, match=message) as error:
        CocoDataset(**write(data))
    assert "set.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ('{"images": [', "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": "\xff"}', "not valid JSON"),
    ],
    ids=["empty", "cut", "deep", "latin-1"],
)
def test_unreadable_files_are_named(write, text, message):
    files = write(content([]))
    files["json_file"].write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=f"{message}.*set.json"):
        CocoDataset(**files)


@pytest.mark.parametrize(
    "mask",
    [
        {"counts": [2400]},
        {"size": [40, 60]},
        {"size": [60, 40], "counts": [2400]},
        {"size": [40.0, 60.0], "counts": [2400]},
        {"size": [40, 60], "counts": [2399]},
        {"size": [40, 60], "counts": [-1, 2401]},
        {"size": [40, 60], "counts": ["2400"]},
        {"size": [40, 60], "counts": ""},
        {"size": [40, 60], "counts": "PPPPPPPP"},  # every digit says that another follows
        {"size": [40, 60], "counts": "o" * 20 + "0"},  # a number of 105 bits
        {"size": [40, 60], "counts": "~"},
        {"size": [40, 60], "counts": "\u0660"},
    ],
    ids=str,
)
@pytest.mark.parametrize("crowd", [0, 1])
def test_malformed_run_lengths_are_named(write, mask, crowd):
    files = write(content([instance(1), instance(5, segmentation=mask, iscrowd=crowd)]))
    with pytest.raises(DataError, match=r"set\.json: annotation 5 of image 7: (size|counts) of the run-length"):
        CocoDataset(**files, filter_empty=False)
    assert len(CocoDataset(**files, use_masks=False)[0]["labels"]) == 2 - crowd


def test_compressed_run_lengths_are_read_as_pycocotools_does():
    rng = np.random.default_rng(0)
    for density in (0.0, 0.01, 0.5, 1.0):
        mask = np.asfortranarray(rng.random((70, 90)) < density, dtype=np.uint8)
        flat = mask.flatten(order="F")
        edges = np.flatnonzero(np.diff(flat, prepend=0)).tolist()
        expected = np.diff([0, *edges, flat.size]).tolist()
        assert _text_runs(mask_utils.encode(mask)["counts"].decode()) == expected


def test_annotations_to_ignore_are_no_objects(write):
    dataset = CocoDataset(**write(content([instance(1), instance(2, ignore=1), instance(3, ignore=0)])))
    assert len(dataset[0]["labels"]) == 2


def test_boxes_over_the_edge_are_no_mistake(write):
    boxes = [[-5, -5, 10, 10], [55, 35, 10, 10], [-100, -100, 1000, 1000]]
    dataset = CocoDataset(**write(content([instance(i, bbox=box) for i, box in enumerate(boxes)])))
    assert len(dataset[0]["labels"]) == 3


def test_far_corners_are_added_in_float32(write):
    """As Detectron2 adds them: 21.43 + 338.96 is not the float32 nearest to 360.39, but the one before."""
    spans = [[21.43, 338.96], [20.1, 30.3], [3.0, 4.0]]
    annotations = [instance(i, bbox=[x, 1.5, w, 2.0]) for i, (x, w) in enumerate(spans)]
    data = content(annotations)
    data["images"][0]["width"] = 400
    boxes = CocoDataset(**write(data))[0]["boxes"]
    assert boxes[0, 2] == np.float32(21.43) + np.float32(338.96) == 360.3899841308594 != np.float32(360.39)
    for box, (x, w) in zip(boxes, spans, strict=True):
        assert box.tolist() == [np.float32(x), 1.5, np.float32(x) + np.float32(w), 3.5]


def test_missing_images_are_counted_and_named(write):
    data = content([instance(1), instance(2, image_id=8), instance(3, image_id=9)], images=(7, 8, 9))
    data["images"].append({"id": 10, "file_name": "unused.png", "height": 40, "width": 60})
    files = write(data)
    CocoDataset(**files)
    (files["image_root"] / "7.png").unlink()
    (files["image_root"] / "9.png").rename(files["image_root"] / "9.PNG")
    with pytest.raises(DataError, match=r"2 of 3 image files of .*set\.json do not exist: '.*7\.png', '.*9\.png'"):
        CocoDataset(**files)


def test_run_lengths_do_not_hinder_evaluation(write, caplog):
    dataset = CocoDataset(**write(content([instance(5, segmentation=RLE)])), filter_empty=False)
    assert len(dataset[0]["labels"]) == 0
    assert "1 with a run-length encoded mask (annotations 5)" in caplog.text
    assert list(dataset.coco.anns) == [5]


def test_evaluator_gets_missing_fields(write):
    bare = instance(1)
    del bare["iscrowd"], bare["area"]
    dataset = CocoDataset(**write(content([bare])))
    assert dataset.coco.anns[1]["iscrowd"] == 0
    assert dataset.coco.anns[1]["area"] == pytest.approx(150, rel=0.1)
    assert "coco" not in pickle.loads(pickle.dumps(dataset)).__dict__


class TestNames:
    def test_known_names_follow_the_environment(self, monkeypatch, tmp_path):
        monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
        assert catalog.find("coco_2017_val") == (
            "datasets/coco/annotations/instances_val2017.json",
            "datasets/coco/val2017",
        )
        monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
        assert catalog.find("coco_2017_train")[1] == str(tmp_path / "coco/train2017")

    def test_missing_files_say_how_to_point_to_them(self, monkeypatch, tmp_path):
        monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
        with pytest.raises(DataError, match=r"instances_val2017\.json.*DETECTRON2_DATASETS") as error:
            CocoDataset("coco_2017_val")
        assert str(tmp_path) in str(error.value)

    def test_missing_image_folder(self, write, tmp_path):
        files = write(content([instance(1)]))
        with pytest.raises(DataError, match=r"image folder not found: .*nowhere"):
            CocoDataset(**{**files, "image_root": tmp_path / "nowhere"})

    def test_unknown_name_suggests_the_nearest(self):
        with pytest.raises(DataError, match="did you mean 'coco_2017_val'"):
            CocoDataset("coco_2017_vla")

    def test_register(self, write, monkeypatch):
        monkeypatch.setattr(catalog, "_registered", {})
        files = write(content([instance(1)]))
        register("mine", **files)
        register("mine", **files)
        assert CocoDataset("mine").name == "mine"
        with pytest.raises(DataError, match="taken"):
            register("mine", "other.json", "other")
        with pytest.raises(DataError, match="taken"):
            register("coco_2017_val", **files)

    def test_paths_replace_those_of_a_name(self, write):
        dataset = CocoDataset("coco_2017_train", **write(content([instance(1)])))
        assert (dataset.name, len(dataset)) == ("set", 1)

    @pytest.mark.parametrize("arguments", [{}, {"json_file": "a.json"}, {"names": ["a", "b"]}], ids=str)
    def test_incomplete_arguments(self, arguments):
        with pytest.raises(DataError, match="names"):
            CocoDataset(**arguments)

    def test_coco_categories(self):
        assert len(COCO_CATEGORIES) == len(set(COCO_CATEGORIES.values())) == 80
        assert list(COCO_CATEGORIES) == sorted(COCO_CATEGORIES)
        assert (COCO_CATEGORIES[1], COCO_CATEGORIES[90]) == ("person", "toothbrush")


class TestPictures:
    @pytest.fixture
    def record(self, tmp_path):
        return {"file_name": str(tmp_path / "a.png"), "image_id": 3, "height": 40, "width": 60}

    @pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1"])
    def test_modes_become_rgb(self, record, mode):
        Image.new(mode, (60, 40), 1).save(record["file_name"])
        image = read_image(record)
        assert (image.mode, image.size) == ("RGB", (60, 40))

    def test_exif_orientation_is_applied(self, record, tmp_path):
        pixels = np.zeros((60, 40, 3), np.uint8)
        pixels[:20] = 255
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees clockwise
        record["file_name"] = str(tmp_path / "a.jpg")
        Image.fromarray(pixels).save(record["file_name"], exif=exif)
        turned = np.asarray(read_image(record))
        assert turned.shape == (40, 60, 3)
        assert turned[:, 45:].min() > 200
        assert turned[:, :35].max() < 50

    def test_missing(self, record):
        with pytest.raises(DataError, match=r"image not found: .*a.png \(image id 3\)"):
            read_image(record)

    @pytest.mark.parametrize("keep", [0, 20, 500], ids=["empty", "header only", "truncated"])
    @pytest.mark.parametrize("suffix", ["png", "jpg"])
    def test_damaged(self, record, tmp_path, keep, suffix):
        record["file_name"] = str(tmp_path / f"a.{suffix}")
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(record["file_name"])
        data = (tmp_path / f"a.{suffix}").read_bytes()
        assert len(data) > 500
        (tmp_path / f"a.{suffix}").write_bytes(data[:keep])
        with pytest.raises(DataError, match=rf"cannot be read: .*a.{suffix} \(image id 3\)"):
            read_image(record)

    def test_other_size(self, record):
        Image.new("RGB", (40, 60)).save(record["file_name"])
        with pytest.raises(DataError, match=r"a.png \(image id 3\) is 40x60 .* 60x40"):
            read_image(record)

    def test_more_than_8_bits(self, record):
        Image.fromarray(np.full((40, 60), 1000, np.uint16)).save(record["file_name"])
        with pytest.raises(DataError, match="more than 8 bits"):
            read_image(record)


class TestMapper:
    @pytest.fixture
    def record(self, write):
        return CocoDataset(**write(content([instance(1), instance(2, category_id=4)])))[0]

    def test_training_sample(self, record):
        mapper = DatasetMapper(True, [RandomFlip(prob=1.0), ResizeShortestEdge(80)])
        before = pickle.dumps(record)
        sample = mapper(record, np.random.default_rng(0))
        assert pickle.dumps(record) == before, "the record must not change"
        assert sample["image"].dtype == torch.uint8
        assert sample["image"].shape == (3, 80, 120)
        assert (sample["image_id"], sample["height"], sample["width"]) == (7, 40, 60)
        targets = sample["targets"]
        assert (targets["boxes"].dtype, targets["labels"].dtype) == (torch.float32, torch.int64)
        assert targets["boxes"].tolist() == [[60.0, 20.0, 100.0, 50.0]] * 2
        assert targets["labels"].tolist() == [1, 0]
        ((polygon,), _) = targets["masks"]
        assert (polygon.dtype, polygon.tolist()) == (np.float64, [100, 20, 60, 20, 100, 50])
        assert isinstance(targets["masks"], PackedPolygons)  # the worker packs them

    def test_evaluation_sample_has_no_targets(self, record):
        sample = DatasetMapper(False, [ResizeShortestEdge(20)])(record, np.random.default_rng(0))
        assert sample["image"].shape == (3, 20, 30)
        assert (sample["height"], sample["width"]) == (40, 60)
        assert "targets" not in sample

    def test_without_masks(self, record):
        sample = DatasetMapper(True, [], use_instance_mask=False)(record, np.random.default_rng(0))
        assert sorted(sample["targets"]) == ["boxes", "labels"]

    def test_boxes_are_fitted_to_cropped_masks(self, record):
        crop, middle = FixedSizeCrop((40, 30)), SimpleNamespace(random=lambda: 0.5)
        clipped, fitted = (
            DatasetMapper(True, [crop], recompute_boxes=flag)(record, middle)["targets"]["boxes"].tolist()
            for flag in (False, True)
        )
        assert clipped == [[0, 10, 15, 25]] * 2
        assert fitted == [[0, 10, 15, 21.25]] * 2
        with pytest.raises(ValueError, match="set use_instance_mask too"):
            DatasetMapper(True, [], use_instance_mask=False, recompute_boxes=True)

    def test_a_box_that_misses_the_window_is_fitted_to_a_mask_that_reaches_it(self, record):
        record["boxes"][:] = [[0, 10, 5, 25]]
        mapper = DatasetMapper(True, [FixedSizeCrop((40, 30))], recompute_boxes=True)
        targets = mapper(record, SimpleNamespace(random=lambda: 0.5))["targets"]
        assert targets["boxes"].tolist() == [[0, 10, 15, 21.25]] * 2

    def test_failing_augmentations_name_the_file(self, record):
        def fail(image, targets, rng):
            raise IndexError("list index out of range")

        with pytest.raises(DataError, match=r"7\.png \(image id 7\), 60x40 .*IndexError: list index") as error:
            DatasetMapper(True, [RandomFlip(), fail])(record, np.random.default_rng(0))
        assert isinstance(error.value.__cause__, IndexError)

    @pytest.mark.parametrize("malformed", [[1.0, 2, 3, 4], [1.0, 2, 3, 4, float("inf"), 5]], ids=["points", "infinity"])
    def test_malformed_polygons_of_augmentations_name_the_file(self, record, malformed):
        def spoil(image, targets, rng):
            return image, {**targets, "masks": [targets["masks"][0], [np.array(TRIANGLE), np.array(malformed)]]}

        with pytest.raises(DataError, match=r"7\.png \(image id 7\).*ValueError: masks\[1\]\[1\] h"):
            DatasetMapper(True, [spoil])(record, np.random.default_rng(0))

    def test_channel_order(self, record):
        rgb, bgr = (DatasetMapper(False, [], image_format=f)(record, None)["image"] for f in ("RGB", "BGR"))
        np.testing.assert_array_equal(rgb.permute(1, 2, 0), np.asarray(Image.open(record["file_name"])))
        assert torch.equal(rgb.flip(0), bgr)
        with pytest.raises(ValueError, match="image_format"):
            DatasetMapper(False, [], image_format="YUV")

    def test_boxes_are_clipped_to_the_image(self, record):
        record["boxes"] = np.array([[-5.0, 10, 70, 50], [60, 10, 70, 20]])
        targets = DatasetMapper(True, [])(record, None)["targets"]
        assert targets["boxes"].tolist() == [[0, 10, 60, 40]]
        assert len(targets["masks"]) == len(targets["labels"]) == 1


def test_a_name_without_a_file_behind_it_is_missing(write, tmp_path):
    """Dangling links and folders are listed as files are."""
    data = content([instance(1), instance(2, image_id=8), instance(3, image_id=9)], images=(7, 8, 9))
    files = write(data)
    for name in ("7.png", "8.png", "9.png"):
        (files["image_root"] / name).rename(tmp_path / name)
    (files["image_root"] / "7.png").symlink_to("nowhere")
    (files["image_root"] / "8.png").mkdir()
    (files["image_root"] / "9.png").symlink_to(tmp_path / "9.png")
    with pytest.raises(DataError, match=r"2 of 3 image files of .*set\.json do not exist: '.*7\.png', '.*8\.png'"):
        CocoDataset(**files)


def test_a_tilde_is_the_home_folder(write, monkeypatch, tmp_path):
    """A shell does not expand it in ``train.output_dir=~/run``."""
    write(content([instance(1)]))
    monkeypatch.setenv("HOME", str(tmp_path))
    dataset = CocoDataset(json_file="~/set.json", image_root="~/images")
    assert dataset[0]["file_name"] == str(tmp_path / "images" / "7.png")
    evaluator = COCOEvaluator(dataset, output_dir="~/out")
    nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
    evaluator.process([{"image_id": 7}], [nothing])
    evaluator.evaluate()
    assert (tmp_path / "out" / "coco_instances_results.json").read_text() == "[]"
