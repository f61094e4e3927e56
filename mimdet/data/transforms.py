"""Augmentations of images with their boxes and polygons.

Each is called as `augmentation(image, targets, rng) -> (image, targets)`. `image` is a PIL image; `targets`
is None or a dict of `boxes` float64 (N, 4) xyxy pixels, `labels` int64 (N,), and optionally `masks`, N lists
of polygons (flat float64 arrays x0, y0, x1, y1, ...). Inputs are not changed. All random
numbers come from `rng`, a numpy Generator.

Augmentations move boxes and drop none. After the last one, `clip_targets` clips and drops, in Detectron2's order and
precision: equal annotations give bitwise equal boxes.
"""

from collections.abc import Callable, Sequence
from numbers import Integral, Real

import numpy as np
import shapely
from PIL.Image import Image
from torchvision.transforms.v2 import functional as F

from .errors import DataError

MIN_BOX_SIDE = 1e-5
MAX_PIXELS = 2**27  # of a resized image, 4 bytes each in PIL; only very thin images come near


class AugmentationList:
    """Augmentations applied one after the other. Raises DataError for an image without pixels."""

    def __init__(self, augs: Sequence[Callable]):
        self.augs = [_augmentation(aug) for aug in augs]

    def __call__(self, image: Image, targets: dict | None, rng: np.random.Generator):
        if 0 in image.size:
            raise DataError(f"the image has no pixels: it is {image.width}x{image.height} (width x height)")
        for aug in self.augs:
            image, targets = aug(image, targets, rng)
        return image, targets


class RandomApply:
    """Applies one augmentation, or an AugmentationList, with probability `prob`."""

    def __init__(self, tfm_or_aug: Callable, prob: float = 0.5):
        self.prob = _probability(prob)
        self.aug = _augmentation(tfm_or_aug)

    def __call__(self, image: Image, targets: dict | None, rng: np.random.Generator):
        return self.aug(image, targets, rng) if rng.random() < self.prob else (image, targets)


class RandomFlip:
    """Mirrors left and right (`horizontal`) or top and bottom (`vertical`) with probability `prob`."""

    def __init__(self, horizontal: bool = True, prob: float = 0.5, vertical: bool = False):
        if not (isinstance(horizontal, bool) and isinstance(vertical, bool)):
            raise ValueError(f"horizontal and vertical must be true or false, got {horizontal!r} and {vertical!r}")
        if horizontal == vertical:
            raise ValueError("RandomFlip is either horizontal or vertical; for both, use two of them")
        self.axis = 0 if horizontal else 1
        self.prob = _probability(prob)

    def __call__(self, image: Image, targets: dict | None, rng: np.random.Generator):
        if rng.random() >= self.prob:
            return image, targets
        side = image.size[self.axis]
        scale, shift = np.ones(2), np.zeros(2)
        scale[self.axis], shift[self.axis] = -1, side
        flip = F.horizontal_flip if self.axis == 0 else F.vertical_flip
        return flip(image), _affine(targets, scale, shift)


class ResizeShortestEdge:
    """Scales the shorter side to a random length, less if the longer side would exceed `max_size`.

    A very thin image keeps at least one pixel a side, and is scaled less where it would exceed `MAX_PIXELS`.

    Args:
        short_edge_length: one length in pixels; or several, to choose one of them (`sample_style` "choice")
            or (lowest, highest), for any between them, inclusive ("range").
        max_size: cap of the longer side in pixels, None for no cap.
    """

    def __init__(
        self, short_edge_length: int | Sequence[int], max_size: int | None = None, sample_style: str = "range"
    ):
        lengths = [short_edge_length] * 2 if isinstance(short_edge_length, (Real, str)) else list(short_edge_length)
        if not lengths or not all(isinstance(n, Integral) and 1 <= n <= MAX_PIXELS for n in lengths):
            raise ValueError(f"short_edge_length must be whole and positive, got {short_edge_length!r}")
        if sample_style not in ("choice", "range"):
            raise ValueError(f"sample_style must be 'choice' or 'range', got {sample_style!r}")
        if sample_style == "range" and (len(lengths) != 2 or lengths[0] > lengths[1]):
            raise ValueError(f"sample_style 'range' takes short_edge_length=(lowest, highest), got {lengths}")
        if max_size is not None and not (isinstance(max_size, Real) and max_size >= 1):
            raise ValueError(f"max_size must be positive, or None for no cap, got {max_size!r}")
        self.lengths = lengths
        self.max_size = max_size
        self.sample_style = sample_style

    def __call__(self, image: Image, targets: dict | None, rng: np.random.Generator):
        if self.sample_style == "range":
            length = int(rng.integers(self.lengths[0], self.lengths[1] + 1))
        else:
            length = self.lengths[rng.integers(len(self.lengths))]
        return _resize(image, targets, *self.output_size(image.height, image.width, length, self.max_size))

    @staticmethod
    def output_size(height: int, width: int, length: int, max_size: int | None = None) -> tuple[int, int]:
        """(height, width) after scaling, at least one pixel each; half pixels round up."""
        scale = length / min(height, width)
        new_height, new_width = (length, scale * width) if height < width else (scale * height, length)
        longest = max(new_height, new_width)
        if max_size is not None and longest > max_size:
            new_height, new_width = new_height * (max_size / longest), new_width * (max_size / longest)
        if new_height * new_width > MAX_PIXELS:
            shrink = (MAX_PIXELS / (new_height * new_width)) ** 0.5
            new_height, new_width = new_height * shrink, new_width * shrink
        return max(1, int(new_height + 0.5)), max(1, int(new_width + 0.5))


class ResizeScale:
    """Scales an image to the largest size of its aspect ratio within `target_height` x `target_width` times a random
    number from [`min_scale`, `max_scale`)."""

    def __init__(self, min_scale: float, max_scale: float, target_height: int, target_width: int):
        if not 0 < min_scale <= max_scale:
            raise ValueError(f"ResizeScale takes 0 < min_scale <= max_scale, got {min_scale} and {max_scale}")
        if min(target_height, target_width) < 1:
            raise ValueError(f"target_height and target_width must be positive, got {target_height}, {target_width}")
        self.min_scale, self.max_scale = min_scale, max_scale
        self.target_height, self.target_width = target_height, target_width

    def __call__(self, image: Image, targets: dict | None, rng: np.random.Generator):
        scale = rng.uniform(self.min_scale, self.max_scale)
        return _resize(image, targets, *self.output_size(image.height, image.width, scale))

    def output_size(self, height: int, width: int, scale: float) -> tuple[int, int]:
        """(height, width) after scaling, at least one pixel; half pixels round to even."""
        factor = min(self.target_height * scale / height, self.target_width * scale / width)
        return max(1, round(height * factor)), max(1, round(width * factor))


class FixedSizeCrop:
    """Makes images of one size: crops larger ones at a random position, pads smaller ones.

    One random number sets the position on both axes, as in Detectron2. Polygons are cut to the window.

    Args:
        crop_size: height and width in pixels.
        pad: pad smaller images, on the right and at the bottom, with gray `pad_value`; otherwise leave them.
    """

    def __init__(self, crop_size: Sequence[int], pad: bool = True, pad_value: float = 128.0):
        self.height, self.width = crop_size
        if min(self.height, self.width) < 1:
            raise ValueError(f"crop_size must be (height, width) in pixels, got {tuple(crop_size)}")
        self.pad = pad
        self.pad_value = pad_value

    def __call__(self, image: Image, targets: dict | None, rng: np.random.Generator):
        fraction = rng.random()
        x, y = (round(fraction * max(0, spare)) for spare in (image.width - self.width, image.height - self.height))
        targets = crop_targets(targets, x, y, self.width, self.height)
        image = F.crop(image, y, x, min(self.height, image.height), min(self.width, image.width))
        if self.pad:
            image = F.pad(image, [0, 0, self.width - image.width, self.height - image.height], fill=self.pad_value)
        return image, targets


class RandomCrop:
    """Crops a window with random sides from `crop_size` = (lowest, highest) pixels, inclusive.

    Sides are at most the image's; every position is equally likely. Polygons are cut to the window; boxes are not
    fitted to them.
    """

    def __init__(self, crop_type: str, crop_size: Sequence[int]):
        if crop_type != "absolute_range":
            raise ValueError(f"crop_type must be 'absolute_range', got {crop_type!r}")
        self.lowest, self.highest = crop_size
        if not 0 < self.lowest <= self.highest:
            raise ValueError(f"crop_size must be (lowest, highest) in pixels, got {tuple(crop_size)}")

    def __call__(self, image: Image, targets: dict | None, rng: np.random.Generator):
        x, y, width, height = self.window(image.height, image.width, rng)
        return F.crop(image, y, x, height, width), crop_targets(targets, x, y, width, height)

    def window(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Random x, y, width, height of a window in an image of (height, width)."""
        crop_height = int(rng.integers(min(height, self.lowest), min(height, self.highest) + 1))
        crop_width = int(rng.integers(min(width, self.lowest), min(width, self.highest) + 1))
        y = int(rng.integers(height - crop_height + 1))
        x = int(rng.integers(width - crop_width + 1))
        return x, y, crop_width, crop_height


def crop_targets(targets: dict | None, x: int, y: int, width: int, height: int) -> dict | None:
    """Targets in the coordinates of a window at (x, y), polygons cut to it; boxes may reach beyond it."""
    if targets is None:
        return None
    cropped = {**targets, "boxes": targets["boxes"] - (x, y, x, y)}
    if "masks" in targets:
        cropped["masks"] = [
            [part for polygon in polygons for part in crop_polygon(polygon, x, y, width, height)]
            for polygons in targets["masks"]
        ]
    return cropped


def clip_targets(targets: dict, width: int, height: int) -> dict:
    """Clips boxes to the image, as float32; drops instances with an empty box, or with masks but no polygon.

    As in Detectron2 a box is empty unless both float32 sides exceed `MIN_BOX_SIDE`.
    """
    boxes = targets["boxes"].clip(0, (width, height, width, height)).astype(np.float32)
    keep = ((boxes[:, 2:] - boxes[:, :2]) > MIN_BOX_SIDE).all(axis=1)
    clipped = {}
    if "masks" in targets:
        keep &= np.array([len(polygons) > 0 for polygons in targets["masks"]], dtype=bool)
        clipped["masks"] = [polygons for polygons, kept in zip(targets["masks"], keep, strict=True) if kept]
    return {**clipped, "boxes": boxes[keep], "labels": targets["labels"][keep]}


def mask_boxes(masks: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Tight boxes, float64 (N, 4), around N lists of polygons; zeros around an empty list."""
    boxes = np.zeros((len(masks), 4))
    for box, polygons in zip(boxes, masks, strict=True):
        if polygons:
            points = np.concatenate(polygons).reshape(-1, 2)
            box[:2], box[2:] = points.min(axis=0), points.max(axis=0)
    return boxes


def crop_polygon(polygon: np.ndarray, x: int, y: int, width: int, height: int) -> list[np.ndarray]:
    """Parts of a flat polygon inside a window, in the window's coordinates: none, one or several."""
    points = polygon.reshape(-1, 2)
    lowest, highest = points.min(axis=0), points.max(axis=0)
    if (lowest >= (x, y)).all() and (highest <= (x + width, y + height)).all():
        return [(points - (x, y)).reshape(-1)]
    if (lowest >= (x + width, y + height)).any() or (highest <= (x, y)).any():
        return []
    shape = shapely.Polygon(points)
    # make_valid: self-crossing outlines follow the even-odd rule, as in the COCO rasterizer.
    shape = shape.buffer(0) if shape.is_valid else shapely.make_valid(shape)
    window = shapely.box(x, y, x + width, y + height)
    return [part - np.tile((x, y), part.size // 2) for part in flat_polygons(shape.intersection(window))]


def flat_polygons(shape: shapely.Geometry) -> list[np.ndarray]:
    """Outlines of the polygons in a geometry as flat arrays; points and lines are left out.

    COCO polygons cannot have holes: a polygon with a hole is cut in two through it.
    """
    flat = []
    for part in shapely.get_parts(shapely.get_parts(shape)):
        if not isinstance(part, shapely.Polygon) or part.area == 0:
            continue
        if part.interiors:
            x0, y0, x1, y1 = part.bounds
            hole_x0, _, hole_x1, _ = part.interiors[0].bounds
            middle = (hole_x0 + hole_x1) / 2
            for half in (shapely.box(x0, y0, middle, y1), shapely.box(middle, y0, x1, y1)):
                flat += flat_polygons(part.intersection(half))
        else:
            flat.append(np.array(part.exterior.coords[:-1]).reshape(-1))
    return flat


def _resize(image: Image, targets: dict | None, height: int, width: int):
    scale = np.array([width / image.width, height / image.height])
    resized = F.resize(image, [height, width], interpolation=F.InterpolationMode.BILINEAR)
    return resized, _affine(targets, scale, np.zeros(2))


def _affine(targets: dict | None, scale: np.ndarray, shift: np.ndarray) -> dict | None:
    """Targets with every point scaled, then shifted; a negative scale swaps the sides of boxes."""
    if targets is None:
        return None
    corners = targets["boxes"].reshape(-1, 2, 2) * scale + shift
    moved = {**targets, "boxes": np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)}
    if "masks" in targets:
        moved["masks"] = [
            [(polygon.reshape(-1, 2) * scale + shift).reshape(-1) for polygon in polygons]
            for polygons in targets["masks"]
        ]
    return moved


def _augmentation(value: Callable) -> Callable:
    if not callable(value):
        raise TypeError(f"an augmentation is called with an image, its targets and a generator, {value!r} cannot be")
    return value


def _probability(prob: float) -> float:
    if not 0 <= prob <= 1:
        raise ValueError(f"prob must be in [0, 1], got {prob}")
    return prob
