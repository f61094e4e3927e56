"""Detectron2's own training script, and ours, on a small model and a small set in COCO's layout."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.paths import ROOT

from mimdet.testing.small import SMALL

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import detectron2
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from support import detectron2_testing as d2

from mimdet.data.synthetic import generate_shapes
from mimdet.detectron2 import train

TOOL = Path(detectron2.__file__).parents[1] / "tools" / "lazyconfig_train_net.py"
TINY = [
    *d2.spelled(SMALL),
    "model.roi_heads.batch_size_per_image=32",
    "model.roi_heads.box_predictor.test_score_thresh=0.0",
    "model.proposal_generator.post_nms_topk=[100,50]",
    "dataloader.train.total_batch_size=2",
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
    "dataloader.train.mapper.augmentations.2.short_edge_length=[96]",
    "dataloader.test.mapper.augmentations.0.short_edge_length=96",
    "train.max_iter=2",
    "train.eval_period=2",
    "train.checkpointer.period=1",
    "train.log_period=1",
]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """A folder in Detectron2's layout, with COCO's categories: the COCO sample, or else generated shapes."""
    root = tmp_path_factory.mktemp("datasets") / "coco"
    if "MIMDET_COCO_SAMPLE" in os.environ:
        root.symlink_to(d2.folder("MIMDET_COCO_SAMPLE"))
        return root.parent
    shapes = generate_shapes(root.parent / "shapes", 6, 2, image_size=(96, 128), seed=3)
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        content = json.loads((shapes / "annotations" / f"instances_{split}.json").read_text())
        content["categories"] = [{"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]]
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
        (root / f"{split}2017").symlink_to(shapes / split)
    return root.parent


@pytest.fixture(scope="module")
def run(datasets):
    def run(*command, **variables):
        """Outside of the checkout, where our configs are found by name."""
        env = {**os.environ, "DETECTRON2_DATASETS": str(datasets), "PYTHONPATH": os.pathsep.join(sys.path), **variables}
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=datasets, env=env, capture_output=True, text=True, timeout=1500
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
        return done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """Output folder and log of two iterations under Detectron2's own script."""
    if not TOOL.is_file():
        pytest.skip("this Detectron2 comes without its tools/")
    output = tmp_path_factory.mktemp("output")
    log = run(TOOL, "--config-file", ROOT / d2.BASE, *TINY, f"train.output_dir='{output}'")
    return output, log


def checkpoint(path):
    return torch.load(path, weights_only=True)


def test_detectron2s_script_trains_and_evaluates(trained):
    output, log = trained
    assert "copypaste: AP,AP50,AP75,APs,APm,APl" in log
    lines = (output / "metrics.json").read_text().splitlines()
    metrics = {name for line in lines for name in json.loads(line)}
    losses = {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask"}
    assert {*losses, "bbox/AP", "segm/AP"} <= metrics
    assert checkpoint(output / "model_final.pth")["iteration"] == 1


def test_ours_resumes_what_detectron2s_script_began(run, trained):
    output, _ = trained
    options = [f"train.output_dir='{output}'", "train.max_iter=3", "train.eval_period=0"]
    log = run("-m", "mimdet.detectron2", "--config-file", d2.BASE, "--resume", *TINY, *options)
    assert "Starting training from iteration 2" in log
    saved = checkpoint(output / "model_final.pth")
    assert saved["iteration"] == 2
    before, after = (checkpoint(output / f"model_000000{i}.pth")["model"] for i in (1, 2))
    assert any(not torch.equal(before[k], after[k]) for k in before)


def test_ours_evaluates_only(run, trained):
    """With the original's documented command, on weights in the native format."""
    output, _ = trained
    weights = output / "native.pth"
    torch.save({"model": checkpoint(output / "model_final.pth")["model"]}, weights)
    options = [f"train.init_checkpoint='{weights}'", "model.backbone.bottom_up.sample_ratio=1.0"]
    options += [f"train.output_dir='{output / 'eval'}'"]
    log = run("-m", "mimdet.detectron2", "--config-file", d2.BASE, "--num-gpus", 1, "--eval-only", *TINY, *options)
    assert "copypaste: AP,AP50,AP75,APs,APm,APl" in log
    assert "were not found in the checkpoint" not in log


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    """The docs' config whose step is native."""
    file = tmp_path_factory.mktemp("configs") / "fast.py"
    file.write_text((ROOT / "docs" / "detectron2.md").read_text().split("```python\n")[2].partition("```")[0])
    return file


def test_detectron2s_script_runs_the_fast_step(run, trained, fast, tmp_path):
    """From the checkpoint of Detectron2's heads."""
    output, _ = trained
    options = [f"train.output_dir='{tmp_path}'", f"train.init_checkpoint='{output / 'model_final.pth'}'"]
    log = run(TOOL, "--config-file", fast, *TINY, *options)
    assert "copypaste: AP,AP50,AP75,APs,APm,APl" in log
    assert "not found in the checkpoint" not in log
    metrics = {name for line in (tmp_path / "metrics.json").read_text().splitlines() for name in json.loads(line)}
    assert {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask", "bbox/AP", "segm/AP"} <= metrics
    before, after = (checkpoint(folder / "model_final.pth")["model"] for folder in (output, tmp_path))
    assert before.keys() == after.keys()


@pytest.mark.parametrize("config", ["detectron2", "fast"])
def test_two_processes(run, tmp_path, config, fast):
    """Gradients are compressed, and weights equal in both processes, which use the CPU without GPUs."""
    file = fast if config == "fast" else d2.BASE
    options = [f"train.output_dir='{tmp_path}'", "train.eval_period=0", "train.ddp.fp16_compression=True"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = ["--node_rank", 0, "--master_addr", "127.0.0.1", "--master_port", port]
    log = run("-m", "mimdet.detectron2", "--config-file", file, "--num-gpus", 2, *address, *TINY, *options)
    assert "World size: 2" in log
    assert checkpoint(tmp_path / "model_final.pth")["iteration"] == 1


@pytest.mark.parametrize(
    ("flags", "rank", "url"),
    [
        ("--num-gpus 8 --num-machines 2 --node_rank 1 --dist-url tcp://a:1", 1, "tcp://a:1"),
        ("--num-gpus 8 --machine-rank 1 --master_addr host --master_port 1234", 1, "tcp://host:1234"),
    ],
)
def test_flags_of_the_original(flags, rank, url):
    args = train.parse(["--config-file", "c.py", *flags.split(), "a.b=1"])
    assert (args.num_gpus, args.machine_rank, args.dist_url, args.opts) == (8, rank, url, ["a.b=1"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "--config-file is needed"),
        ("--config-file c.py --master_addr host", "give both"),
        ("--config-file c.py --num-gpus 0", "1 runs on the CPU"),
    ],
)
def test_bad_flags(capsys, flags, message):
    with pytest.raises(SystemExit):
        train.parse(flags.split())
    assert message in capsys.readouterr().err


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    d2.hide_the_original(monkeypatch)
    config, empty = tmp_path / "c.py", tmp_path / "empty.py"
    config.write_text("from models import MIMDetBackbone")
    empty.write_text("model = {}")
    for flags, message in (
        (["--config-file", str(config)], "import from mimdet.detectron2 instead"),
        (["--config-file", str(empty)], "lacks dataloader, optimizer, lr_multiplier, train"),
        (["--config-file", "nothing.py"], "no config file 'nothing.py'"),
        (["--config-file", d2.BASE, "train.device=gpu"], "is not a device"),
        *([] if torch.cuda.is_available() else [(["--config-file", d2.BASE, "train.device=cuda"], "sees no GPU")]),
    ):
        with pytest.raises(SystemExit, match=message):
            train.main(flags)


def test_batch_size_scales_the_schedule_and_device_follows_the_machine(tmp_path):
    cfg = train.load_config(d2.BASE, ["dataloader.train.total_batch_size=16", "train.amp.enabled=True"])
    lines = train.scale_to_batch_size(cfg)
    assert cfg.optimizer.lr == pytest.approx(2e-5)
    assert cfg.train.max_iter == 270_000
    assert len(lines) == 5
    there = torch.cuda.is_available()
    for word in ("auto", "cuda"):  # the original's configs say "cuda"
        cfg.train.device = word
        note = train._settle_device(cfg, [])
        assert cfg.train.device == ("cuda" if there else "cpu")
        assert cfg.train.amp.enabled == there
        assert cfg.train.device in note
    if not there:
        cfg.train.device = "cuda"
        with pytest.raises(RuntimeError, match="PyTorch sees no GPU"):
            train._settle_device(cfg, ["train.device"])
