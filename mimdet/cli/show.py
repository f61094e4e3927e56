"""``mimdet show``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .train import ConfigFile, Overrides, TrainImages, TrainJson, ValImages, ValJson, data_overrides

app = typer.Typer(
    help="Draw a page of a dataset and its training samples, or of what a detector computes from an image.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
Output = Annotated[Path, typer.Option(help="PNG to write.")]


@app.command("data")
def data(
    config_file: ConfigFile,
    opts: Overrides = None,
    split: Annotated[str, typer.Option(help="train, or test for annotations alone.")] = "train",
    images: Annotated[int, typer.Option(min=1, help="Images, chosen at random.")] = 8,
    keep_ratio: Annotated[
        float | None,
        typer.Option(help="Share of the tokens that the encoder sees; default: the config's.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Chooses images, augmentations and tokens.")] = 0,
    train_json: TrainJson = None,
    train_images: TrainImages = None,
    val_json: ValJson = None,
    val_images: ValImages = None,
    output: Output = Path("output/show/data.png"),
) -> None:
    """Draw images of a config's dataset: annotations, the augmented training sample, and its kept tokens.

    `mimdet show data --config-file configs/mimdet_b_mask_rcnn.py --train-json a.json --train-images a/`
    """
    overrides = [*data_overrides("train", train_json, train_images), *data_overrides("test", val_json, val_images)]
    from ..config import load
    from ..files import check_replaceable
    from ..show import SOFTWARE, data_page, save_page

    check_replaceable(output, SOFTWARE)  # before the data are read
    save_page(data_page(load(config_file, [*overrides, *(opts or [])]), split, images, seed, keep_ratio), output)
    typer.echo(output)


@app.command("model")
def model(
    image: Annotated[Path, typer.Argument(help="An image.")],
    weights: Annotated[Path, typer.Option(help="Checkpoint of a trained detector (.pth or .safetensors).")],
    config_file: Annotated[
        str | None,
        typer.Option(help="Config of the weights, for a checkpoint without one, or with custom classes in it."),
    ] = None,
    score_threshold: Annotated[float, typer.Option(min=0.0, max=1.0, help="Lowest score of a detection.")] = 0.5,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Config override; may be repeated.")
    ] = None,
    output: Output = Path("output/show/model.png"),
) -> None:
    """Draw what a detector computes from an image: features c2 to c5, proposals and detections.

    `mimdet show model --weights output/demo/model_final.pth output/demo/shapes/val/000001.png`
    """
    from ..files import check_replaceable
    from ..predict import Predictor, open_image
    from ..show import SOFTWARE, model_page, save_page

    check_replaceable(output, SOFTWARE)  # report wrong paths before the weights are loaded
    opened = open_image(image)
    predictor = Predictor(config_file, weights, device, score_threshold, override or ())
    save_page(model_page(predictor, opened), output)
    typer.echo(output)
