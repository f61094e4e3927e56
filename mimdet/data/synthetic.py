"""A synthetic instance segmentation dataset: overlapping shapes on textured backgrounds, with exact masks."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import shapely
from PIL import Image, ImageDraw, ImageFilter
from shapely import affinity

from ..files import naming
from .errors import DataError
from .transforms import flat_polygons

CLASSES = ("circle", "square", "triangle", "star")
INSTANCES = (3, 9)  # fewest and most shapes tried in an image
SMALLEST = 13  # diameter in pixels of the circle around a shape
LARGEST = 0.6  # the same, as a fraction of the image's shorter side
NEIGHBORS = 0.35  # probability that a shape is placed next to another one
MIN_VISIBLE = 0.25  # shapes with a smaller visible fraction are not drawn
HUE_SPREAD = 0.15  # largest distance of a shape's hue from its class's; the classes' ranges overlap
SPECK = 2.0  # pixels; visible parts of less area are left out of the masks
SUPERSAMPLING = 4
FORMAT_VERSION = 1
_MARKER = "shapes.json"


def generate_shapes(
    root: str | os.PathLike,
    num_train: int,
    num_val: int,
    image_size: tuple[int, int] = (128, 192),
    seed: int = 0,
) -> Path:
    """Write a dataset in COCO format to `root` and return the path.

    The layout is annotations/instances_{train,val}.json with JPEG images in train/ and val/. Every image is a
    function of (seed, split, number). A dataset with the same parameters is left as it is. An interrupted call does
    not change `root`.

    Args:
        num_train, num_val: number of images.
        image_size: bounds in pixels, inclusive, of both sides, which are random.

    Raises DataError when `root` has other content, and OSError, which names `root`, when it cannot be written.
    """
    root = Path(root)
    parameters = {
        "version": FORMAT_VERSION,
        "num_train": num_train,
        "num_val": num_val,
        "image_size": list(image_size),
        "seed": seed,
    }
    if _holds(root, parameters):
        return root
    with naming(root):
        root.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
        try:
            (scratch / "annotations").mkdir()
            for number, (split, count) in enumerate((("train", num_train), ("val", num_val))):
                (scratch / split).mkdir()
                content = _write_split(scratch / split, count, image_size, (seed, number))
                (scratch / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
            (scratch / _MARKER).write_text(json.dumps(parameters))
            scratch.chmod(0o755)
            try:
                scratch.replace(root)
            except OSError:
                # rename() fails where another process has finished the same dataset.
                if not _holds(root, parameters):
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return root


def _holds(root: Path, parameters: dict) -> bool:
    """Whether `root` is a complete dataset with these parameters; raises DataError for other content."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    marker = root / _MARKER
    if not marker.is_file():
        raise DataError(f"{root} exists and is not a synthetic dataset; choose another folder")
    present = json.loads(marker.read_text())
    if present != parameters:
        raise DataError(f"{root} holds a dataset made with {present}, not {parameters}; delete it or choose another")
    return True


def _write_split(folder: Path, count: int, image_size: tuple[int, int], seed: tuple[int, ...]) -> dict:
    """Draw the images of one split and return the content of its annotation file."""
    images, annotations = [], []
    for number in range(count):
        rng = np.random.default_rng((*seed, number))
        width, height = rng.integers(image_size[0], image_size[1] + 1, size=2).tolist()
        canvas = _background(rng, height, width)
        scene = _scene(rng, height, width)
        _draw(canvas, scene, rng)
        name = f"{number:06d}.jpg"
        Image.fromarray((canvas.clip(0, 1) * 255 + 0.5).astype(np.uint8)).save(folder / name, quality=92)
        images.append({"id": number + 1, "file_name": name, "height": height, "width": width})
        for label, _, visible in scene:
            x0, y0, x1, y1 = visible.bounds
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number + 1,
                    "category_id": label + 1,
                    "bbox": np.round([x0, y0, x1 - x0, y1 - y0], 2).tolist(),
                    "area": round(visible.area, 2),
                    "segmentation": [polygon.round(2).tolist() for polygon in flat_polygons(visible)],
                    "iscrowd": 0,
                }
            )
    return {
        "info": {"description": "synthetic shapes"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)],
    }


def _outline(label: int) -> np.ndarray:
    """Corners (n, 2) of a class's shape in the unit circle."""
    corners = {"circle": 48, "square": 4, "triangle": 3, "star": 10}[CLASSES[label]]
    angles = np.arange(corners) * (2 * np.pi / corners)
    radii = np.where(np.arange(corners) % 2, 0.45, 1.0) if CLASSES[label] == "star" else np.ones(corners)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _scene(rng: np.random.Generator, height: int, width: int) -> list[tuple[int, shapely.Geometry, shapely.Geometry]]:
    """(label, whole shape, visible part) of every shape, front to back, in pixels."""
    frame = shapely.box(0, 0, width, height)
    covered = shapely.Polygon()
    scene = []
    for _ in range(rng.integers(INSTANCES[0], INSTANCES[1] + 1)):
        label = int(rng.integers(len(CLASSES)))
        radius = SMALLEST / 2 * (LARGEST * min(height, width) / SMALLEST) ** rng.random() ** 0.8
        shape = affinity.rotate(shapely.Polygon(_outline(label) * radius), rng.uniform(0, 360), origin=(0, 0))
        if scene and rng.random() < NEIGHBORS:
            near, angle = scene[rng.integers(len(scene))][1], rng.uniform(0, 2 * np.pi)
            distance = rng.uniform(0.4, 0.9) * (radius + np.sqrt(near.area / np.pi))
            x, y = near.centroid.x + distance * np.cos(angle), near.centroid.y + distance * np.sin(angle)
        else:
            x, y = rng.uniform(0.05, 0.95, size=2) * (width, height)
        shape = affinity.translate(shape, x, y)
        parts = shapely.get_parts(shape.intersection(frame).difference(covered))
        visible = shapely.MultiPolygon([part for part in parts if part.area >= SPECK])
        if visible.area >= MIN_VISIBLE * shape.area:
            scene.append((label, shape, visible))
            covered = covered.union(shape)
    return scene


def _draw(canvas: np.ndarray, scene: list, rng: np.random.Generator) -> None:
    """Paint the shapes on a canvas (height, width, 3) of values in [0, 1], the last one first."""
    for label, shape, _ in reversed(scene):
        height, width = canvas.shape[:2]
        margin = 6
        x0, y0, x1, y1 = shape.bounds
        x0, y0 = max(0, int(x0) - margin), max(0, int(y0) - margin)
        x1, y1 = min(width, int(x1) + margin), min(height, int(y1) + margin)
        patch = canvas[y0:y1, x0:x1]
        local = affinity.translate(shape, -x0, -y0)
        size = np.sqrt(shape.area)
        shadow = _coverage(affinity.translate(local, *rng.uniform(0.5, 2.5, size=2)), patch.shape, blur=1.5)
        patch *= 1 - 0.4 * shadow
        color = _contrasting(rng, patch.mean(axis=(0, 1)), label / len(CLASSES))
        rim = local.buffer(-min(max(0.04 * size, 0.6), 2.0))
        body = _coverage(local, patch.shape)
        inside = _coverage(rim, patch.shape)
        fill = _fill(rng, color, patch.shape)
        patch += body * (color * 0.55 - patch)
        patch += inside * (fill - patch)


def _coverage(shape: shapely.Geometry, patch_shape: tuple[int, ...], blur: float = 0.0) -> np.ndarray:
    """Fraction (h, w, 1) of every pixel inside the shape."""
    height, width = patch_shape[:2]
    mask = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    draw = ImageDraw.Draw(mask)
    for polygon in flat_polygons(shape):
        # PIL's coordinates refer to the centers of pixels.
        draw.polygon((polygon * SUPERSAMPLING - 0.5).tolist(), fill=255)
    mask = mask.resize((width, height), Image.Resampling.BOX)
    if blur:
        mask = mask.filter(ImageFilter.GaussianBlur(blur))
    return np.asarray(mask, dtype=np.float64)[..., None] / 255


def _hsv(hue, saturation, value) -> np.ndarray:
    channels = (np.array([5, 3, 1]) + hue * 6) % 6
    return value * (1 - saturation * np.clip(np.minimum(channels, 4 - channels), 0, 1))


def _contrasting(rng: np.random.Generator, background: np.ndarray, hue: float) -> np.ndarray:
    """Of a few bright colors around a hue, the one with the most contrast."""
    hues = hue + HUE_SPREAD * rng.uniform(-1, 1, size=3)
    colors = [_hsv(h, rng.uniform(0.55, 0.95), rng.uniform(0.75, 1.0)) for h in hues]
    return max(colors, key=lambda color: np.abs(color - background).sum())


def _waves(rng: np.random.Generator, height: int, width: int, period: float) -> np.ndarray:
    """Stripes (height, width) in [0, 1] at a random angle."""
    y, x = np.mgrid[:height, :width]
    angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    return 0.5 + 0.5 * np.sin(2 * np.pi * along / period + phase)


def _fill(rng: np.random.Generator, color: np.ndarray, patch_shape: tuple[int, ...]) -> np.ndarray:
    """Inside of a shape: plain, a gradient, or stripes."""
    height, width = patch_shape[:2]
    kind = rng.integers(3)
    if kind == 0:
        amount = np.zeros((height, width))
    elif kind == 1:
        amount = _waves(rng, height, width, 4.0 * max(height, width))
    else:
        amount = (_waves(rng, height, width, rng.uniform(5, 10)) - 0.5) * 3 + 0.5
    other = _hsv(rng.random(), 0.3, 1.0) if rng.random() < 0.3 else color * 0.7 + 0.3
    amount = amount.clip(0, 1)[..., None] * 0.8
    return color * (1 - amount) + other * amount


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Muted texture (height, width, 3): two colors mixed by a pattern, under noise of three scales."""
    first, second = (_hsv(rng.random(), rng.uniform(0.05, 0.4), rng.uniform(0.25, 0.9)) for _ in range(2))
    kind = rng.integers(4)
    if kind == 0:
        mix = _waves(rng, height, width, 3.0 * max(height, width))
    elif kind == 1:
        mix = _waves(rng, height, width, rng.uniform(10, 40))
    elif kind == 2:
        cell = rng.uniform(12, 40)
        mix = _waves(rng, height, width, cell) * _waves(rng, height, width, cell)
    else:
        mix = _noise(rng, height, width, rng.uniform(16, 48)) * 1.5 + 0.5
    canvas = first + (second - first) * mix.clip(0, 1)[..., None]
    for cell, strength in ((24, 0.15), (6, 0.08), (1.5, 0.06)):
        canvas += strength * rng.random() * _noise(rng, height, width, cell)[..., None]
    return canvas.clip(0, 1)


def _noise(rng: np.random.Generator, height: int, width: int, cell: float) -> np.ndarray:
    """Smooth noise (height, width) of about unit variance, whose blobs are `cell` pixels wide."""
    coarse = rng.standard_normal((int(height / cell) + 2, int(width / cell) + 2)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
