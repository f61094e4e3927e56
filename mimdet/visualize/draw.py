"""Draw boxes, masks and labels of detected or annotated objects on a picture."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import pycocotools.mask as mask_util
import torch
from PIL import ImageDraw, ImageFont
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from ..files import write_bytes

Color = tuple[int, int, int]
_GOLDEN = 0.618034
_SMALL_PICTURE = 640
_CROWDED = 15


def class_color(label: int) -> Color:
    """RGB color of a class, always the same; the colors of neighbouring labels lie far apart."""
    hue = (0.58 + label * _GOLDEN) % 1
    lightness, saturation = ((0.58, 0.80), (0.46, 0.62), (0.70, 0.72))[label % 3]
    return tuple(round(255 * channel) for channel in colorsys.hls_to_rgb(hue, lightness, saturation))


@torch.no_grad()
def draw_instances(
    image: torch.Tensor,
    boxes: torch.Tensor,
    labels: torch.Tensor | Sequence[int],
    classes: Sequence[str],
    scores: torch.Tensor | Sequence[float] | None = None,
    masks: torch.Tensor | Sequence[Sequence[np.ndarray]] | None = None,
    scale: float | None = None,
    alpha: float = 0.45,
) -> torch.Tensor:
    """The picture with its instances: filled masks with outlines, boxes, and labels that stay inside it.

    Args:
        image: uint8 (3, H, W), RGB.
        boxes: (N, 4) xyxy in pixels.
        labels: N classes, counted from 0.
        classes: class names by label.
        scores: N scores in [0, 1], written behind the names.
        masks: bool (N, H, W), or N lists of polygons x0, y0, x1, y1, ...
        scale: enlargement of the result. None enlarges pictures whose longer side is below 640 to that, so
            that their labels can be read, and leaves others as they are.
        alpha: opacity of the masks.

    Returns:
        uint8 (3, scale * H, scale * W) on the CPU.

    Raises:
        ValueError: an argument has a wrong type or shape, or a label no name.
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image must be uint8 (3, H, W), got {image.dtype} {tuple(image.shape)}")
    height, width = image.shape[1:]
    boxes = torch.as_tensor(boxes, dtype=torch.float32).cpu().reshape(-1, 4)
    labels = torch.as_tensor(labels).tolist()
    scores = None if scores is None else torch.as_tensor(scores).tolist()
    if masks is not None and not isinstance(masks, torch.Tensor):
        masks = polygons_to_masks(masks, height, width)
    _check(len(boxes), labels, scores, masks, (height, width), classes)

    if scale is None:
        scale = max(1.0, _SMALL_PICTURE / max(height, width))
    size = [max(1, round(scale * height)), max(1, round(scale * width))]
    image = F.resize(image.cpu(), size, antialias=True)
    if not labels:
        return image
    stretch = torch.tensor([size[1] / width, size[0] / height]).repeat(2)
    boxes = boxes * stretch
    # small objects over large ones
    order = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).argsort(descending=True).tolist()
    boxes = boxes[order]
    colors = [class_color(labels[i]) for i in order]
    line = max(2, round(max(size) / 450))
    if masks is not None:
        masks = F.resize(masks.cpu()[order].to(torch.uint8), size, F.InterpolationMode.NEAREST).bool()
        image = _draw_masks(image, masks, colors, alpha, line)
    drawable = torch.cat([torch.minimum(boxes[:, :2], boxes[:, 2:]), boxes[:, 2:]], dim=1)
    image = draw_bounding_boxes(image, drawable, colors=colors, width=line)
    names = [classes[labels[i]] + ("" if scores is None else f" {scores[i]:.0%}") for i in order]
    return _draw_labels(image, boxes.tolist(), names, colors)


def polygons_to_masks(instances: Sequence[Sequence[np.ndarray]], height: int, width: int) -> torch.Tensor:
    """Masks (N, height, width), bool, of N lists of polygons (each flat: x0, y0, x1, y1, ...)."""
    masks = torch.zeros(len(instances), height, width, dtype=torch.bool)
    for mask, polygons in zip(masks, instances, strict=True):
        rles = mask_util.frPyObjects([np.asarray(polygon).tolist() for polygon in polygons], height, width)
        mask[:] = torch.from_numpy(mask_util.decode(rles)).any(dim=2)
    return masks


def save_png(image: torch.Tensor, path: str | Path) -> None:
    """Write a uint8 (3, H, W) picture as PNG, whole or not at all."""
    png = io.BytesIO()
    F.to_pil_image(image).save(png, format="PNG")
    write_bytes(path, png.getvalue())


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans of ``size`` pixels, from matplotlib's own files: the same on every machine."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def _check(
    count: int,
    labels: list[int],
    scores: list[float] | None,
    masks: torch.Tensor | None,
    size: tuple[int, int],
    classes: Sequence[str],
) -> None:
    for name, values in (("labels", labels), ("scores", scores)):
        if values is not None and len(values) != count:
            raise ValueError(f"{count} boxes but {len(values)} {name}")
    if masks is not None and masks.shape != (count, *size):
        raise ValueError(f"masks must be {(count, *size)} like boxes and image, got {tuple(masks.shape)}")
    if labels and not 0 <= min(labels) <= max(labels) < len(classes):
        raise ValueError(f"labels run from {min(labels)} to {max(labels)}, but there are {len(classes)} classes")


def _draw_masks(image: torch.Tensor, masks: torch.Tensor, colors: list[Color], alpha: float, line: int) -> torch.Tensor:
    # every pixel belongs to one instance at most: torchvision paints shared pixels black
    owner = torch.zeros(masks.shape[1:], dtype=torch.int64)
    for number, mask in enumerate(masks, start=1):
        owner[mask] = number
    numbers = torch.arange(1, len(masks) + 1).view(-1, 1, 1)
    image = draw_segmentation_masks(image, owner == numbers, alpha=alpha, colors=colors)
    padded = torch.nn.functional.pad(owner[None].float(), (line // 2,) * 4, mode="replicate")
    lowest, highest = (
        sign * torch.nn.functional.max_pool2d(sign * padded, 2 * (line // 2) + 1, stride=1)[0] for sign in (-1, 1)
    )
    outline = (lowest != highest) & (owner > 0)
    image[:, outline] = torch.tensor(colors, dtype=torch.uint8)[owner[outline] - 1].T
    return image


def _draw_labels(image: torch.Tensor, boxes: list[list[float]], texts: list[str], colors: list[Color]) -> torch.Tensor:
    picture = F.to_pil_image(image)
    draw = ImageDraw.Draw(picture)
    size = max(12, round(max(picture.size) / 55))
    letters = font(max(11, round(0.8 * size)) if len(texts) > _CROWDED else size)
    margin = max(2, size // 6)
    ascent, descent = letters.getmetrics()
    height = ascent + descent + margin
    taken: list[tuple[float, float, float, float]] = []
    # small objects, drawn last, choose their place first: they have the fewest
    for box, text, color in reversed(list(zip(boxes, texts, colors, strict=True))):
        width = draw.textlength(text, font=letters) + 2 * margin
        place = _place(box, width, height, picture.size, taken)
        taken.append(place)
        draw.rounded_rectangle(place, radius=margin, fill=color)
        dark = sum(weight * channel for weight, channel in zip((0.299, 0.587, 0.114), color, strict=True)) > 140
        text_at = (place[0] + margin, place[1] + margin / 2)
        draw.text(text_at, text, font=letters, fill=(0, 0, 0) if dark else (255, 255, 255))
    return F.pil_to_tensor(picture)


def _place(
    box: list[float],
    width: float,
    height: float,
    picture: tuple[int, int],
    taken: list[tuple[float, float, float, float]],
) -> tuple[float, float, float, float]:
    """The place for a label at its box that hides the least of other labels; above the box if there is a choice."""
    x0, y0, x1, y1 = box
    spots = [(x0, y0 - height), (x1 - width, y0 - height), (x0, y0), (x0, y1), (x1 - width, y1)]
    spots += [(x1, y0), (x0 - width, y0), (x0, y1 - height), (x1, y1 - height), (x0 - width, y1 - height)]
    places = []
    for x, y in spots:
        x = min(max(x, 0), max(picture[0] - 1 - width, 0))
        y = min(max(y, 0), max(picture[1] - 1 - height, 0))
        places.append((x, y, x + width, y + height))
    return min(places, key=lambda place: sum(_overlap(place, other) for other in taken))


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """Area that two rectangles share."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
