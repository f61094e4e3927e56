"""Detect objects in images with trained weights."""

from __future__ import annotations

import copy
import logging
import os
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from PIL import Image, ImageOps
from rich.progress import Progress
from torchvision.transforms.v2 import functional as F

from .checkpoint.read import CheckpointError, read_checkpoint, state_dict_of, strip_prefixes
from .config import (
    UntrustedConfigError,
    apply_overrides,
    check_config,
    from_untrusted_yaml,
    instantiate,
    load,
    override_keys,
)
from .data import COCO_CATEGORIES, DataError
from .detection.masks import paste_in_parts, paste_masks
from .engine.final_config import final_config, num_classes
from .engine.model import build_model
from .engine.runtime import choose_device
from .engine.weights import load_state
from .evaluation import to_coco_results
from .files import write_json
from .visualize import draw_instances, save_png

logger = logging.getLogger(__name__)

PREDICTIONS_FILE = "predictions.json"
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_LONGEST_NAME = 200  # bytes; file systems allow 255, with the number, suffix and temporary name that are added
_SCORE_THRESHOLD = "test_score_thresh"

AnyImage = str | os.PathLike | Image.Image | np.ndarray | torch.Tensor


class Predictor:
    """A detector with its preprocessing; call it with an image.

    Args:
        cfg_or_path: config or its path; None takes the config saved in ``weights``, from which only parts of the
            shipped configs are built.
        weights: checkpoint of the detector.
        device: ``auto`` is CUDA where there is a GPU, else the CPU; or cpu, cuda, cuda:1, mps.
        score_threshold: detections below it are left out, in [0, 1]. The config's threshold applies too; a warning says
            so if it is higher.
        overrides: ``key=value`` for the config.

    Attributes:
        model: the detector, in eval mode. device: its device.
        classes: names by label: the checkpoint's, else COCO's for 80 classes, else class_0, class_1, ...
        category_ids: dataset ids by label.

    Raises:
        CheckpointError: the weights cannot be read, do not fit the config, or have NaN or infinite values.
        ValueError: unknown device, or a threshold outside [0, 1].
        RuntimeError: the device does not exist.
    """

    def __init__(
        self,
        cfg_or_path: DictConfig | str | os.PathLike | None,
        weights: str | os.PathLike,
        device: str | torch.device = "auto",
        score_threshold: float = 0.5,
        overrides: Sequence[str] = (),
    ):
        if not 0 <= score_threshold <= 1:
            raise ValueError(f"score_threshold must be in [0, 1], got {score_threshold}")
        self.device = choose_device(str(device))
        content = read_checkpoint(weights)
        meta = _checked(content.get("meta") or {}, weights)
        cfg = _config(cfg_or_path, meta, weights)
        apply_overrides(cfg, overrides)
        for key in ("model", "dataloader.test.mapper"):
            if not OmegaConf.is_dict(OmegaConf.select(cfg, key)):
                source = weights if cfg_or_path is None or isinstance(cfg_or_path, DictConfig) else cfg_or_path
                raise ValueError(f"{source}: its config has no section {key}; pass the one that the weights belong to")
        check_config(cfg)
        if "classes" in meta:
            cfg = final_config(cfg, SimpleNamespace(classes=meta["classes"]), override_keys(overrides))
        self.classes, self.category_ids = _categories(meta, num_classes(cfg)[1])
        self.score_threshold = score_threshold
        self._mapper = instantiate(cfg.dataloader.test.mapper)
        self.model = build_model(cfg, pretrained=False)
        load_state(self.model, strip_prefixes(state_dict_of(content, weights), ("module.",)), weights)
        self.model.to(self.device).eval()
        limits = {key: limit for key, limit in _score_limits(cfg.model, "model") if limit > score_threshold}
        if limits:
            logger.warning(
                "score threshold %g has no effect: the config finds nothing below %g; to change that, override %s",
                score_threshold,
                max(limits.values()),
                " ".join(f"{key}={score_threshold:g}" for key in limits),
            )

    def __call__(self, image: AnyImage) -> dict[str, Any]:
        """Detect the objects in an image.

        Args:
            image: path; PIL image; uint8 RGB array (H, W, 3); or uint8 RGB tensor (3, H, W).

        Returns:
            in pixels of the image (of a file, after its EXIF orientation), on the CPU, best first: ``boxes`` float32
            (N, 4) xyxy, ``scores`` (N,), ``labels`` int64 (N,), ``masks`` bool (N, H, W) if the detector predicts
            masks, and ``class_names``, N str. For large images with many objects :meth:`detect` needs less memory.

        Raises:
            DataError: the image cannot be read, is empty, or has another type or shape.
        """
        image = open_image(image)
        result = self.detect(image)
        if "mask_probabilities" in result:
            maps = result.pop("mask_probabilities")
            result["masks"] = paste_masks(maps, result["boxes"], (image.height, image.width))
        return {key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in result.items()}

    @torch.inference_mode()
    def detect(self, image: Image.Image) -> dict[str, Any]:
        """As :meth:`__call__`, for a PIL image in RGB, with soft maps instead of masks.

        Returns:
            on :attr:`device`, best first: ``boxes`` float32 (N, 4) xyxy, ``scores`` (N,), ``labels`` int64 (N,) and
            ``class_names``, N str; from detectors with masks also ``mask_probabilities`` (N, S, S) in [0, 1], soft maps
            of the boxes. ``mimdet.detection.masks.paste_in_parts`` makes masks of them, a few at a time.
        """
        # test augmentations only resize: they draw no random numbers
        resized, _ = self._mapper.augmentations(image, None, np.random.default_rng(0))
        pixels = F.pil_to_tensor(resized)
        if self._mapper.image_format == "BGR":
            pixels = pixels.flip(0)
        (result,) = self.model([pixels.to(self.device)], output_sizes=[(image.height, image.width)], paste=False)
        keep = result["scores"] >= self.score_threshold
        result = {key: value[keep] for key, value in result.items()}
        return {**result, "class_names": [self.classes[label] for label in result["labels"].tolist()]}


@dataclass(frozen=True)
class PredictionReport:
    """Result of :func:`predict_files`.

    Attributes:
        predictions: the file with all detections.
        drawings: the written images, in the order of the processed inputs.
        objects: number of detected objects in each processed input.
        skipped: path of each input that could not be processed, and the reason.
    """

    predictions: Path
    drawings: list[Path] = field(default_factory=list)
    objects: dict[Path, int] = field(default_factory=dict)
    skipped: list[tuple[Path, str]] = field(default_factory=list)

    def __str__(self) -> str:
        total, images = sum(self.objects.values()), sum(count > 0 for count in self.objects.values())
        return f"{total} objects in {images} of {len(self.objects)} images"


def predict_files(
    inputs: Iterable[str | os.PathLike] | str | os.PathLike,
    output_dir: str | os.PathLike,
    predictor: Predictor,
    progress: bool = True,
) -> PredictionReport:
    """Detect the objects in image files; write drawings and a list of the detections.

    ``output_dir`` receives a PNG of the same name for each image, with its detections (small images are enlarged), and
    ``predictions.json``: a COCO results list whose entries also have ``file_name`` and ``category_name``;
    ``image_id`` counts the inputs from 1. Names that occur more than once get a prefix, the name of their folder.

    An image that cannot be read, detected or drawn is named in a warning and skipped. ``predictions.json`` is always
    written, after an error or Ctrl-C too. Only one mask is in memory at a time.

    Args:
        inputs: files, and folders whose images are found at any depth (hidden files and ``output_dir`` aside).
        progress: show a progress bar.

    Raises:
        FileNotFoundError: an input does not exist.
        OSError: ``output_dir`` is not a folder or cannot be written.
        DataError: no images are found, or none of them can be processed.
    """
    output_dir = Path(output_dir)
    files = find_images([inputs] if isinstance(inputs, (str, os.PathLike)) else inputs, output_dir)
    check_output(output_dir)
    report = PredictionReport(output_dir / PREDICTIONS_FILE)
    detections: list[dict[str, Any]] = []
    drawings = _drawing_paths(files, output_dir)
    try:
        with Progress(disable=not progress) as bar:
            for number, file in enumerate(bar.track(files, description="detecting"), start=1):
                try:
                    image = open_image(file)
                    detected = predictor.detect(image)
                    names = detected.pop("class_names")
                    results = _coco_results(detected, (image.height, image.width), number, predictor.category_ids)
                    for result, name in zip(results, names, strict=True):
                        detections.append({"file_name": str(file), **result, "category_name": name})
                    report.objects[file] = len(results)
                    drawing = _draw(image, detected, results, predictor.classes)
                except torch.AcceleratorError:  # the CUDA context is lost: every other image would fail
                    raise
                except Exception as error:  # an image can make each step fail with many types
                    reason = _reason(error, file, "drawn" if file in report.objects else "processed")
                    report.skipped.append((file, reason))
                    logger.warning("skipped: %s", reason)
                    logger.debug("%s", file, exc_info=True)
                    continue
                with _writing(drawings[number - 1]) as path:
                    save_png(drawing, path)
                report.drawings.append(path)
    finally:
        with _writing(report.predictions) as path:
            write_json(path, detections)
        logger.info("%s: %s", report, output_dir)
    if not report.objects:
        raise DataError(f"none of the {len(files)} images can be processed: {report.skipped[0][1]}")
    return report


def _coco_results(
    detected: dict[str, Any], size: tuple[int, int], number: int, category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """COCO results of :meth:`Predictor.detect` for an image of ``size``, with masks encoded one at a time."""
    if "mask_probabilities" in detected:
        detected = {**detected, "masks": paste_in_parts(detected["mask_probabilities"], detected["boxes"], size)}
    return to_coco_results(detected, number, category_ids)


def _draw(
    image: Image.Image, detected: dict[str, Any], results: list[dict[str, Any]], classes: Sequence[str]
) -> Image.Image:
    masks = [result["segmentation"] for result in results] if "mask_probabilities" in detected else None
    scores = detected["scores"]
    return draw_instances(image, detected["boxes"], detected["labels"], classes, scores=scores, masks=masks)


def _reason(error: Exception, file: Path, done: str) -> str:
    if isinstance(error, DataError) and str(file) in str(error):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"image {file} cannot be {done}: {type(error).__name__}{': ' + lines[0] if lines else ''}"


@contextmanager
def _writing(path: Path) -> Iterator[Path]:
    try:
        yield path
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error


def check_output(output_dir: str | os.PathLike) -> None:
    """Check that a folder can be created and written, without creating it.

    Raises:
        NotADirectoryError: it, or one of its parents, is a file.
        PermissionError: no right to write.
    """
    folder = Path(output_dir)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not existing.is_dir():
        raise NotADirectoryError(f"cannot write to {output_dir}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write to {output_dir}: no right to write in {existing}")


def find_images(inputs: Iterable[str | os.PathLike], output_dir: str | os.PathLike | None = None) -> list[Path]:
    """Files of ``inputs``, and images at any depth in their folders, each once.

    Args:
        output_dir: folder to leave out: a second run would take the drawings of the first as inputs.

    Raises:
        FileNotFoundError: an input does not exist.
        DataError: there are no images, or an input folder is ``output_dir``.
    """
    inputs = [Path(path).expanduser() for path in inputs]
    excluded = None if output_dir is None else Path(output_dir).resolve()
    images: dict[Path, Path] = {}
    for path in inputs:
        if path.is_dir():
            if path.resolve() == excluded:
                raise DataError(f"{path} is both input and output folder; write the output somewhere else")
            for file in _walk(path, excluded):
                images.setdefault(file.resolve(), file)
        elif path.is_file():
            images.setdefault(path.resolve(), path)
        else:
            raise FileNotFoundError(f"no such file or folder: {path}")
    if not images:
        where = ", ".join(map(str, inputs)) or "no input given"
        raise DataError(f"no images found ({where}); known suffixes: {', '.join(SUFFIXES)}")
    return list(images.values())


def open_image(image: AnyImage) -> Image.Image:
    """An image as PIL in RGB, with a file's EXIF orientation applied.

    Raises:
        DataError: it cannot be read, is empty, has more than 8 bits a channel, or is an array or tensor of another
            type or shape.
    """
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return _from_array(image)
    name = "the image" if isinstance(image, Image.Image) else f"image {image}"
    try:
        if isinstance(image, Image.Image):
            return _to_rgb(image, name)
        if os.path.exists(image) and not os.path.isfile(image):
            raise DataError(f"{name} is not a file")  # opening a named pipe would wait for a writer
        with Image.open(image) as opened:
            ImageOps.exif_transpose(opened, in_place=True)
            return _to_rgb(opened, name)
    except DataError:
        raise
    except Exception as error:  # decoders of broken files raise errors of many types
        raise DataError(f"{name} cannot be read: {error or type(error).__name__}") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise DataError(f"{name} has no pixels: {image.width}x{image.height}")
    if image.mode == "F" or image.mode.startswith("I"):
        raise DataError(f"{name} has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits")
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_array(image: np.ndarray | torch.Tensor) -> Image.Image:
    shape, channels = ("(3, H, W)", 0) if isinstance(image, torch.Tensor) else ("(H, W, 3)", 2)
    if str(image.dtype).removeprefix("torch.") != "uint8" or image.ndim != 3 or image.shape[channels] != 3:
        kind = "tensor" if channels == 0 else "array"
        raise DataError(f"an image as {kind} must be uint8 {shape}, got {image.dtype} {tuple(image.shape)}")
    if 0 in image.shape:
        raise DataError(f"the image has no pixels: {tuple(image.shape)}")
    return F.to_pil_image(image.cpu() if channels == 0 else np.ascontiguousarray(image))


def _score_limits(node: Any, key: str) -> Iterator[tuple[str, float]]:
    """Score thresholds of a config, with their keys below ``key``."""
    if isinstance(node, (DictConfig, ListConfig)):
        names = list(node) if isinstance(node, DictConfig) else range(len(node))
        for name in names:
            if name == _SCORE_THRESHOLD:
                yield f"{key}.{name}", float(node[name])
            elif not OmegaConf.is_interpolation(node, name):
                yield from _score_limits(node[name], f"{key}.{name}")


def _checked(meta: Any, weights: Any) -> Mapping[str, Any]:
    """What a checkpoint says of its classes, checked: the author of the file wrote it."""
    if not isinstance(meta, Mapping):
        raise CheckpointError(f"{weights}: its meta is a {type(meta).__name__}, not a dictionary")
    if "classes" not in meta:
        return meta
    classes, ids = meta["classes"], meta.get("category_ids")
    if not (isinstance(classes, (list, tuple)) and classes and all(isinstance(name, str) for name in classes)):
        raise CheckpointError(f"{weights}: its meta.classes is not a list of names: {reprlib.repr(classes)}")
    numbers = isinstance(ids, (list, tuple)) and all(type(number) is int for number in ids)
    if ids and not (numbers and len(ids) == len(classes)):
        raise CheckpointError(f"{weights}: its meta.category_ids is not a number for each class: {reprlib.repr(ids)}")
    return meta


def _config(cfg_or_path: DictConfig | str | os.PathLike | None, meta: dict[str, Any], weights: Any) -> DictConfig:
    """The caller's config, which is trusted code, else the config saved in the weights, which is not trusted."""
    if cfg_or_path is not None:
        return copy.deepcopy(cfg_or_path) if isinstance(cfg_or_path, DictConfig) else load(cfg_or_path)
    if not meta.get("config"):
        raise CheckpointError(f"{weights} carries no config; pass the one that it was trained with (--config-file)")
    try:
        return from_untrusted_yaml(meta["config"])
    except UntrustedConfigError as error:
        raise CheckpointError(
            f"{weights}: the config in it is refused, and nothing of it was run: {error}. A config that comes with "
            "weights may build only what the shipped configs build. If you trust the Python config that it was trained "
            "with, pass that (--config-file CONFIG.py)"
        ) from error


def _categories(meta: dict[str, Any], count: int | None) -> tuple[list[str], list[int]]:
    if "classes" in meta:
        classes = list(meta["classes"])
        return classes, list(meta.get("category_ids") or range(1, len(classes) + 1))
    if count is None:
        raise CheckpointError("neither the checkpoint nor the config says how many classes the detector has")
    if count == len(COCO_CATEGORIES):
        return list(COCO_CATEGORIES.values()), list(COCO_CATEGORIES)
    return [f"class_{label}" for label in range(count)], list(range(1, count + 1))


def _walk(folder: Path, excluded: Path | None) -> Iterator[Path]:
    for path, folders, files in os.walk(folder):
        root = Path(path)
        folders[:] = sorted(name for name in folders if name[0] != "." and (root / name).resolve() != excluded)
        yield from (root / name for name in sorted(files) if name[0] != "." and name.lower().endswith(SUFFIXES))


def _drawing_paths(files: Sequence[Path], output_dir: Path) -> list[Path]:
    """A PNG path for each file: unique even if case is ignored, and neither an input nor a folder."""
    stems = Counter(file.stem.casefold() for file in files)
    used = {str(file.resolve()).casefold() for file in files}
    paths = []
    for file in files:
        unique = stems[file.stem.casefold()] == 1
        name = file.stem if unique else f"{file.resolve().parent.name}_{file.stem}"
        while len(os.fsencode(name)) > _LONGEST_NAME:
            name = name[:-1]
        number, path = 2, output_dir / f"{name}.png"
        while str(path.resolve()).casefold() in used or path.is_dir():
            number, path = number + 1, output_dir / f"{name}_{number}.png"
        used.add(str(path.resolve()).casefold())
        paths.append(path)
    return paths
