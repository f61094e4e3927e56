"""Images side by side: ground truth above predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torchvision.transforms.v2 import functional as F

from .draw import draw_instances, font, save_png

_INK = (40, 40, 40)
_GAP = 8
_CAPTION = 24
_TITLE = 30


def comparison_grid(
    images: Sequence[torch.Tensor],
    targets: Sequence[Mapping[str, Any]],
    predictions: Sequence[Mapping[str, Any]],
    classes: Sequence[str],
    captions: Sequence[str] | None = None,
    path: str | Path | None = None,
    score_threshold: float = 0.5,
    columns: int = 4,
    height: int = 420,
) -> torch.Tensor:
    """Each image with its ground truth and, below, with its predictions.

    Args:
        images: uint8 (3, H, W) each.
        targets: for each a dict of ``boxes``, ``labels`` and, optionally, ``masks`` in its pixels.
        predictions: the same with ``scores``.
        classes: class names by label.
        captions: a line of text above each image.
        path: file to write as PNG.
        score_threshold: predictions below it are left out.
        columns: images in a row.
        height: height of each image in the grid, in pixels.

    Returns:
        uint8 (3, H, W).
    """
    truth, predicted = [], []
    for image, target, prediction in zip(images, targets, predictions, strict=True):
        scale = height / image.shape[1]
        truth.append(
            draw_instances(image, target["boxes"], target["labels"], classes, masks=target.get("masks"), scale=scale)
        )
        keep = torch.as_tensor(prediction["scores"]) >= score_threshold
        shown = {key: prediction[key][keep] for key in ("boxes", "labels", "scores", "masks") if key in prediction}
        predicted.append(draw_instances(image, classes=classes, scale=scale, **shown))
    grid = image_grid([truth, predicted], ["ground truth", "prediction"], captions, columns)
    if path is not None:
        save_png(grid, path)
    return grid


def image_grid(
    rows: Sequence[Sequence[torch.Tensor]],
    titles: Sequence[str] | None = None,
    captions: Sequence[str] | None = None,
    columns: int = 4,
) -> torch.Tensor:
    """Rows of images on white; images of a column belong together.

    Args:
        rows: the same number of uint8 (3, H, W) images each; images of a column should be of one size.
        titles: a name for each row, drawn vertically at its left.
        captions: a line of text above each column, cut to the column's width.
        columns: number of columns before the next ones continue below.

    Returns:
        uint8 (3, H, W).

    Raises:
        ValueError: no images, or rows of different length.
    """
    count = len(rows[0]) if rows else 0
    if not count or any(len(row) != count for row in rows):
        raise ValueError(f"a grid needs rows of the same, non-zero length, got {[len(row) for row in rows]}")
    bands = [range(start, min(start + columns, count)) for start in range(0, count, columns)]
    pages = [
        _band(
            [[row[i] for i in band] for row in rows],
            titles,
            [captions[i] for i in band] if captions else None,
        )
        for band in bands
    ]
    width = max(page.width for page in pages)
    grid = Image.new("RGB", (width, sum(page.height for page in pages) + _GAP), "white")
    y = 0
    for page in pages:
        grid.paste(page, (0, y))
        y += page.height
    return F.pil_to_tensor(grid)


def _band(rows: list[list[torch.Tensor]], titles: Sequence[str] | None, captions: list[str] | None) -> Image.Image:
    widths = [max(image.shape[2] for image in column) for column in zip(*rows, strict=True)]
    heights = [max(image.shape[1] for image in row) for row in rows]
    left = _GAP + (_TITLE if titles else 0)
    top = _GAP + (_CAPTION if captions else 0)
    size = (left + sum(widths) + _GAP * len(widths), top + sum(heights) + _GAP * len(heights))
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    x = left
    for i, width in enumerate(widths):
        if captions:
            draw.text((x, top - 5), _shorten(captions[i], width), font=font(15), fill=_INK, anchor="ls")
        y = top
        for row, height in zip(rows, heights, strict=True):
            page.paste(F.to_pil_image(row[i]), (x, y))
            y += height + _GAP
        x += width + _GAP
    if titles:
        y = top
        for title, height in zip(titles, heights, strict=True):
            strip = Image.new("RGB", (height, _TITLE), "white")
            ImageDraw.Draw(strip).text((height / 2, _TITLE / 2), title, font=font(18), fill=_INK, anchor="mm")
            page.paste(strip.rotate(90, expand=True), (_GAP // 2, y))
            y += height + _GAP
    return page


def _shorten(text: str, width: int) -> str:
    letters = font(15)
    if letters.getlength(text) <= width:
        return text
    while text and letters.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
