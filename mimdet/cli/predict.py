"""``mimdet predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def predict(
    inputs: Annotated[list[Path], typer.Argument(help="Images, or folders of images.")],
    weights: Annotated[Path, typer.Option(help="Checkpoint of a trained detector (.pth or .safetensors).")],
    config_file: Annotated[
        str | None,
        typer.Option(help="Config of the weights, for a checkpoint without one, or with custom classes in it."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the drawings and predictions.json.")] = Path(
        "output/predict"
    ),
    score_threshold: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Lowest score of a detection; the config's threshold (0.05) applies too."),
    ] = 0.5,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Config override; may be repeated.")
    ] = None,
) -> None:
    """Detect objects in images: a drawing of each, and all detections as COCO-format JSON.

    `mimdet predict --weights output/demo/model_final.pth output/demo/shapes/val`

    An image that cannot be processed is named and skipped.
    """
    from ..predict import Predictor, check_output, find_images, predict_files

    find_images(inputs, output)  # report wrong paths before the weights are loaded
    check_output(output)
    predictor = Predictor(config_file, weights, device, score_threshold, override or ())
    report = predict_files(inputs, output, predictor)
    typer.echo(f"{report}: {len(report.drawings)} drawings in {output}, all detections in {report.predictions}")
    if report.skipped:
        typer.echo(f"{len(report.skipped)} images were skipped, as said above")
