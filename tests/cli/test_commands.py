"""The command line, from the demo's training to converted weights."""

import contextlib
import io
import json
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.command import run

import mimdet
from mimdet import demo, show
from mimdet.checkpoint.read import read_checkpoint
from mimdet.predict import Predictor
from mimdet.show import model_page

QUICK = [
    "train.max_iter=3",
    "train.eval_period=2",
    "train.checkpointer.period=2",
    "dataloader.train.total_batch_size=2",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Output folder of a demo of three iterations."""
    output = tmp_path_factory.mktemp("my demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "NUM_TRAIN", 6)
        patch.setattr(demo, "NUM_VAL", 3)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert run(patch, "demo", "--output", output, *QUICK) == 0
    (output / "printed.txt").write_text(printed.getvalue())
    return output


def test_the_demos_last_line_is_a_command(trained):
    """The folder's name has a space."""
    line = (trained / "printed.txt").read_text().strip().splitlines()[-1]
    *_, option, weights, images = shlex.split(line.removeprefix("Next: "))
    assert option == "--weights"
    assert (Path(weights), Path(images)) == (trained / "model_final.pth", trained / "shapes/val")


def test_the_demo_shows_losses_and_ap_at_each_evaluation(trained):
    printed = (trained / "printed.txt").read_text()
    assert printed.count("predictions.png  drawn anew") == 2
    assert printed.index("2/3") < printed.index("3/3")
    for column in ("total loss", "box AP50", "mask AP50", "time left"):
        assert all(word in printed for word in column.split()), column


def test_demo_leaves_everything(trained):
    for name in ("metrics.json", "curves.png", "predictions.png", "model_final.pth", "config.yaml", "log.txt"):
        assert (trained / name).stat().st_size > 0, name
    content = json.loads((trained / "metrics.json").read_text())
    assert set(content["metrics"]) >= {"bbox", "segm"}
    assert min(content[key] for key in ("minutes", "cpu_minutes", "cores")) > 0
    for name in ("curves.png", "predictions.png"):
        assert (trained / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("config", "tasks"), [("cascade_mask_rcnn", {"bbox", "segm"}), ("retinanet", {"bbox"})])
def test_demo_of_other_detectors(monkeypatch, tmp_path, capsys, config, tasks):
    monkeypatch.setattr(demo, "NUM_TRAIN", 4)
    monkeypatch.setattr(demo, "NUM_VAL", 2)
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "demo", "--config-file", f"demo_{config}", *QUICK, "train.max_iter=1") == 0
    output = Path(f"output/demo_{config}")
    metrics = json.loads((output / "metrics.json").read_text())["metrics"]
    assert {task for task in ("bbox", "segm") if task in metrics} == tasks
    assert (output / "predictions.png").read_bytes().startswith(b"\x89PNG")
    assert str(output / "model_final.pth") in capsys.readouterr().out.replace("\n", "")
    predictor = Predictor(None, output / "model_final.pth", score_threshold=0.0)
    page = model_page(predictor, next((output / "shapes/val").iterdir()))
    rows = 2  # image, c2 to c5, detections; proposals change nothing in a grid of four columns
    assert rows * 420 < page.shape[1] < (rows + 1) * 420


def test_show_writes_what_a_detector_computes(trained, monkeypatch, tmp_path, capsys):
    image = next((trained / "shapes/val").iterdir())
    seen = []
    image_grid = show.image_grid
    monkeypatch.setattr(
        show, "image_grid", lambda rows, captions: seen.extend(captions) or image_grid(rows, captions=captions)
    )
    path = tmp_path / "new/page.png"
    assert run(monkeypatch, "show", "model", image, "--weights", trained / "model_final.pth", "--output", path) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.strip() == str(path)
    names = [caption.split(",")[0] for caption in seen]
    assert names[:5] == ["image", "c2", "c3", "c4", "c5"]
    assert names[5].startswith("best 50 of")
    assert names[6].endswith("detections")


def test_show_writes_training_samples(trained, monkeypatch, tmp_path):
    path = tmp_path / "page.png"
    command = ["show", "data", "--config-file", "demo", f"train.output_dir={trained}", "--images", 2]
    assert run(monkeypatch, *command, "--output", path) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_eval_repeats_the_training_figures(trained, monkeypatch, tmp_path):
    weights = f"train.init_checkpoint={trained / 'model_final.pth'}"
    status = run(
        monkeypatch, "eval", "--config-file", "demo", weights, f"train.output_dir={tmp_path}",
        "--val-json", trained / "shapes/annotations/instances_val.json", "--val-images", trained / "shapes/val",
    )  # fmt: skip
    assert status == 0
    assert (tmp_path / "coco_instances_results.json").read_text() == (
        trained / "coco_instances_results.json"
    ).read_text()


def test_train_eval_only_from_the_saved_config(trained, monkeypatch, capsys):
    weights = f"train.init_checkpoint={trained / 'model_final.pth'}"
    assert run(monkeypatch, "train", "--config-file", trained / "config.yaml", "--eval-only", weights) == 0
    assert "AP50" in capsys.readouterr().out


def test_train_resumes_and_takes_own_data(trained, monkeypatch, tmp_path, capsys):
    data = [
        "--train-json", trained / "shapes/annotations/instances_train.json", "--train-images", trained / "shapes/train",
        "--val-json", trained / "shapes/annotations/instances_val.json", "--val-images", trained / "shapes/val",
    ]  # fmt: skip
    command = ["train", "--config-file", "demo", *data, *QUICK, f"train.output_dir={tmp_path}"]
    assert run(monkeypatch, *command, "train.max_iter=2") == 0
    assert run(monkeypatch, *command, "--resume") == 0
    assert "resuming from" in capsys.readouterr().out
    iterations = [json.loads(line)["iteration"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(iterations) == 2


def test_predict_needs_only_weights(trained, monkeypatch, tmp_path, capsys, caplog):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    images = sorted((trained / "shapes/val").iterdir())
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "nowhere.png")
    status = run(
        monkeypatch, "predict", "--weights", trained / "model_final.pth", "--score-threshold", "0",
        "--output", tmp_path / "out", trained / "shapes/val", broken, folder,
    )  # fmt: skip
    assert status == 0
    assert "broken.jpg" in caplog.text
    assert "link.png" in caplog.text
    assert "the config finds nothing below 0.05" in caplog.text
    assert {p.stem for p in (tmp_path / "out").glob("*.png")} == {p.stem for p in images}
    predictions = json.loads((tmp_path / "out/predictions.json").read_text())
    printed = capsys.readouterr().out
    assert f"{len(predictions)} objects in" in printed
    assert "2 images were skipped" in printed
    assert {"image_id", "category_id", "bbox", "score", "segmentation", "file_name"} <= set(predictions[0])


def test_convert_strips_and_goes_to_mae_and_back(trained, monkeypatch, tmp_path, capsys):
    from mimdet.config import instantiate, load

    source = trained / "model_final.pth"
    assert run(monkeypatch, "convert", source, tmp_path / "detector.pth") == 0
    assert run(monkeypatch, "convert", source, tmp_path / "mae.pth", "--to", "mae") == 0
    assert run(monkeypatch, "convert", tmp_path / "mae.pth", tmp_path / "backbone.pth", "--to", "backbone") == 0
    weights = read_checkpoint(source)["model"]
    stripped = read_checkpoint(tmp_path / "detector.pth")
    assert set(stripped) == {"model", "meta"}
    assert all(torch.equal(stripped["model"][k], v) for k, v in weights.items())
    assert (tmp_path / "detector.pth").stat().st_size < 0.5 * source.stat().st_size
    backbone = read_checkpoint(tmp_path / "backbone.pth")["model"]
    assert len(backbone) > 70
    assert all(torch.equal(weights[k], v) for k, v in backbone.items())
    model = instantiate(load("demo", [f"mae_checkpoint.path={tmp_path / 'mae.pth'}"]).model)
    loaded = model.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in backbone.items())
    assert run(monkeypatch, "convert", tmp_path / "mae.pth", tmp_path / "x.pth") == 1
    assert "is not a MIMDet detector" in capsys.readouterr().err
    assert not (tmp_path / "x.pth").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--config-file", "nothing.py"], "no config file 'nothing.py'; shipped with mimdet"),
        (["train", "--config-file", "demo", "train.max_itr=1"], "did you mean 'train.max_iter'"),
        (["train", "--config-file", "demo", "--train-json", "a.json"], "--train-json and --train-images belong"),
        (["train", "--config-file", "demo", "train.output_dir=TMP"], "annotation file not found"),
        (["eval", "--config-file", "demo"], "train.init_checkpoint=PATH"),
        (["predict", "--weights", "nothing.pth", __file__], "no checkpoint at nothing.pth"),
        (["predict", "--weights", "nothing.pth", "TMP/no.jpg"], "no such file or folder"),
        (["predict", "--weights", "nothing.pth", __file__, "--output", __file__], "is not a folder"),
        (["demo", "--config-file", "mimdet_b_mask_rcnn"], "use one of demo, demo_cascade_mask_rcnn, demo_retinanet"),
        (["convert", "nothing.pth", "TMP/x.pth"], "no checkpoint at nothing.pth"),
    ],
)
def test_errors_are_one_message(monkeypatch, capsys, tmp_path, argv, message):
    assert run(monkeypatch, *[a.replace("TMP", str(tmp_path)) for a in argv]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err
    assert message not in out, "said once"


def test_convert_replaces_nothing_unasked(trained, monkeypatch, tmp_path, capsys):
    source = tmp_path / "model.pth"
    source.write_bytes((trained / "model_final.pth").read_bytes())
    before = source.read_bytes()
    (tmp_path / "link.pth").symlink_to(source)
    for target in (source, tmp_path / "link.pth", tmp_path / "new" / ".." / "model.pth"):
        assert run(monkeypatch, "convert", source, target, "--force") == 1
        assert "into itself" in capsys.readouterr().err
    (tmp_path / "other.pth").write_bytes(b"other")
    assert run(monkeypatch, "convert", source, tmp_path / "other.pth") == 1
    assert "other.pth exists: give another target, or --force" in capsys.readouterr().err
    assert (tmp_path / "other.pth").read_bytes() == b"other"
    assert source.read_bytes() == before
    assert run(monkeypatch, "convert", source, tmp_path / "other.pth", "--force") == 0
    assert "model" in read_checkpoint(tmp_path / "other.pth")


def test_version(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"mimdet {mimdet.__version__}\n"


def test_a_repeated_demo_goes_on_or_starts_anew(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "NUM_TRAIN", 4)
    monkeypatch.setattr(demo, "NUM_VAL", 2)
    command = ["demo", "--output", tmp_path, *QUICK, "train.max_iter=1"]
    monkeypatch.setattr(demo, "_draw_predictions", lambda *arguments: None)
    monkeypatch.setattr(demo, "plot_training", lambda *args, **options: None)
    for options, said in (([], "Starting from the beginning"), ([], "resuming from"), (["--overwrite"], "deleted the")):
        assert run(monkeypatch, *command, *options) == 0
        assert said in capsys.readouterr().out
    assert (tmp_path / "model_final.pth").exists()


def test_a_demo_without_results_is_refused_at_once(monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, "demo", "--output", tmp_path / "out", "dataloader.evaluator.output_dir=null") == 1
    assert "dataloader.evaluator.output_dir is not set" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["demo", "train", "eval", "predict", "show", "info", "convert"])
def test_help_teaches(monkeypatch, capsys, command):
    assert run(monkeypatch, command, "--help") == 0
    assert len(capsys.readouterr().out.splitlines()) > 5


def test_info_names_what_matters(monkeypatch, capsys):
    assert run(monkeypatch, "info") == 0
    out = capsys.readouterr().out
    for word in ("torch", "pycocotools", "cpu", "attention"):
        assert word in out


def test_show_replaces_only_its_own_pages(trained, monkeypatch, tmp_path, capsys):
    image = tmp_path / "image.png"
    Image.open(next((trained / "shapes/val").iterdir())).save(image)
    config = tmp_path / "config.yaml"
    config.write_bytes((trained / "config.yaml").read_bytes())
    model = ["show", "model", image, "--weights", trained / "model_final.pth"]
    data = ["show", "data", "--config-file", config, "--images", 1]
    annotations = trained / "shapes/annotations/instances_train.json"
    for command, source in ((model, image), (model, config), (data, config), (data, annotations), (data, tmp_path)):
        before = source.read_bytes() if source.is_file() else None
        assert run(monkeypatch, *command, "--output", source) == 1
        assert f"{source} exists, and mimdet show did not write it" in capsys.readouterr().err
        assert before is None or source.read_bytes() == before
    for _ in range(2):
        assert run(monkeypatch, *data, "--output", tmp_path / "page.png") == 0


def test_convert_config_spares_its_source(monkeypatch, tmp_path, capsys):
    source, link = tmp_path / "mine.py", tmp_path / "link.py"
    source.write_text("from mimdet.config import load\n_base = load('demo')\nmodel, train = _base.model, _base.train\n")
    link.symlink_to(source)
    before = source.read_text()
    for target in (source, link):
        assert run(monkeypatch, "convert-config", source, target, "--force") == 1
        assert "mine.py into itself" in capsys.readouterr().err
        assert source.read_text() == before


def test_parity_writes_two_files(monkeypatch, tmp_path, capsys):
    both = ["--json", tmp_path / "a", "--junit", tmp_path / "." / "a"]
    assert run(monkeypatch, "parity", "--quick", "--only", "nms_slots-eager", *both) == 2
    assert "give each another file" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    (tmp_path / "annotations.json").write_text("[]")
    for option in ("--json", "--junit"):
        command = ["parity", "--quick", "--only", "nms_slots-eager", option]
        assert run(monkeypatch, *command, tmp_path / "annotations.json") == 2
        assert "annotations.json exists, and mimdet parity did not write it" in capsys.readouterr().err
        for _ in range(2):
            assert run(monkeypatch, *command, tmp_path / f"new{option}") == 0
    assert (tmp_path / "annotations.json").read_text() == "[]"
    assert run(monkeypatch, "bench", "ops", "--output", tmp_path / "annotations.json") == 1
    assert "annotations.json exists, and mimdet bench did not write it" in capsys.readouterr().err


def test_a_missing_section_is_named(monkeypatch, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "from mimdet.config import load\ntrain, dataloader = load('demo').train, dict(a=1)\n"
    )
    assert run(monkeypatch, "train", "--config-file", tmp_path / "mine.py", f"train.output_dir={tmp_path / 'out'}") == 1
    err = capsys.readouterr().err
    assert err.startswith("error: config key dataloader.train: Missing key train")
    assert "MIMDET_DEBUG" not in err
