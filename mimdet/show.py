"""Pages of images for a look at data and models: training samples with their tokens, features with proposals."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torchvision.transforms.v2 import functional as F

from .config import instantiate
from .data import DataError, read_image
from .files import check_replaceable
from .modeling.noise import NoiseSource
from .modeling.sampling import cell_sizes, check_ratio, sampling_noise, split_padded
from .predict import AnyImage, Predictor, open_image
from .visualize import draw_instances, image_grid, save_png

logger = logging.getLogger(__name__)

SOFTWARE = "mimdet show"  # in a page's PNG, so that no other file is replaced
SPLITS = ("train", "test")
_HEIGHT = 420  # of each image of a page, pixels
_DROPPED = 0.25  # brightness of tokens that the encoder does not see
_PROPOSALS = 50
_BACKBONE = "model.backbone.bottom_up"


def data_page(
    cfg: DictConfig, split: str = "train", count: int = 8, seed: int = 0, ratio: float | None = None
) -> torch.Tensor:
    """Images of a dataset with their annotations and, for "train", as samples of the training.

    Each column is an image: its annotations, the augmented sample with its targets, and the sample's kept tokens,
    the dropped ones darkened. An image that cannot be read or augmented is named in a warning and left out.

    Args:
        cfg: the whole config.
        split: "train" or "test"; "test" shows annotations alone.
        count: images, chosen at random; all of a smaller dataset.
        seed: chooses images, augmentations and tokens.
        ratio: keep ratio of the tokens; None takes the config's ``sample_ratio``. Without one no tokens are shown.

    Returns:
        uint8 (3, H, W).

    Raises:
        ValueError: an unknown split, fewer than one image, a ratio outside (0, 1], or one for a backbone that samples
            no tokens.
        DataError: the dataset is empty or cannot be read, or no image can.
    """
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is unknown; choose from {', '.join(SPLITS)}")
    if count < 1:
        raise ValueError(f"the number of images must be at least 1, got {count}")
    backbone = OmegaConf.select(cfg, _BACKBONE)
    samples = "sample_ratio" in backbone
    if ratio is not None and not samples:
        raise ValueError(f"keep ratio {ratio}: the config's backbone samples no tokens")
    ratio = check_ratio(ratio if ratio is not None else backbone.sample_ratio, "keep ratio") if samples else None
    dataset = instantiate(cfg.dataloader[split].dataset)
    mapper = instantiate(cfg.dataloader.train.mapper) if split == "train" else None
    chosen = np.random.default_rng(seed).permutation(len(dataset))
    columns: list[list[torch.Tensor]] = []
    captions: list[str] = []
    for index in chosen.tolist():
        if len(columns) == count:
            break
        record = dataset[index]
        try:
            column = [_annotated(F.pil_to_tensor(read_image(record)), record, dataset.classes)]
            if mapper is not None:
                sample = mapper(record, np.random.default_rng([seed, index]))
                column += _sample_images(sample, mapper.image_format, dataset.classes, backbone, ratio, [seed, index])
        except DataError as error:
            logger.warning("left out: %s", error)
            continue
        columns.append(column)
        captions.append(f"{record['image_id']}: {len(record['boxes'])} objects")
    if not columns:
        raise DataError(f"dataloader.{split}: no image of the dataset can be shown")
    titles = ["annotations", "training sample", f"kept tokens, {ratio:g}" if samples else ""]
    rows = [list(row) for row in zip(*columns, strict=True)]
    return image_grid(rows, titles[: len(rows)], captions)


def _sample_images(
    sample: dict[str, Any],
    image_format: str,
    classes: Sequence[str],
    backbone: DictConfig,
    ratio: float | None,
    seed: Sequence[int],
) -> list[torch.Tensor]:
    """A training sample with its targets and, for a ratio, its kept tokens."""
    pixels = sample["image"] if image_format == "RGB" else sample["image"].flip(0)
    images = [_annotated(pixels, sample["targets"], classes)]
    if ratio is not None:
        patch = backbone.encoder.patch_size
        kept = kept_tokens(pixels.shape[1:], patch, ratio, backbone.sampling, seed)
        kept = kept.repeat_interleave(patch, 0).repeat_interleave(patch, 1)[: pixels.shape[1], : pixels.shape[2]]
        images.append(_scaled(torch.where(kept, pixels, (pixels * _DROPPED).to(torch.uint8))))
    return images


def kept_tokens(
    size: tuple[int, int], patch: int, ratio: float, sampling: str = "random", seed: int | Sequence[int] = 0
) -> torch.Tensor:
    """(rows, columns) bool, which patches of an image the encoder sees, as in a batch of it alone.

    Args:
        size: (height, width) of the image, pixels.
        patch: side of a patch, pixels.
        ratio: keep ratio in (0, 1].
        sampling: "random" or "grid".
        seed: of the random numbers.
    """
    ((rows, columns),) = cell_sizes([tuple(size)], patch)
    noise = NoiseSource("tokens")
    if sampling == "random":
        noise.fixed = [torch.from_numpy(np.random.default_rng(seed).random((1, rows * columns), dtype=np.float32))]
    numbers = sampling_noise(sampling, 1, (rows, columns), ratio, noise, torch.device("cpu"))
    kept = split_padded([(rows, columns)], (rows, columns), ratio, numbers, torch.device("cpu")).ids_keep
    mask = torch.ones(rows * columns, dtype=torch.bool)
    if kept is not None:
        mask.zero_()[kept[0]] = True
    return mask.view(rows, columns)


def model_page(predictor: Predictor, image: AnyImage) -> torch.Tensor:
    """An image, the norms of its features over the channels (bright is large), its proposals and its detections.

    Args:
        predictor: the detector; detections have at least its score threshold.
        image: path; PIL image; uint8 RGB array (H, W, 3); or uint8 RGB tensor (3, H, W).

    Returns:
        uint8 (3, H, W). The 50 best proposals are shown, the brighter the better; a detector without a proposal
        generator has none.

    Raises:
        DataError: the image cannot be read, is empty, or has another type or shape.
    """
    image = open_image(image)
    pixels = F.pil_to_tensor(image)
    model, seen = predictor.model, {}

    def keep(name):
        return lambda module, inputs, output: seen.update({name: (inputs, output)})

    with ExitStack() as hooks:
        modules = {"backbone": model.backbone, "features": model.backbone.bottom_up}
        if hasattr(model, "proposal_generator"):
            modules["proposals"] = model.proposal_generator
        for name, module in modules.items():
            hooks.callback(module.register_forward_hook(keep(name)).remove)
        detected = predictor(image)
    (batch, *_), _ = seen["backbone"]
    (size,) = batch.image_sizes
    panels = {"image": _scaled(pixels)}
    shown_size = panels["image"].shape[1:]
    for name, feature in dict(seen["features"][1]).items():
        panels[f"{name}, {feature.shape[1]} channels"] = _heat_map(feature[0], size, batch.tensor.shape[2:], shown_size)
    if "proposals" in seen:
        proposals = seen["proposals"][1][0]
        boxes = proposals.boxes[0][proposals.valid[0]].cpu()
        ratios = torch.tensor([image.width / size[1], image.height / size[0]]).repeat(2)
        panels[f"best {min(len(boxes), _PROPOSALS)} of {len(boxes)} proposals"] = _draw_proposals(image, boxes * ratios)
    names = detected.pop("class_names")
    count = len(names)
    shown = {key: detected[key] for key in ("boxes", "labels", "scores", "masks") if key in detected}
    scale = _HEIGHT / image.height
    panels[f"{count} detections"] = draw_instances(pixels, classes=predictor.classes, scale=scale, **shown)
    return image_grid([list(panels.values())], captions=list(panels))


def save_page(page: torch.Tensor, path: Path) -> None:
    """Write a page, uint8 (3, H, W), as PNG, atomically.

    Raises:
        FileExistsError: ``path`` is a file of something else; see :func:`mimdet.files.check_replaceable`.
    """
    check_replaceable(path, SOFTWARE)
    about = PngInfo()
    about.add_text("Software", SOFTWARE)
    save_png(page, path, about)


def _annotated(pixels: torch.Tensor, target: dict[str, Any], classes: Sequence[str]) -> torch.Tensor:
    scale = _HEIGHT / pixels.shape[1]
    boxes = torch.as_tensor(target["boxes"])
    return draw_instances(pixels, boxes, target["labels"], classes, masks=target.get("masks"), scale=scale)


def _scaled(pixels: torch.Tensor) -> torch.Tensor:
    """An image of ``_HEIGHT`` pixels."""
    return F.resize(pixels, [_HEIGHT, max(1, round(pixels.shape[2] * _HEIGHT / pixels.shape[1]))], antialias=True)


def _heat_map(
    feature: torch.Tensor, size: tuple[int, int], canvas: Sequence[int], shown_size: Sequence[int]
) -> torch.Tensor:
    """Norms of a feature map (C, h, w) of a canvas, in colors, cut to the image of ``size`` in it, resized."""
    norms = feature.float().norm(dim=0).cpu()
    low, high = norms.quantile(torch.tensor([0.01, 0.99])).tolist()
    levels = ((norms - low) / max(high - low, 1e-12)).clamp(0, 1)
    colors = torch.from_numpy(matplotlib.colormaps["viridis"](levels.numpy(), bytes=True)[..., :3]).permute(2, 0, 1)
    whole = F.resize(colors, list(canvas), F.InterpolationMode.NEAREST)[:, : size[0], : size[1]]
    return F.resize(whole, list(shown_size), F.InterpolationMode.NEAREST)


def _draw_proposals(image: Image.Image, boxes: torch.Tensor) -> torch.Tensor:
    scale = _HEIGHT / image.height
    drawn = F.to_pil_image(_scaled(F.pil_to_tensor(image)))
    draw = ImageDraw.Draw(drawn)
    best = (boxes[:_PROPOSALS] * scale).tolist()
    for rank, box in reversed(list(enumerate(best))):
        level = 1 - rank / len(best)
        draw.rectangle([int(x) for x in box], outline=matplotlib.colormaps["autumn"](level, bytes=True)[:3], width=2)
    return F.pil_to_tensor(drawn)
