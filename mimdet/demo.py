"""The demo: trains, evaluates and draws a small detector on generated images."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import pycocotools.mask as mask_util
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torchvision.ops import box_convert
from torchvision.transforms.v2.functional import pil_to_tensor

from .config import find_config, instantiate, load
from .data import CocoDataset, read_image
from .data.synthetic import generate_shapes
from .engine import train
from .evaluation.coco_evaluator import RESULTS_FILE
from .files import write_json
from .kernels.build import cores
from .visualize import comparison_grid, plot_training
from .visualize.curves import read_metrics

NUM_TRAIN, NUM_VAL = 600, 60
_SHOWN = 8
_TASKS = (("bbox", "box"), ("segm", "mask"))
_RECENT = 5  # log lines whose medians are shown


def run_demo(
    output: str | Path | None = None,
    overrides: Sequence[str] = (),
    config: str | Path = "demo",
    overwrite: bool = False,
) -> dict:
    """Generate images, train a detector on them, evaluate, and draw.

    ``output`` receives ``shapes/`` (the images in COCO format), ``model_final.pth``, ``metrics.json``,
    ``curves.png`` and ``predictions.png``; the drawings after each evaluation.

    Args:
        output: folder, created when missing; by default the config's.
        overrides: ``key=value`` for the config.
        overwrite: train anew where ``output`` has an earlier demo. Without it, that demo is resumed; a finished one is
            only evaluated and drawn.
        config: one that trains and tests on ``shapes/`` in the folder, as ``configs/demo.py``.

    Returns:
        the evaluator's metrics, fractions.

    Raises:
        ValueError: the config does not train and test on ``shapes/``, or writes no results.
    """
    if output is not None:
        overrides = [f"train.output_dir={json.dumps(str(output))}", *overrides]
    cfg = load(config, overrides)
    console, output = Console(), Path(cfg.train.output_dir).expanduser()
    _check_data(cfg, config, output / "shapes")
    start, before = time.perf_counter(), os.times()
    console.print(f"Drawing {NUM_TRAIN} training and {NUM_VAL} held-out images ...")
    generate_shapes(output / "shapes", NUM_TRAIN, NUM_VAL)
    dataset = instantiate(cfg.dataloader.test.dataset)

    def show_progress() -> None:
        path = output / "predictions.png"
        _draw_predictions(dataset, Path(cfg.dataloader.evaluator.output_dir).expanduser() / RESULTS_FILE, path)
        console.print(_progress(output, cfg.train.max_iter))
        console.print(f"  {path}  drawn anew", soft_wrap=True, highlight=False)

    metrics = train(
        cfg, "auto" if not overwrite else False, overrides, overwrite=overwrite, after_evaluation=show_progress
    )
    minutes = (time.perf_counter() - start) / 60
    cpu_minutes = sum(now - then for now, then in zip(os.times()[:4], before[:4], strict=True)) / 60

    cost = {"minutes": round(minutes, 2), "cpu_minutes": round(cpu_minutes, 2), "cores": cores()}
    write_json(output / "metrics.json", {"metrics": metrics, **cost}, indent=2)
    plot_training(output / "metrics.jsonl", output / "curves.png", title=Path(config).stem)
    console.print(
        f"{NUM_VAL} held-out images, inference ratio 1.0, after {minutes:.1f} minutes "
        f"({cpu_minutes:.1f} CPU minutes on {cost['cores']} cores):"
    )
    console.print(_summary(metrics))
    for name, what in (
        ("predictions.png", "held-out images: ground truth above, predictions below"),
        ("curves.png", "losses and AP during training"),
        ("metrics.json", "all metrics"),
        ("model_final.pth", "the weights"),
    ):
        console.print(f"  {output / name}  {what}", soft_wrap=True, highlight=False)
    command = ["mimdet", "predict", "--weights", str(output / "model_final.pth"), str(output / "shapes" / "val")]
    console.print(f"Next: {shlex.join(command)}", markup=False, soft_wrap=True, highlight=False)
    return metrics


def _check_data(cfg: DictConfig, config: str | Path, shapes: Path) -> None:
    for split in ("train", "test"):
        file = OmegaConf.select(cfg, f"dataloader.{split}.dataset.json_file")
        if file is None or not Path(file).expanduser().is_relative_to(shapes):
            demos = ", ".join(sorted(path.stem for path in find_config("demo").parent.glob("demo*.py")))
            raise ValueError(
                f"config {config} is not a demo config: its {split} data are not the generated {shapes}; "
                f"use one of {demos}, or mimdet train"
            )
    if OmegaConf.select(cfg, "dataloader.evaluator.output_dir") is None:
        raise ValueError("dataloader.evaluator.output_dir is not set: the demo draws from the file in it")


def _draw_predictions(dataset: CocoDataset, results: Path, path: Path) -> None:
    """Draw the first images with their ground truth and the detections of a results file."""
    detected: dict[int, list[dict]] = {}
    for detection in json.loads(results.read_text(encoding="utf-8")):
        detected.setdefault(detection["image_id"], []).append(detection)
    records = [dataset[i] for i in range(min(_SHOWN, len(dataset)))]
    comparison_grid(
        [pil_to_tensor(read_image(record)) for record in records],
        [{**record, "boxes": torch.from_numpy(record["boxes"])} for record in records],
        [_prediction(detected.get(record["image_id"], []), dataset.category_ids) for record in records],
        dataset.classes,
        path=path,
    )


def _prediction(detections: list[dict], category_ids: Sequence[int]) -> dict[str, torch.Tensor]:
    """Fields of an image's COCO results."""
    boxes = torch.tensor([d["bbox"] for d in detections]).reshape(-1, 4)
    prediction = {
        "boxes": box_convert(boxes, "xywh", "xyxy"),
        "scores": torch.tensor([d["score"] for d in detections]),
        "labels": torch.tensor([category_ids.index(d["category_id"]) for d in detections], dtype=torch.int64),
    }
    if detections and "segmentation" in detections[0]:
        masks = mask_util.decode([d["segmentation"] for d in detections])
        prediction["masks"] = torch.from_numpy(masks).bool().permute(2, 0, 1)
    return prediction


def _progress(output: Path, max_iter: int) -> Table:
    """Losses and AP at each evaluation so far, and the time left."""
    training, evaluations = read_metrics(output / "metrics.jsonl")
    losses = [key for key in training[-1] if "loss" in key] if training else []
    scores = {f"{task}/AP50": f"{name} AP50" for task, name in _TASKS if f"{task}/AP50" in evaluations[-1]}
    table = Table()
    for column in ("iteration", *(key.removeprefix("loss_") for key in losses), *scores.values(), "time left"):
        table.add_column(column.replace("_", " "), justify="right")
    for evaluation in evaluations:
        iteration = evaluation["iteration"]
        recent = [line for line in training if line["iteration"] <= iteration][-_RECENT:]
        median = {key: statistics.median(line[key] for line in recent) for key in (*losses, "time") if recent}
        left = f"{median['time'] * (max_iter - iteration - 1) / 60:.1f} min" if recent else "-"
        shown = [f"{median[key]:.3f}" if recent else "-" for key in losses]
        table.add_row(f"{iteration + 1}/{max_iter}", *shown, *(f"{evaluation[key]:.3f}" for key in scores), left)
    return table


def _summary(metrics: dict) -> Table:
    table = Table()
    for column in ("", "AP", "AP50", "AP75"):
        table.add_column(column, justify="left" if not column else "right")
    for task, name in _TASKS:
        if task in metrics:
            table.add_row(name, *(f"{metrics[task][key]:.3f}" for key in ("AP", "AP50", "AP75")))
    return table
