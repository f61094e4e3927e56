"""The whole detector in one go on generated pictures: data, training, metrics, plots."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torchvision.transforms.v2.functional import pil_to_tensor

from .config import instantiate, load
from .data import read_image
from .data.synthetic import generate_shapes
from .engine import train
from .files import write_json
from .predict import Predictor
from .visualize import comparison_grid, plot_training

NUM_TRAIN, NUM_VAL = 600, 60
_SHOWN = 8


def run_demo(
    output: str | Path | None = None,
    overrides: Sequence[str] = (),
    config: str | Path = "demo",
    overwrite: bool = False,
) -> dict:
    """Generate pictures, train a detector on them, evaluate, and draw.

    ``output`` receives ``shapes/`` (the pictures in COCO format), ``model_final.pth``, ``metrics.json``,
    ``curves.png`` and ``predictions.png``.

    Args:
        output: folder, made when missing; by default the config's.
        overrides: ``key=value`` for the config.
        overwrite: train anew where ``output`` holds an earlier demo; else that one goes on, and one at its end is
            only evaluated and drawn.
        config: whose data are ``shapes/`` in the folder, as in ``configs/demo.py``.

    Returns:
        the evaluator's metrics, fractions.
    """
    if output is not None:
        overrides = [f"train.output_dir={json.dumps(str(output))}", *overrides]
    cfg = load(config, overrides)
    console, output = Console(), Path(cfg.train.output_dir)
    start = time.perf_counter()
    console.print(f"Drawing {NUM_TRAIN} training and {NUM_VAL} held-out pictures ...")
    generate_shapes(output / "shapes", NUM_TRAIN, NUM_VAL)
    metrics = train(cfg, resume=False if overwrite else "auto", overrides=overrides, overwrite=overwrite)
    minutes = (time.perf_counter() - start) / 60

    write_json(output / "metrics.json", {"metrics": metrics, "minutes": round(minutes, 2)}, indent=2)
    plot_training(output / "metrics.jsonl", output / "curves.png", title=Path(config).stem)
    _draw_predictions(cfg, output)
    console.print(f"{NUM_VAL} held-out pictures, inference ratio 1.0, after {minutes:.1f} minutes:")
    console.print(_summary(metrics))
    for name, what in (
        ("predictions.png", "held-out pictures: ground truth above, predictions below"),
        ("curves.png", "losses and AP during training"),
        ("metrics.json", "all figures"),
        ("model_final.pth", "the weights"),
    ):
        console.print(f"  {output / name}  {what}", soft_wrap=True, highlight=False)
    command = f"mimdet predict --weights {output / 'model_final.pth'} {output / 'shapes' / 'val'}"
    console.print(f"Next: {command}", soft_wrap=True, highlight=False)
    return metrics


def _draw_predictions(cfg: DictConfig, output: Path) -> None:
    dataset = instantiate(cfg.dataloader.test.dataset)
    records = [dataset[i] for i in range(min(_SHOWN, len(dataset)))]
    predictor = Predictor(cfg, output / "model_final.pth")
    pictures = [read_image(record) for record in records]
    comparison_grid(
        [pil_to_tensor(picture) for picture in pictures],
        [{**record, "boxes": torch.from_numpy(record["boxes"])} for record in records],
        [predictor(picture) for picture in pictures],
        dataset.classes,
        path=output / "predictions.png",
    )


def _summary(metrics: dict) -> Table:
    table = Table()
    for column in ("", "AP", "AP50", "AP75"):
        table.add_column(column, justify="left" if not column else "right")
    for task, name in (("bbox", "box"), ("segm", "mask")):
        if task in metrics:
            table.add_row(name, *(f"{metrics[task][key]:.3f}" for key in ("AP", "AP50", "AP75")))
    return table
