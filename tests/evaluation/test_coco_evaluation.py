import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from omegaconf import OmegaConf

from mimdet.config import LazyCall
from mimdet.data import CocoDataset, DataError
from mimdet.engine.evaluate import Evaluation
from mimdet.evaluation import (
    COCOEvaluator,
    coco_evaluator,
    copypaste_lines,
    format_results,
    results_table,
    to_coco_results,
)
from mimdet.evaluation.toolkit import TOOLKITS, choose_toolkit
from mimdet.files import write_json

HEIGHT, WIDTH = 160, 200
CATEGORY_IDS = [3, 17, 90]
CLASSES = ["car", "cat", "toothbrush"]
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")

both_toolkits = pytest.mark.parametrize("toolkit", TOOLKITS)


@pytest.fixture(autouse=True)
def _installed(request):
    toolkit = getattr(request.node, "callspec", None) and request.node.callspec.params.get("toolkit")
    if toolkit:
        pytest.importorskip(toolkit)


def rectangle(x, y, w, h):
    return [float(v) for v in (x, y, x + w, y, x + w, y + h, x, y + h)]


def crowd_rle(x, y, w, h):
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    return {"size": [HEIGHT, WIDTH], "counts": np.diff([0, *edges.tolist(), flat.size]).tolist()}


def annotation(number, image_id, category_id, box, crowd=False):
    segmentation = crowd_rle(*box) if crowd else [rectangle(*box)]
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [float(v) for v in box],
        "area": float(box[2] * box[3]),
        "iscrowd": int(crowd),
        "segmentation": segmentation,
    }


def coco_content():
    """Three images, small to large objects of non-contiguous categories, a crowd over one of them, id 0."""
    boxes = [
        (7, 3, (10, 10, 20, 20)),
        (7, 3, (60, 20, 50, 60)),
        (7, 17, (100, 90, 95, 65)),
        (11, 17, (5, 5, 120, 110)),
        (11, 90, (140, 30, 14, 100)),
        (11, 90, (160, 30, 30, 30)),
    ]
    annotations = [annotation(n, *values) for n, values in enumerate(boxes)]
    annotations.append(annotation(len(boxes), 7, 3, (55, 10, 80, 80), crowd=True))
    return {
        "images": [{"id": i, "height": HEIGHT, "width": WIDTH, "file_name": f"{i}.jpg"} for i in (7, 11, 20)],
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in zip(CATEGORY_IDS, CLASSES, strict=True)],
    }


def make_dataset(folder: Path, content=None):
    json_file = folder / "instances.json"
    json_file.write_text(json.dumps(coco_content() if content is None else content))
    return SimpleNamespace(json_file=str(json_file), classes=CLASSES, category_ids=CATEGORY_IDS)


def empty_result():
    return {
        "boxes": torch.zeros(0, 4),
        "scores": torch.zeros(0),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, HEIGHT, WIDTH, dtype=torch.bool),
    }


def truth_as_results(content, with_crowd):
    """The annotations as a model's results, one dict per image."""
    results = []
    for image in content["images"]:
        annotations = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        annotations = [a for a in annotations if with_crowd or not a["iscrowd"]]
        if not annotations:
            results.append(empty_result())
            continue
        masks = []
        for item in annotations:
            rle = mask_util.frPyObjects(item["segmentation"], HEIGHT, WIDTH)
            masks.append(mask_util.decode(mask_util.merge(rle) if isinstance(rle, list) else rle))
        x, y, w, h = torch.tensor([a["bbox"] for a in annotations]).unbind(1)
        results.append(
            {
                "boxes": torch.stack([x, y, x + w, y + h], dim=1),
                "scores": torch.linspace(0.9, 0.5, len(annotations)),
                "labels": torch.tensor([CATEGORY_IDS.index(a["category_id"]) for a in annotations]),
                "masks": torch.from_numpy(np.stack(masks)).bool(),
            }
        )
    return results


def random_results(content, seed):
    """The ground truth with noise on boxes and labels, and false positives."""
    generator = torch.Generator().manual_seed(seed)
    results = []
    for truth in truth_as_results(content, with_crowd=True):
        n = len(truth["boxes"])
        moved = truth["boxes"] + 6 * torch.randn(n, 4, generator=generator)
        invented = torch.rand(12, 4, generator=generator) * torch.tensor([80.0, 60.0, 90.0, 80.0])
        invented[:, 2:] += invented[:, :2] + 1
        boxes = torch.cat([moved, invented])
        masks = torch.zeros(len(boxes), HEIGHT, WIDTH, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.round().int().clamp(min=0).tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
        labels = torch.cat([truth["labels"], torch.randint(3, (12,), generator=generator)])
        scores = torch.rand(len(boxes), generator=generator)
        results.append({"boxes": boxes, "scores": scores, "labels": labels, "masks": masks})
    return results


def evaluate(dataset, results, image_ids=(7, 11, 20), **options):
    evaluator = COCOEvaluator(dataset, **options)
    evaluator.reset()
    for image_id, result in zip(image_ids, results, strict=True):
        evaluator.process([{"image_id": image_id}], [result])
    return evaluator.evaluate()


@both_toolkits
@pytest.mark.parametrize("with_crowd", [False, True], ids=["objects", "objects-and-crowd"])
def test_ground_truth_scores_one(tmp_path, toolkit, with_crowd):
    content = coco_content()
    figures = evaluate(make_dataset(tmp_path), truth_as_results(content, with_crowd), toolkit=toolkit)
    for task in ("bbox", "segm"):
        assert figures[task] == dict.fromkeys(METRICS, pytest.approx(1, abs=1e-12))
        assert figures[f"{task}_per_class"] == {name: pytest.approx(1, abs=1e-12) for name in CLASSES}


def test_ground_truth_of_a_coco_dataset_scores_one(tmp_path):
    content = coco_content()
    json_file = make_dataset(tmp_path, content).json_file
    for image in content["images"]:
        (tmp_path / image["file_name"]).touch()
    dataset = CocoDataset(json_file=json_file, image_root=tmp_path, filter_empty=False)
    figures = evaluate(dataset, truth_as_results(content, with_crowd=False))
    assert figures["segm"]["AP"] == pytest.approx(1, abs=1e-12)
    assert list(figures["segm_per_class"]) == CLASSES


def test_toolkits_agree(tmp_path):
    pytest.importorskip("faster_coco_eval")
    dataset = make_dataset(tmp_path)
    for seed in range(4):
        results = random_results(coco_content(), seed)
        fast, slow = (evaluate(dataset, results, toolkit=toolkit) for toolkit in TOOLKITS)
        assert fast.keys() == slow.keys()
        assert 0 < slow["segm"]["AP"] < 1
        for task, figures in slow.items():
            assert fast[task] == pytest.approx(figures, abs=1e-9, nan_ok=True)


@both_toolkits
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_figures_are_those_of_pycocotools_summary(tmp_path, toolkit, task):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    content = coco_content()
    for item in content["annotations"]:
        item["id"] += 1
    dataset = make_dataset(tmp_path, content)
    results = random_results(content, seed=9)
    drop = {"bbox": "segmentation", "segm": "bbox"}[task]
    detections = [
        {k: v for k, v in detection.items() if k != drop}
        for image_id, result in zip((7, 11, 20), results, strict=True)
        for detection in to_coco_results(result, image_id, CATEGORY_IDS)
    ]
    truth = COCO(dataset.json_file)
    run = COCOeval(truth, truth.loadRes(detections), task)
    run.evaluate()
    run.accumulate()
    run.summarize()
    figures = evaluate(dataset, results, toolkit=toolkit)[task]
    assert figures == pytest.approx(dict(zip(METRICS, [*run.stats[:6], run.stats[8]], strict=True)), abs=1e-12)


@both_toolkits
def test_mask_sizes_come_from_masks_not_boxes(tmp_path, toolkit):
    # a false positive whose mask is small but whose box is large belongs to APs
    content = coco_content()
    results = truth_as_results(content, with_crowd=False)
    thin = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.bool)
    thin[0, 150, :150] = True
    extra = {
        "boxes": torch.tensor([[0.0, 0.0, 150.0, 151.0]]),
        "scores": torch.tensor([0.99]),
        "labels": torch.tensor([0]),
        "masks": thin,
    }
    results[1] = {key: torch.cat([results[1][key], extra[key]]) for key in extra}
    figures = evaluate(make_dataset(tmp_path), results, toolkit=toolkit)
    assert figures["segm"]["APs"] < 0.9
    assert figures["segm"]["APm"] == pytest.approx(1, abs=1e-12)
    assert figures["bbox"]["APs"] == pytest.approx(1, abs=1e-12)


@both_toolkits
def test_no_detections_score_zero(tmp_path, toolkit, caplog):
    with caplog.at_level(logging.WARNING):
        figures = evaluate(make_dataset(tmp_path), [empty_result()] * 3, toolkit=toolkit, output_dir=tmp_path)
    assert figures["bbox"]["AP"] == figures["segm"]["AP"] == 0
    assert figures["segm"]["AR100"] == 0
    assert "no object was detected" in caplog.text
    assert json.loads((tmp_path / "coco_instances_results.json").read_text()) == []


@both_toolkits
def test_figures_without_ground_truth_are_nan(tmp_path, toolkit):
    content = coco_content()
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] != 90 and a["area"] < 96**2]
    figures = evaluate(make_dataset(tmp_path, content), truth_as_results(content, False), toolkit=toolkit)
    assert math.isnan(figures["bbox"]["APl"])
    assert math.isnan(figures["bbox_per_class"]["toothbrush"])
    assert figures["bbox"]["AP"] == pytest.approx(1, abs=1e-12)


def test_only_processed_images_are_scored(tmp_path, caplog):
    dataset = make_dataset(tmp_path)
    result = truth_as_results(coco_content(), with_crowd=False)[0]
    with caplog.at_level(logging.WARNING):
        figures = evaluate(dataset, [result], image_ids=[7])
    assert figures["segm"]["AP"] == pytest.approx(1, abs=1e-12)
    assert math.isnan(figures["segm_per_class"]["toothbrush"])
    assert "1 processed images of the dataset's 3" in caplog.text


def test_an_image_processed_twice_counts_once(tmp_path):
    truth = truth_as_results(coco_content(), with_crowd=False)
    figures = evaluate(make_dataset(tmp_path), [*truth, truth[0]], image_ids=(7, 11, 20, 7))
    assert figures["bbox"]["AP"] == pytest.approx(1, abs=1e-12)


def test_max_dets_per_image_limits_what_counts(tmp_path):
    content = coco_content()
    results = truth_as_results(content, with_crowd=False)
    figures = evaluate(make_dataset(tmp_path), results, max_dets_per_image=1)
    assert figures["bbox"]["AR1"] < 1
    assert figures["bbox"]["AP"] < 1
    assert "AR100" not in figures["bbox"]


def test_repeated_evaluation_gives_the_same(tmp_path):
    evaluator = COCOEvaluator(make_dataset(tmp_path))
    results = random_results(coco_content(), seed=3)
    runs = []
    for _ in range(2):
        evaluator.reset()
        evaluator.process([{"image_id": i} for i in (7, 11, 20)], results)
        runs.append(evaluator.evaluate())
    assert runs[0] == runs[1]


def test_results_file_and_its_content(tmp_path):
    truth = truth_as_results(coco_content(), with_crowd=False)
    evaluate(make_dataset(tmp_path), truth, output_dir=tmp_path / "new" / "folder")
    written = json.loads((tmp_path / "new" / "folder" / "coco_instances_results.json").read_text())
    assert len(written) == 6
    first = written[0]
    assert (first["image_id"], first["category_id"]) == (7, 3)
    assert first["bbox"] == [10, 10, 20, 20]
    assert isinstance(first["segmentation"]["counts"], str)
    np.testing.assert_array_equal(mask_util.decode(first["segmentation"]), truth[0]["masks"][0])
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["coco_instances_results.json"]


def test_conversion_leaves_the_results_alone():
    result = {
        "boxes": torch.tensor([[1.0, 2.0, 5.0, 9.0]], dtype=torch.float64),
        "scores": torch.tensor([0.5]),
        "labels": torch.tensor([1]),
    }
    (detection,) = to_coco_results(result, 4, CATEGORY_IDS)
    assert detection == {"image_id": 4, "category_id": 17, "bbox": [1, 2, 4, 7], "score": 0.5}
    assert result["boxes"].tolist() == [[1, 2, 5, 9]]


def test_box_only_results_give_box_figures(tmp_path):
    results = truth_as_results(coco_content(), with_crowd=False)
    for result in results:
        del result["masks"]
    figures = evaluate(make_dataset(tmp_path), results)
    assert set(figures) == {"bbox", "bbox_per_class"}


def test_box_only_ground_truth_gives_box_figures(tmp_path, caplog):
    content = coco_content()
    results = truth_as_results(content, with_crowd=False)
    for item in content["annotations"]:
        del item["segmentation"], item["area"]
        if not item["iscrowd"]:
            del item["iscrowd"]
    figures = evaluate(make_dataset(tmp_path, content), results)
    assert set(figures) == {"bbox", "bbox_per_class"}
    assert figures["bbox"]["APs"] == figures["bbox"]["APl"] == pytest.approx(1, abs=1e-12)
    assert "only box AP" in caplog.text


def test_missing_area_and_iscrowd_are_filled_in(tmp_path):
    content = coco_content()
    results = truth_as_results(content, with_crowd=False)
    expected = evaluate(make_dataset(tmp_path, content), random_results(content, seed=1))
    for item in content["annotations"]:
        del item["area"]
        if not item["iscrowd"]:
            del item["iscrowd"]
    dataset = make_dataset(tmp_path, content)
    assert evaluate(dataset, results)["segm"]["APs"] == pytest.approx(1, abs=1e-12)
    assert evaluate(dataset, random_results(coco_content(), seed=1)) == expected


@both_toolkits
@pytest.mark.parametrize("missing", [None, [], [[]], [[5.0, 5.0, 9.0, 9.0]]], ids=["null", "empty", "hollow", "line"])
def test_objects_without_a_mask_are_ignored(tmp_path, toolkit, missing, caplog):
    content = coco_content()
    results = truth_as_results(content, with_crowd=False)
    content["annotations"][2]["segmentation"] = missing
    figures = evaluate(make_dataset(tmp_path, content), results, toolkit=toolkit)
    assert figures["segm"]["AP"] == figures["bbox"]["AP"] == pytest.approx(1, abs=1e-12)
    assert "1 objects without a usable mask are ignored" in caplog.text
    results[0] = {key: value[:2] for key, value in results[0].items()}
    assert evaluate(make_dataset(tmp_path, content), results, toolkit=toolkit)["segm"]["AR100"] == 1


@both_toolkits
def test_objects_without_a_mask_count_where_boxes_alone_are_scored(tmp_path, toolkit):
    content = coco_content()
    del content["annotations"][0]["segmentation"]
    dataset = make_dataset(tmp_path, content)
    dataset.use_masks = False
    results = truth_as_results(coco_content(), with_crowd=False)
    for result in results:
        del result["masks"]
    results[0] = {key: value[1:] for key, value in results[0].items()}
    figures = evaluate(dataset, results, toolkit=toolkit)
    assert figures["bbox_per_class"]["car"] < 0.6, "the missed object must count as missed"
    assert "segm" not in figures


def changed(**fields):
    return lambda content: content["annotations"][2].update(fields)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c["annotations"][2].pop("bbox"), r"annotations\[2\] must have bbox"),
        (lambda c: c["images"].pop(0), "annotation 0 of image 7 refers to an image that the file does not list"),
        (changed(segmentation={"size": [HEIGHT, WIDTH], "counts": "PPPP"}), "annotation 2 of image 7: counts"),
        (changed(segmentation={"counts": [HEIGHT * WIDTH]}), "annotation 2 of image 7: size"),
        (changed(iscrowd="0"), "annotation 2 of image 7: iscrowd"),
        (changed(id=1), "id 1 in annotations .*twice"),
    ],
    ids=["no-box", "no-image", "counts", "size", "iscrowd", "id"],
)
def test_flawed_ground_truth_is_named_when_the_evaluation_is_built(tmp_path, spoil, message):
    content = coco_content()
    spoil(content)
    cfg = OmegaConf.create(flags={"allow_objects": True})
    cfg.dataloader = {"evaluator": LazyCall(COCOEvaluator)()}
    with pytest.raises(DataError, match=rf"instances\.json: {message}"):
        Evaluation.from_config(cfg, SimpleNamespace(dataset=make_dataset(tmp_path, content)))


@both_toolkits
def test_annotations_to_ignore_are_as_crowds(tmp_path, toolkit):
    content = coco_content()
    del content["annotations"][-1]["iscrowd"]
    content["annotations"][-1]["ignore"] = 1
    results = random_results(coco_content(), seed=4)
    expected = evaluate(make_dataset(tmp_path), results, toolkit=toolkit)
    assert evaluate(make_dataset(tmp_path, content), results, toolkit=toolkit) == expected
    content["annotations"][-1]["ignore"] = 0
    assert evaluate(make_dataset(tmp_path, content), results, toolkit=toolkit) != expected


@both_toolkits
def test_what_cannot_be_rasterized_does_not_reach_the_toolkits(tmp_path, toolkit, caplog):
    content = coco_content()
    expected = evaluate(make_dataset(tmp_path), truth_as_results(content, with_crowd=False), toolkit=toolkit)
    # the toolkits would read the four numbers as a box, and need gigabytes for the far points
    unusable = [[1.0, 1.0, 5.0, 5.0], [], [float("nan")] * 6, [1e9, 1e9, -1e9, 1e9, 1e9, -1e9]]
    content["annotations"][0]["segmentation"][:0] = unusable
    content["annotations"].append(annotation(99, 7, 3, (float("nan"), 1, 1, 1)))
    dataset = make_dataset(tmp_path, content)
    assert evaluate(dataset, truth_as_results(coco_content(), with_crowd=False), toolkit=toolkit) == expected
    assert "1 annotations whose box is not finite are left out of the evaluation (annotations 99)" in caplog.text


def test_errors_name_the_culprit(tmp_path):
    result = truth_as_results(coco_content(), with_crowd=False)[0]
    with pytest.raises(ValueError, match="no dataset"):
        COCOEvaluator().process([{"image_id": 7}], [result])
    dataset = make_dataset(tmp_path)
    with pytest.raises(ValueError, match="no image was processed"):
        evaluate(dataset, [], image_ids=[])
    with pytest.raises(ValueError, match="no image with id 99"):
        evaluate(dataset, [result], image_ids=[99])
    result["labels"][0] = 3
    with pytest.raises(ValueError, match=r"image 7: labels run from 0 to 3.*3 categories"):
        evaluate(dataset, [result], image_ids=[7])


@both_toolkits
def test_toolkits_are_quiet(tmp_path, toolkit, capfd, caplog):
    with caplog.at_level(logging.INFO):
        evaluate(make_dataset(tmp_path), random_results(coco_content(), seed=2), toolkit=toolkit)
    assert capfd.readouterr().out == ""
    assert [record.name for record in caplog.records] == ["mimdet.evaluation.coco_evaluator"] * 2
    assert toolkit in caplog.records[0].getMessage()


def test_toolkit_choice(monkeypatch):
    assert choose_toolkit("pycocotools") == "pycocotools"
    with pytest.raises(ValueError, match="unknown COCO toolkit 'coco'"):
        choose_toolkit("coco")
    monkeypatch.setitem(__import__("sys").modules, "faster_coco_eval", None)
    assert choose_toolkit() == "pycocotools"
    with pytest.raises(ImportError, match="install faster-coco-eval"):
        choose_toolkit("faster_coco_eval")


def test_two_ranks_give_the_figures_of_one(tmp_path, monkeypatch):
    """``gather`` itself is tested with two processes in tests/engine/test_distributed.py."""
    dataset, results, images = make_dataset(tmp_path), random_results(coco_content(), seed=5), (7, 11, 20)
    expected = evaluate(dataset, results)
    sent = []
    monkeypatch.setattr(
        coco_evaluator, "gather", lambda value: sent.append(value) or (sent if len(sent) == 2 else None)
    )
    # DistributedSampler's even split repeats the last image of an odd number; the first rank comes last
    for shares, figures in (((1, 0), {}), ((0, 2), expected)):
        assert evaluate(dataset, [results[i] for i in shares], [images[i] for i in shares]) == figures


def test_interrupted_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, [1])
    with pytest.raises(TypeError):
        write_json(path, [object()])
    assert json.loads(path.read_text()) == [1]
    assert list(tmp_path.iterdir()) == [path]


FIGURES = {
    "bbox": dict(zip(METRICS, (0.51234, 0.7, 0.55, float("nan"), 0.5, 0.6, 0.65), strict=True)),
    "bbox_per_class": {"car": 0.5, "cat": float("nan"), "dog": 0.25, "bus": 1.0},
    "segm": dict(zip(METRICS, (0.45, 0.69, 0.5, 0.2, 0.4, 0.5, 0.6), strict=True)),
    "segm_per_class": {"car": 0.4, "cat": float("nan"), "dog": 0.2, "bus": 0.9},
}


def test_copypaste_lines_are_percent_like_detectron2():
    assert copypaste_lines(FIGURES) == [
        "copypaste: Task: bbox",
        "copypaste: AP,AP50,AP75,APs,APm,APl",
        "copypaste: 51.2340,70.0000,55.0000,nan,50.0000,60.0000",
        "copypaste: Task: segm",
        "copypaste: AP,AP50,AP75,APs,APm,APl",
        "copypaste: 45.0000,69.0000,50.0000,20.0000,40.0000,50.0000",
    ]


def test_tables_show_every_figure_and_class():
    text = format_results(FIGURES, width=100)
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.split()}
    assert rows["box"] == ["51.2", "70.0", "55.0", "-", "50.0", "60.0", "65.0"]
    assert rows["mask"] == ["45.0", "69.0", "50.0", "20.0", "40.0", "50.0", "60.0"]
    assert rows["car"] == ["50.0", "40.0", "dog", "25.0", "20.0"]
    assert rows["cat"] == ["-", "-", "bus", "100.0", "90.0"]
    assert max(map(len, text.splitlines())) <= 100
    assert text.splitlines()[-6:] == copypaste_lines(FIGURES)
    assert "class" not in format_results(FIGURES, per_class=False)
    marked = {"bbox": FIGURES["bbox"], "bbox_per_class": {"[/b]": 0.5}}
    assert "[/b]" in format_results(marked), "a name is not console markup"
    assert results_table({"bbox": FIGURES["bbox"]}).row_count == 1
