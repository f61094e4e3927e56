"""The demo: trains, evaluates and draws a small detector on generated images."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torchvision.transforms.v2.functional import pil_to_tensor

from .config import find_config, instantiate, load
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
    """Generate images, train a detector on them, evaluate, and draw.

    ``output`` receives ``shapes/`` (the images in COCO format), ``model_final.pth``, ``metrics.json``,
    ``curves.png`` and ``predictions.png``.

    Args:
        output: folder, created when missing; by default the config's.
        overrides: ``key=value`` for the config.
        overwrite: train anew where ``output`` has an earlier demo. Without it, that demo is resumed; a finished one is
            only evaluated and drawn.
        config: one that trains and tests on ``shapes/`` in the folder, as ``configs/demo.py``.

    Returns:
        the evaluator's metrics, fractions.

    Raises:
        ValueError: the config does not train and test on ``shapes/``.
    """
    if output is not None:
        overrides = [f"train.output_dir={json.dumps(str(output))}", *overrides]
    cfg = load(config, overrides)
    console, output = Console(), Path(cfg.train.output_dir)
    _check_data(cfg, config, output / "shapes")
    start = time.perf_counter()
    console.print(f"Drawing {NUM_TRAIN} training and {NUM_VAL} held-out images ...")
    generate_shapes(output / "shapes", NUM_TRAIN, NUM_VAL)
    metrics = train(cfg, resume=False if overwrite else "auto", overrides=overrides, overwrite=overwrite)
    minutes = (time.perf_counter() - start) / 60

    write_json(output / "metrics.json", {"metrics": metrics, "minutes": round(minutes, 2)}, indent=2)
    plot_training(output / "metrics.jsonl", output / "curves.png", title=Path(config).stem)
    _draw_predictions(cfg, output)
    console.print(f"{NUM_VAL} held-out images, inference ratio 1.0, after {minutes:.1f} minutes:")
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
        if file is None or not Path(file).is_relative_to(shapes):
            demos = ", ".join(sorted(path.stem for path in find_config("demo").parent.glob("demo*.py")))
            raise ValueError(
                f"config {config} is not a demo config: its {split} data are not the generated {shapes}; "
                f"use one of {demos}, or mimdet train"
            )


def _draw_predictions(cfg: DictConfig, output: Path) -> None:
    dataset = instantiate(cfg.dataloader.test.dataset)
    records = [dataset[i] for i in range(min(_SHOWN, len(dataset)))]
    predictor = Predictor(cfg, output / "model_final.pth")
    images = [read_image(record) for record in records]
    comparison_grid(
        [pil_to_tensor(image) for image in images],
        [{**record, "boxes": torch.from_numpy(record["boxes"])} for record in records],
        [predictor(image) for image in images],
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
