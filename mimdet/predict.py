"""Detect objects in pictures with trained weights."""

from __future__ import annotations

import copy
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image, ImageOps
from rich.progress import Progress
from torchvision.transforms.v2 import functional as F

from .checkpoint.read import CheckpointError, read_checkpoint, state_dict_of, strip_prefixes
from .config import UntrustedConfigError, apply_overrides, from_untrusted_yaml, instantiate, load
from .data import COCO_CATEGORIES, DataError
from .engine.model import build_model, match_num_classes, num_classes
from .engine.weights import load_state
from .evaluation import to_coco_results
from .files import write_json
from .visualize import draw_instances, save_png

logger = logging.getLogger(__name__)

PREDICTIONS_FILE = "predictions.json"
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

Picture = str | os.PathLike | Image.Image | np.ndarray | torch.Tensor


class Predictor:
    """A detector ready to be called with one picture after the other.

    Args:
        cfg_or_path: config or its path; None takes the config that a training wrote into ``weights``.
        weights: checkpoint of the detector.
        device: ``auto`` is CUDA where there is a GPU, else the CPU; other names are torch's.
        score_threshold: detections below it are left out; the config's own threshold holds besides.
        overrides: ``key=value`` for the config.

    Attributes:
        model: the detector, in eval mode. device: where it is.
        classes: names by label: the checkpoint's, else COCO's for 80 classes, else class_0, class_1, ...
        category_ids: dataset ids by label.

    Raises:
        CheckpointError: the weights cannot be read or do not fit the config.
    """

    def __init__(
        self,
        cfg_or_path: DictConfig | str | os.PathLike | None,
        weights: str | os.PathLike,
        device: str | torch.device = "auto",
        score_threshold: float = 0.5,
        overrides: Sequence[str] = (),
    ):
        content = read_checkpoint(weights)
        meta = content.get("meta") or {}
        cfg = _config(cfg_or_path, meta, weights)
        apply_overrides(cfg, overrides)
        if "classes" in meta:
            match_num_classes(cfg, SimpleNamespace(classes=meta["classes"]), overrides)
        self.classes, self.category_ids = _categories(meta, num_classes(cfg)[1])
        self.score_threshold = score_threshold
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self._mapper = instantiate(cfg.dataloader.test.mapper)
        self.model = build_model(cfg, pretrained=False)
        load_state(self.model, strip_prefixes(state_dict_of(content, weights), ("module.",)), weights)
        self.model.to(self.device).eval()

    @torch.inference_mode()
    def __call__(self, image: Picture) -> dict[str, Any]:
        """Detect the objects in a picture.

        Args:
            image: path; PIL picture; uint8 RGB array (H, W, 3); or uint8 RGB tensor (3, H, W).

        Returns:
            in pixels of the picture as given (files are turned as their EXIF orientation says), on the CPU, best
            first: ``boxes`` float32 (N, 4) xyxy, ``scores`` (N,), ``labels`` int64 (N,), ``masks`` bool (N, H, W)
            unless the detector predicts none, and ``class_names``, N str.

        Raises:
            DataError: the picture cannot be read, or is of another form.
        """
        picture = read_picture(image)
        # test augmentations only resize, and draw no random numbers
        resized, _ = self._mapper.augmentations(picture, None, np.random.default_rng(0))
        pixels = F.pil_to_tensor(resized)
        if self._mapper.image_format == "BGR":
            pixels = pixels.flip(0)
        (result,) = self.model([pixels.to(self.device)], output_sizes=[(picture.height, picture.width)])
        keep = result["scores"] >= self.score_threshold
        detections = {key: result[key][keep].cpu() for key in ("boxes", "scores", "labels", "masks") if key in result}
        return {**detections, "class_names": [self.classes[label] for label in detections["labels"].tolist()]}


@dataclass(frozen=True)
class PredictionReport:
    """What :func:`predict_files` did.

    Attributes:
        drawings: the pictures written, in the order of the inputs that could be read.
        predictions: the file with all detections.
        skipped: path of each unreadable input, and why.
    """

    drawings: list[Path]
    predictions: Path
    skipped: list[tuple[Path, str]]


def predict_files(
    inputs: Iterable[str | os.PathLike] | str | os.PathLike,
    output_dir: str | os.PathLike,
    predictor: Predictor,
    progress: bool = True,
) -> PredictionReport:
    """Detect the objects in picture files and write what was found.

    ``output_dir`` receives a PNG for each picture, named as it, with the detections drawn (small pictures enlarged),
    and ``predictions.json``: a COCO results list whose entries also have ``file_name`` and ``category_name``, and
    whose ``image_id`` counts the inputs from 1. Names that occur more than once get their folder's name in front.
    On an error or Ctrl-C, what was done until then is still written.

    Args:
        inputs: files, and folders whose pictures are found at any depth (hidden files and ``output_dir`` aside).
        progress: show a progress bar.

    Raises:
        FileNotFoundError: an input does not exist.
        DataError: no pictures are found, or none of them can be read.
    """
    output_dir = Path(output_dir)
    files = find_pictures([inputs] if isinstance(inputs, (str, os.PathLike)) else inputs, output_dir)
    report = PredictionReport([], output_dir / PREDICTIONS_FILE, [])
    detections: list[dict[str, Any]] = []
    drawings = _drawing_paths(files, output_dir)
    try:
        with Progress(disable=not progress) as bar:
            for number, file in enumerate(bar.track(files, description="detecting"), start=1):
                try:
                    picture = read_picture(file)
                except DataError as error:
                    report.skipped.append((file, str(error)))
                    continue
                found = predictor(picture)
                names = found.pop("class_names")
                image = draw_instances(F.pil_to_tensor(picture), classes=predictor.classes, **found)
                results = to_coco_results(found, number, predictor.category_ids)
                save_png(image, drawings[number - 1])
                report.drawings.append(drawings[number - 1])
                for result, name in zip(results, names, strict=True):
                    detections.append({"file_name": str(file), **result, "category_name": name})
    finally:
        if report.drawings:
            write_json(report.predictions, detections)
            logger.info(
                "%d objects in %d of %d pictures: %s", len(detections), len(report.drawings), len(files), output_dir
            )
        for _, reason in report.skipped:
            logger.warning("skipped: %s", reason)
    if not report.drawings:
        raise DataError(f"none of the {len(files)} pictures can be read: {report.skipped[0][1]}")
    return report


def find_pictures(inputs: Iterable[str | os.PathLike], output_dir: str | os.PathLike | None = None) -> list[Path]:
    """The given files, and the pictures at any depth in the given folders, each once.

    Args:
        output_dir: a folder to leave out, lest a second run takes the first one's drawings for inputs.

    Raises:
        FileNotFoundError: an input does not exist.
        DataError: nothing is found, or a given folder is ``output_dir`` itself.
    """
    inputs = [Path(given).expanduser() for given in inputs]
    excluded = None if output_dir is None else Path(output_dir).resolve()
    found: dict[Path, Path] = {}
    for given in inputs:
        if given.is_dir():
            if given.resolve() == excluded:
                raise DataError(f"{given} is both input and output folder; write the output somewhere else")
            for file in _walk(given, excluded):
                found.setdefault(file.resolve(), file)
        elif given.is_file():
            found.setdefault(given.resolve(), given)
        else:
            raise FileNotFoundError(f"no such file or folder: {given}")
    if not found:
        where = ", ".join(map(str, inputs)) or "no input given"
        raise DataError(f"no pictures found ({where}); known suffixes: {', '.join(SUFFIXES)}")
    return list(found.values())


def read_picture(image: Picture) -> Image.Image:
    """A picture as PIL in RGB; files are turned as their EXIF orientation says.

    Raises:
        DataError: it cannot be read, has more than 8 bits a channel, or is an array or tensor of another form.
    """
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return _from_array(image)
    if isinstance(image, Image.Image):
        return _to_rgb(image, "the picture")
    try:
        with Image.open(image) as picture:
            return _to_rgb(ImageOps.exif_transpose(picture), f"picture {image}")
    except DataError:
        raise
    except Exception as error:  # decoders of broken files raise errors of many types
        raise DataError(f"picture {image} cannot be read: {error}") from error


def _to_rgb(picture: Image.Image, name: str) -> Image.Image:
    if picture.mode == "F" or picture.mode.startswith("I"):
        raise DataError(f"{name} has more than 8 bits a channel (mode {picture.mode}); convert it to 8 bits")
    return picture.convert("RGB")


def _from_array(image: np.ndarray | torch.Tensor) -> Image.Image:
    form, channels = ("(3, H, W)", 0) if isinstance(image, torch.Tensor) else ("(H, W, 3)", 2)
    if str(image.dtype).removeprefix("torch.") != "uint8" or image.ndim != 3 or image.shape[channels] != 3:
        kind = "tensor" if channels == 0 else "array"
        raise DataError(f"a picture as {kind} must be uint8 {form}, got {image.dtype} {tuple(image.shape)}")
    if 0 in image.shape:
        raise DataError(f"the picture has no pixels: {tuple(image.shape)}")
    return F.to_pil_image(image.cpu() if channels == 0 else np.ascontiguousarray(image))


def _config(given: DictConfig | str | os.PathLike | None, meta: dict[str, Any], weights: Any) -> DictConfig:
    """The config to build: the one given, which is the caller's code, else the weights' own, which is not trusted."""
    if not isinstance(meta, Mapping):
        raise CheckpointError(f"{weights}: its meta is a {type(meta).__name__}, not a dictionary")
    if given is not None:
        return copy.deepcopy(given) if isinstance(given, DictConfig) else load(given)
    if not meta.get("config"):
        raise CheckpointError(f"{weights} carries no config; pass the one that it was trained with (--config-file)")
    try:
        return from_untrusted_yaml(meta["config"])
    except UntrustedConfigError as error:
        raise CheckpointError(
            f"{weights}: the config in it is refused, and nothing of it was run: {error}. A config that comes with "
            "weights may build only what the shipped configs build. If you trust the one that it was trained with, "
            "pass that (--config-file CONFIG)"
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
    """A PNG path for each file; all differ, also where case does not count, and none is one of the files."""
    stems = Counter(file.stem.casefold() for file in files)
    taken = {str(file.resolve()).casefold() for file in files}
    paths = []
    for file in files:
        unique = stems[file.stem.casefold()] == 1
        name = file.stem if unique else f"{file.resolve().parent.name}_{file.stem}"
        number, path = 2, output_dir / f"{name}.png"
        while str(path.resolve()).casefold() in taken:
            number, path = number + 1, output_dir / f"{name}_{number}.png"
        taken.add(str(path.resolve()).casefold())
        paths.append(path)
    return paths
