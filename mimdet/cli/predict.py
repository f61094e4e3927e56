"""``mimdet predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def predict(
    inputs: Annotated[list[Path], typer.Argument(help="Pictures, or folders of pictures.")],
    weights: Annotated[Path, typer.Option(help="Checkpoint of a trained detector.")],
    config_file: Annotated[
        str | None, typer.Option(help="Config of the weights; needed where the checkpoint does not carry its own.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the drawings and predictions.json.")] = Path(
        "output/predict"
    ),
    score_threshold: Annotated[float, typer.Option(min=0.0, max=1.0, help="Least score of a detection.")] = 0.5,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Config override; may be repeated.")
    ] = None,
) -> None:
    """Detect objects in pictures: a drawing of each, and all detections as COCO-format JSON.

    `mimdet predict --weights output/demo/model_final.pth output/demo/shapes/val`
    """
    from ..predict import Predictor, predict_files

    predictor = Predictor(config_file, weights, device, score_threshold, override or ())
    report = predict_files(inputs, output, predictor)
    for path, reason in report.skipped:
        typer.secho(f"skipped {path}: {reason}", fg="yellow", err=True)
    typer.echo(f"{len(report.drawings)} drawings in {output}, all detections in {report.predictions}")
