"""`mimdet check-data`, and broken annotation files by the hundred."""

import copy
import json

import numpy as np
import pytest
from PIL import Image
from support.command import run
from test_coco import RLE, instance
from test_coco import content as content_of

from mimdet.data import CocoDataset, DataError, DatasetMapper, ResizeShortestEdge
from mimdet.data.check import check_config, check_dataset
from mimdet.evaluation.ground_truth import load_ground_truth

DEEP = []
for _ in range(150):
    DEEP = [DEEP]
BAD = [
    *(None, True, 0, -1, 3.5, 1e308, 10**400, 2**63, float("nan"), float("inf")),
    *("", "7", "a\nb", "\ud800", "\0", [], [[]], {}, [1.0] * 6, [["1"] * 6], [[1, 2, 3, 4]], [[1e9, -1e9] * 3]),
    *([float("nan")] * 4, ["1", "2", "3", "4"], [10**400] * 4, [-1e29, -1e29, 1e29, 2e29], DEEP),
    *({"size": [40, 60], "counts": counts} for counts in ("~", "PPPP", "", [2401], [-1, 2401], [2400.0], None)),
]


def content():
    box = {"bbox": [10, 10, 20.5, 15]}
    crowd = instance(3, iscrowd=1, segmentation=RLE, **box)
    data = content_of([instance(1, **box), instance(2, 8, 4, **box), crowd], images=(7, 8))
    return json.loads(json.dumps(data))  # without shared lists


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    for number in (7, 8):
        Image.new("RGB", (60, 40)).save(path / f"{number}.png")
    return path


def write(folder, data, name="set.json"):
    (folder / name).write_text(json.dumps(data))
    return {"json_file": folder / name, "image_root": folder}


def places(node, at=()):
    yield at
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from places(value, (*at, key))


def broken_files(seed, count):
    """Files with one bad value each, and its place."""
    rng = np.random.default_rng(seed)
    everywhere = list(places(content()))[1:]
    for _ in range(count):
        at, value = everywhere[rng.integers(len(everywhere))], copy.deepcopy(BAD[rng.integers(len(BAD))])
        data = content()
        entry = data
        for key in at[:-1]:
            entry = entry[key]
        entry[at[-1]] = value
        yield at, data


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("use_masks", [True, False], ids=["masks", "boxes"])
def test_a_broken_file_loads_or_is_named(folder, training, use_masks):
    mapper = DatasetMapper(training, [ResizeShortestEdge(30)], use_instance_mask=use_masks)
    refused = 0
    for at, data in broken_files(seed=3, count=100):
        arguments = {**write(folder, data), "filter_empty": training, "use_masks": use_masks}
        problems, message = check_dataset(**arguments).problems, None
        try:
            for record in CocoDataset(**arguments).records:
                mapper(record, np.random.default_rng(0))
            if not training:
                load_ground_truth(arguments["json_file"], use_masks)
        except DataError as error:
            message = str(error)
            refused += 1
        assert problems[:1] == ([] if message is None else [message]), at
        assert message is None or ("set.json" in message and message.isprintable()), at
    assert 30 < refused < 95


def test_all_problems_are_found_and_the_sound_part_is_counted(folder):
    data = content()
    data["annotations"] += [
        {**data["annotations"][0], "id": 4, "bbox": [60, 0, 5, 5]},
        {**data["annotations"][0], "id": 5, "area": "150"},
        {**data["annotations"][0], "id": 6, "bbox": [1, 1, 0, 5]},
        {**data["annotations"][0], "id": 7, "segmentation": []},
        {**data["annotations"][0], "id": 1},
    ]
    data["images"] += [
        {"id": 9, "file_name": "none.png", "height": 50, "width": 80},
        {"id": 10, "file_name": 4, "height": 50, "width": 80},
    ]
    data["annotations"].append({**data["annotations"][0], "id": 8, "image_id": 9})
    # its image was skipped: reported once
    data["annotations"].append({**data["annotations"][0], "id": 9, "image_id": 10})
    report = check_dataset(**write(folder, data))
    expected = ("image 10: file_name", "annotation 4 .*outside", "annotation 5 .*area", "id 1 in annotations")
    assert len(report.problems) == 5
    for problem, what in zip(report.problems, (*expected, "1 of 3 image files"), strict=True):
        with pytest.raises(DataError, match=what):
            raise DataError(problem)
    assert report.counts == {
        "images": 3,
        "images without a usable instance": 0,
        "instances": 3,
        "annotations of crowds or to ignore": 1,
        "instances skipped with a box without area or not finite": 1,
        "instances skipped without a polygon of at least 3 points, all finite": 1,
    }
    assert report.pixels["image width"] == (60, 60, 80)
    assert report.pixels["box width"] == (20.5, 20.5, 20.5)
    assert report.classes == {"dog": 1, "cat": 2}


def test_unreadable_files_are_problems(folder):
    (folder / "cut.json").write_text("{")
    (problem,) = check_dataset(json_file=folder / "cut.json", image_root=folder).problems
    assert "not valid JSON" in problem
    (problem,) = check_dataset(**{**write(folder, content()), "image_root": folder / "nowhere"}).problems
    assert "image folder not found" in problem


def test_other_datasets_are_refused():
    from support.engine_fakes import fake_config

    with pytest.raises(ValueError, match=r"dataloader\.train\.dataset is .*FakeDataset.*only a CocoDataset"):
        check_config(fake_config("unused"))


def check(monkeypatch, capsys, folder, train, val, *options):
    """Exit status and output of the command."""
    arguments = []
    for name, data in (("train", train), ("val", val)):
        arguments += [f"--{name}-json", write(folder, data, f"{name}.json")["json_file"], f"--{name}-images", folder]
    monkeypatch.setenv("COLUMNS", "200")
    status = run(monkeypatch, "check-data", "--config-file", "demo", *arguments, *options)
    return status, capsys.readouterr().out


def test_sound_data_is_summed_up(monkeypatch, capsys, folder):
    data = content()
    data["categories"][0]["name"] = "[/red]"
    status, printed = check(monkeypatch, capsys, folder, data, data, "--decode")
    assert status == 0
    assert printed.count("no problems found") == 2
    assert "[/red]" in printed
    assert "image height" in printed


def test_problems_are_listed_and_counted(monkeypatch, capsys, folder):
    train, val = content(), content()
    train["annotations"] += [{**train["annotations"][0], "id": number, "area": "x"} for number in range(10, 70)]
    val["categories"][0]["name"] = "cow"
    status, printed = check(monkeypatch, capsys, folder, train, val)
    assert status == 1
    assert printed.count("area must be a number") == 50
    assert "... and 10 more problems" in printed
    assert "train: 60 problems found" in printed
    assert "the training set has 2 classes (dog, cat), the test set 2 (dog, cow)" in printed
    assert "test: 1 problem found" in printed


def test_decoding_finds_what_a_look_at_names_does_not(monkeypatch, capsys, folder, tmp_path):
    data = content()
    for name, pixels in (("7.png", (60, 40)), ("8.png", (40, 60))):
        Image.new("RGB", pixels).save(tmp_path / name)
    (tmp_path / "7.png").write_bytes((tmp_path / "7.png").read_bytes()[:60])
    assert check(monkeypatch, capsys, tmp_path, data, data)[0] == 0
    status, printed = check(monkeypatch, capsys, tmp_path, data, data, "--decode")
    assert status == 1
    assert "7.png (image id 7) is damaged" in printed
    assert "8.png (image id 8) is 40x60" in printed
    (tmp_path / "8.png").unlink()
    printed = check(monkeypatch, capsys, tmp_path, data, data, "--decode")[1]
    assert printed.count("8.png") == 2, "a missing file is one problem of each split"
