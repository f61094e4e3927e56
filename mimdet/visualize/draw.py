"""Draw boxes, masks and labels of detected or annotated objects on an image."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pycocotools.mask as mask_util
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torchvision.transforms.v2 import functional as F

from ..files import write_atomically

Color = tuple[int, int, int]
_GOLDEN = 0.618034
_SMALL = 640
_CROWDED = 15
_LONGEST_NAME = 60
_BAND_PIXELS = 2**22


def class_color(label: int) -> Color:
    """RGB color of a class, always the same; neighboring labels have very different colors."""
    hue = (0.58 + label * _GOLDEN) % 1
    lightness, saturation = ((0.58, 0.80), (0.46, 0.62), (0.70, 0.72))[label % 3]
    return tuple(round(255 * channel) for channel in colorsys.hls_to_rgb(hue, lightness, saturation))


def draw_instances(
    image: torch.Tensor | Image.Image,
    boxes: torch.Tensor,
    labels: torch.Tensor | Sequence[int],
    classes: Sequence[str],
    scores: torch.Tensor | Sequence[float] | None = None,
    masks: torch.Tensor | Sequence[Sequence[np.ndarray]] | Sequence[Mapping[str, Any]] | None = None,
    scale: float | None = None,
    alpha: float = 0.45,
) -> torch.Tensor | Image.Image:
    """The image with its instances: filled masks with outlines, boxes, and labels inside the image.

    Polygons and RLEs are decoded one at a time: the memory beside the images is a few bytes for each pixel, whatever
    the number of masks.

    Args:
        image: uint8 (3, H, W), RGB; or a PIL image in RGB.
        boxes: (N, 4) xyxy in pixels.
        labels: N classes, counted from 0.
        classes: class names by label. Line breaks and control characters become spaces, long names are cut.
        scores: N scores in [0, 1], drawn after the names.
        masks: bool (N, H, W), or N lists of polygons x0, y0, x1, y1, ..., or N COCO RLEs of size (H, W).
        scale: enlargement of the result. None enlarges images to a longer side of at least 640 pixels, for
            readable labels.
        alpha: opacity of the masks.

    Returns:
        a new image of (scale * H, scale * W) pixels, of the same kind as ``image``; a tensor is on the CPU.

    Raises:
        ValueError: an argument has a wrong type or shape, or a label no name.
    """
    is_tensor = isinstance(image, torch.Tensor)
    if is_tensor:
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"image must be uint8 (3, H, W), got {image.dtype} {tuple(image.shape)}")
        image = F.to_pil_image(image.cpu())
    elif image.mode != "RGB":
        raise ValueError(f"a PIL image must be in RGB, got {image.mode}")
    width, height = image.size
    boxes = torch.as_tensor(boxes, dtype=torch.float32).cpu().reshape(-1, 4)
    labels = torch.as_tensor(labels).tolist()
    scores = None if scores is None else torch.as_tensor(scores).tolist()
    _check(len(boxes), labels, scores, masks, (height, width), classes)

    if scale is None:
        scale = max(1.0, _SMALL / max(height, width))
    size = (max(1, round(scale * width)), max(1, round(scale * height)))
    image = image.resize(size, Image.Resampling.BILINEAR)
    boxes = boxes * torch.tensor([size[0] / width, size[1] / height]).repeat(2)
    # draw small objects over large ones
    order = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).argsort(descending=True).tolist()
    boxes = boxes[order].tolist()
    colors = [class_color(labels[i]) for i in order]
    line = max(2, round(max(size) / 450))
    if masks is not None and order:
        _draw_masks(image, _owners(masks, order, (height, width), size), colors, alpha, line)
    draw = ImageDraw.Draw(image)
    for (x0, y0, x1, y1), color in zip(boxes, colors, strict=True):
        corners = [int(c) for c in (min(x0, x1), min(y0, y1), x1, y1)]
        draw.rectangle(corners, outline=color, width=line)
    names = [_label(classes[labels[i]]) + ("" if scores is None else f" {scores[i]:.0%}") for i in order]
    _draw_labels(image, boxes, names, colors)
    return F.pil_to_tensor(image) if is_tensor else image


def polygons_to_masks(instances: Sequence[Sequence[np.ndarray]], height: int, width: int) -> torch.Tensor:
    """Masks (N, height, width), bool, of N lists of polygons (each flat: x0, y0, x1, y1, ...)."""
    masks = torch.zeros(len(instances), height, width, dtype=torch.bool)
    for mask, polygons in zip(masks, instances, strict=True):
        rles = mask_util.frPyObjects([np.asarray(polygon).tolist() for polygon in polygons], height, width)
        mask[:] = torch.from_numpy(mask_util.decode(rles)).any(dim=2)
    return masks


def save_png(image: torch.Tensor | Image.Image, path: str | Path, about: PngInfo | None = None) -> None:
    """Write a uint8 (3, H, W) tensor or a PIL image as PNG, atomically, with the texts of ``about``."""
    image = F.to_pil_image(image) if isinstance(image, torch.Tensor) else image
    write_atomically(path, lambda file: image.save(file, format="PNG", pnginfo=about))


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans of ``size`` pixels, from matplotlib's files: the same on every machine."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def _check(
    count: int,
    labels: list[int],
    scores: list[float] | None,
    masks: torch.Tensor | Sequence[Any] | None,
    size: tuple[int, int],
    classes: Sequence[str],
) -> None:
    for name, values in (("labels", labels), ("scores", scores)):
        if values is not None and len(values) != count:
            raise ValueError(f"{count} boxes but {len(values)} {name}")
    if isinstance(masks, torch.Tensor):
        if masks.shape != (count, *size):
            raise ValueError(f"masks must be {(count, *size)} like boxes and image, got {tuple(masks.shape)}")
    elif masks is not None:
        if len(masks) != count:
            raise ValueError(f"{count} boxes but {len(masks)} masks")
        sizes = {tuple(mask["size"]) for mask in masks if isinstance(mask, Mapping)} - {size}
        if sizes:
            raise ValueError(f"masks must be RLEs of size {size} like the image, got {sizes.pop()}")
    if labels and not 0 <= min(labels) <= max(labels) < len(classes):
        raise ValueError(f"labels run from {min(labels)} to {max(labels)}, but there are {len(classes)} classes")


def _owners(
    masks: torch.Tensor | Sequence[Any], order: Sequence[int], mask_size: tuple[int, int], size: tuple[int, int]
) -> np.ndarray:
    """(height, width) numbers, counted from 1, of the last instance in ``order`` that covers a pixel; 0 for none.

    ``mask_size`` is (height, width), ``size`` (width, height) of the result.
    """
    # Fortran order, as RLEs have
    owners = np.zeros(size[::-1], dtype=np.min_scalar_type(len(order)), order="F")
    for number, index in enumerate(order, start=1):
        mask = masks[index]
        if isinstance(mask, Mapping):
            mask = torch.from_numpy(mask_util.decode(mask))
        elif not isinstance(mask, torch.Tensor):
            mask = polygons_to_masks([mask], *mask_size)[0]
        mask = F.resize(mask.cpu()[None].to(torch.uint8), size[::-1], F.InterpolationMode.NEAREST)[0]
        np.copyto(owners, number, where=mask.numpy().view(bool), casting="unsafe")
    return owners


def _draw_masks(image: Image.Image, owners: np.ndarray, colors: list[Color], alpha: float, line: int) -> None:
    """Fill the masks and draw their outlines, a band of rows at a time, to save memory."""
    palette = np.array([(0, 0, 0), *colors], dtype=np.uint8)
    height, width = owners.shape
    radius = line // 2
    rows = max(1, _BAND_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        band = owners[top:bottom]
        if not band.any():
            continue
        inside = band > 0
        pixels = np.array(image.crop((0, top, width, bottom)))
        pixels[inside] = (1 - alpha) * pixels[inside] + alpha * palette[band[inside]]
        # max_pool2d: outline pixels have another number within the radius, also across bands, not beyond the image.
        above, below = min(radius, top), min(radius, height - bottom)
        near = torch.from_numpy(owners[top - above : bottom + below].astype(np.float32))[None]
        near = torch.nn.functional.pad(near, (radius, radius, radius - above, radius - below), mode="replicate")
        lowest, highest = (
            sign * torch.nn.functional.max_pool2d(sign * near, 2 * radius + 1, stride=1)[0] for sign in (-1, 1)
        )
        outline = (lowest != highest).numpy() & inside
        pixels[outline] = palette[band[outline]]
        image.paste(Image.fromarray(pixels), (0, top))


def _label(name: str) -> str:
    """A class name on one line: unprintable characters become spaces."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(name))
    return text if len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 1] + "…"


def _draw_labels(image: Image.Image, boxes: list[list[float]], texts: list[str], colors: list[Color]) -> None:
    draw = ImageDraw.Draw(image)
    size = max(12, round(max(image.size) / 55))
    letters = font(max(11, round(0.8 * size)) if len(texts) > _CROWDED else size)
    margin = max(2, size // 6)
    ascent, descent = letters.getmetrics()
    height = ascent + descent + margin
    taken: list[tuple[float, float, float, float]] = []
    # place labels of small objects first: they have the fewest possible places
    for box, text, color in reversed(list(zip(boxes, texts, colors, strict=True))):
        width = draw.textlength(text, font=letters) + 2 * margin
        place = _place(box, width, height, image.size, taken)
        taken.append(place)
        draw.rounded_rectangle(place, radius=margin, fill=color)
        dark = sum(weight * channel for weight, channel in zip((0.299, 0.587, 0.114), color, strict=True)) > 140
        text_at = (place[0] + margin, place[1] + margin / 2)
        draw.text(text_at, text, font=letters, fill=(0, 0, 0) if dark else (255, 255, 255))


def _place(
    box: list[float],
    width: float,
    height: float,
    image: tuple[int, int],
    taken: list[tuple[float, float, float, float]],
) -> tuple[float, float, float, float]:
    """The place of a label at its box with the least overlap with other labels; above the box on a tie."""
    x0, y0, x1, y1 = box
    spots = [(x0, y0 - height), (x1 - width, y0 - height), (x0, y0), (x0, y1), (x1 - width, y1)]
    spots += [(x1, y0), (x0 - width, y0), (x0, y1 - height), (x1, y1 - height), (x0 - width, y1 - height)]
    places = []
    for x, y in spots:
        x = min(max(x, 0), max(image[0] - 1 - width, 0))
        y = min(max(y, 0), max(image[1] - 1 - height, 0))
        places.append((x, y, x + width, y + height))
    return min(places, key=lambda place: sum(_overlap(place, other) for other in taken))


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """Area of the intersection of two rectangles."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
