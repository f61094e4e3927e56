"""A model, its data and one step of it, for the experiments on models."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn

from ..config import load
from ..engine.model import build_model
from ..modeling.memory import activation_bytes
from ..polygons import PackedPolygons
from ..testing import fixed_noise
from .baselines import bottom_up
from .equality import model_mismatch, reason
from .measure import peak_bytes, rounded
from .session import DTYPES, Candidate

MODES = ("train", "inference")
PARTS = ("backbone", "detector")
OBJECTS = 8  # in an image; COCO has 7.3


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a step works on, and how it is measured.

    Attributes:
        device: "cpu" or "cuda".
        output: file of results.
        part: one of ``PARTS``.
        modes: each one of ``MODES``.
        ratio: keep ratio.
        config, overrides: the detector.
        size, batch, dtype: of the images; dtype other than fp32 means autocast.
        rounds: see ``measure``.
    """

    device: str
    output: Path | None = None
    part: str = "backbone"
    modes: Sequence[str] = MODES
    ratio: float = 0.5
    config: str = "mimdet_b_mask_rcnn"
    overrides: Sequence[str] = ()
    size: tuple[int, int] = (480, 640)
    batch: int = 1
    dtype: str = "fp32"
    rounds: int = 15

    def __post_init__(self):
        """Raise ValueError for a part or a mode that is unknown."""
        check_choices([self.part], PARTS)
        check_choices(self.modes, MODES)

    @property
    def gpu(self) -> bool:
        """Whether the device is a GPU."""
        return torch.device(self.device).type == "cuda"

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context of the forward."""
        return torch.autocast(torch.device(self.device).type, DTYPES[self.dtype], enabled=self.dtype != "fp32")

    def keys(self, experiment: str, mode: str) -> dict[str, str | int]:
        """Key columns that all rows of the setting share."""
        size = "{}x{}".format(*self.size)
        common = {"part": self.part, "size": size, "batch": self.batch, "dtype": self.dtype, "mode": mode}
        return {"experiment": experiment, **common}


@dataclass(frozen=True)
class Workload:
    """A model and one step of it.

    Attributes:
        model: a detector or its backbone.
        step: forward; in training backward too, and for a detector the update.
        forward: the forward alone.
        resident: bytes of weights, and in training of the optimizer's state.
    """

    model: nn.Module
    step: Callable[[], object]
    forward: Callable[[], object]
    resident: int


def check_choices(names: Iterable[str], known: Collection[str], what: str = "to measure") -> None:
    """Raise ValueError, which lists the choices, unless all names are known."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no {', '.join(unknown)} {what}; choose from {', '.join(known)}")


def build_detector(config: str, overrides: Sequence[str], depth: int | None, device: str) -> nn.Module:
    """A config's detector with random weights, without checkpointing and with ``depth`` decoder blocks; None leaves
    the decoder to the config."""
    cfg = load(config, overrides)
    encoder = cfg.model.backbone.bottom_up.encoder
    encoder.checkpointing = False
    if encoder.recompute == "auto":
        encoder.recompute = "lean"  # what one machine has room for is no property of the model
    if depth is not None:
        cfg.model.backbone.bottom_up.decoder.depth = depth
    torch.manual_seed(0)
    return build_model(cfg, pretrained=False).to(device)


def idle_optimizer(detector: nn.Module) -> torch.optim.Optimizer:
    """AdamW with learning rate zero: it does the work of an update and changes no weight."""
    return torch.optim.AdamW((p for p in detector.parameters() if p.requires_grad), lr=0.0)


def step_of(detector: nn.Module, optimizer: torch.optim.Optimizer, mode: str, setting: Setting) -> Workload:
    """One step of a detector, or of its backbone, which does without ``optimizer``."""
    if setting.part == "detector":
        images, targets = random_batch(setting.batch, setting.size, detector.num_classes, setting.device)
        inputs = (images, targets) if mode == "train" else (images,)
        return detector_step(detector, lambda: detector(*inputs), optimizer, mode, setting)
    model, images = bottom_up(detector), random_images(setting)
    return backbone_step(model, lambda: [model(images)], mode, setting)


def backbone_step(model: nn.Module, run: Callable[[], list[dict]], mode: str, setting: Setting) -> Workload:
    """One step of a backbone: features, and in training backward from random gradients of all of them.

    Args:
        run: the forward of ``model``; returns the features of each batch by name.
    """

    def backward(batches: list[dict[str, torch.Tensor]]) -> None:
        features = [feature for of_batch in batches for feature in of_batch.values()]
        torch.autograd.backward(features, gradients_of(features))

    return _step(model, run, backward, mode, setting, copies=1)


def detector_step(
    model: nn.Module, run: Callable[[], object], optimizer: torch.optim.Optimizer, mode: str, setting: Setting
) -> Workload:
    """One step of a whole detector: losses, backward and update, or detections.

    Args:
        run: the forward of ``model``; in training it returns the losses by name.
    """

    def update(losses: dict[str, torch.Tensor]) -> None:
        sum(losses.values()).backward()
        optimizer.step()

    return _step(model, run, update, mode, setting, copies=3)


def _step(model: nn.Module, run: Callable, learn: Callable, mode: str, setting: Setting, copies: int) -> Workload:
    """``learn`` gets what ``run`` returns; in training there are so many ``copies`` of a weight."""
    training = mode == "train"
    model.train(training)

    def forward() -> object:
        with setting.autocast():
            return run()

    def train() -> None:
        learn(forward())
        forget_gradients(model)

    resident = sum(p.nbytes * (copies if training and p.requires_grad else 1) for p in model.parameters())
    return Workload(model, train if training else torch.inference_mode()(forward), forward, resident)


def candidate(
    work: Workload,
    keys: Mapping[str, str | int | float],
    expected: Mapping[str, torch.Tensor],
    mode: str,
    setting: Setting,
) -> Candidate:
    """A workload with its memory, or with the error that excludes it: outputs that are not ``expected``."""
    error = None
    try:
        actual = outputs_of(work.model if setting.part == "backbone" else bottom_up(work.model), mode, setting)
    except Exception as exception:  # whatever a model, its compiler or the allocator raises
        error = reason(exception)
    else:
        difference = model_mismatch(actual, expected, setting.dtype)
        error = f"wrong: {difference}" if difference else None
    values = sizes_of(work.model) | ({} if error else memory_of(work, mode, setting))
    return Candidate(keys, work.step, error, values)


def outputs_of(backbone: nn.Module, mode: str, setting: Setting) -> dict[str, torch.Tensor]:
    """Features, and in training the gradient of all encoder, decoder and stem parameters, each as one vector."""
    images = random_images(setting)
    length = setting.size[0] // 16 * (setting.size[1] // 16)
    noise = torch.rand(setting.batch, length, generator=torch.Generator().manual_seed(3)).to(setting.device)
    training = mode == "train"
    with without_drop_path(backbone):  # the backward pass may run the forward pass again
        with (
            torch.set_grad_enabled(training),
            exact_convolutions(),
            setting.autocast(),
            fixed_noise(backbone, tokens=noise),
        ):
            features = backbone(images)
        tensors = {name: feature.detach().float() for name, feature in features.items()}
        if training:
            smooth = smooth_features(features)
            torch.autograd.backward(smooth, gradients_of(smooth))
            parts = {f"encoder.{name}": getattr(backbone.encoder, name) for name in ("patch_embed", "blocks")}
            parts |= {name: getattr(backbone, name, None) for name in ("decoder", "pyramid")}
            for name, part in parts.items():
                if part is not None:
                    named = [p for _, p in sorted(part.named_parameters()) if p.requires_grad]
                    tensors[f"gradient of {name}"] = torch.cat([p.grad.flatten() for p in named])
        forget_gradients(backbone)
    return tensors


@contextlib.contextmanager
def with_attribute(model: nn.Module, name: str, value: float) -> Iterator[None]:
    """Inside, every module that has the attribute has this value."""
    with contextlib.ExitStack() as stack:
        for part in model.modules():
            if hasattr(part, name):
                stack.enter_context(mock.patch.object(part, name, value))
        yield


def without_drop_path(model: nn.Module) -> contextlib.AbstractContextManager:
    """Nothing is dropped: implementations draw in different ways."""
    return with_attribute(model, "drop_prob", 0.0)


def smooth_features(features: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """All but c5: max pooling sends the gradient to the larger of two cells, which may differ only by rounding."""
    return [feature for name, feature in features.items() if name != "c5"]


def sizes_of(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters, as columns of a row."""
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return {"parameters": sum(p.numel() for p in parameters), "trainable": trainable}


def memory_of(work: Workload, mode: str, setting: Setting) -> dict[str, float]:
    """MiB at the step's peak, and in training of activations, as columns of a row."""
    work.step()
    if setting.gpu:
        gc.collect()
        torch.cuda.empty_cache()
    peak = peak_bytes(work.step, setting.device)
    memory = {"peak_mib": peak, "allocated_mib": work.resident + peak}
    if setting.gpu:
        memory["reserved_mib"] = torch.cuda.max_memory_reserved()
    if mode == "train":
        memory["activation_mib"] = activation_bytes(work.forward, work.model.parameters())
    return {name: rounded(size / 2**20) for name, size in memory.items()}


def forget_gradients(model: nn.Module) -> None:
    """Free them; ``zero_grad`` goes through modules, and variants share parameters."""
    for parameter in model.parameters():
        parameter.grad = None


@contextlib.contextmanager
def exact_convolutions() -> Iterator[None]:
    """Convolutions without TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def random_images(setting: Setting) -> torch.Tensor:
    """(B, 3, H, W) noise in channels_last memory."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(setting.batch, 3, *setting.size, generator=generator).to(setting.device)
    return images.contiguous(memory_format=torch.channels_last)


def random_batch(batch: int, size: tuple[int, int], num_classes: int, device: str) -> tuple[list, list]:
    """Images of noise, and ground truth of eight random triangles each."""
    draw = np.random.default_rng(0)
    height, width = size
    images, targets = [], []
    for _ in range(batch):
        images.append(torch.from_numpy(draw.integers(0, 256, (3, height, width), dtype=np.uint8)).to(device))
        corners = draw.uniform(0, 1, (OBJECTS, 3, 2)) * (width, height)
        boxes = np.concatenate([corners.min(1), corners.max(1)], axis=1)
        targets.append(
            {
                "boxes": torch.from_numpy(boxes).float().to(device),
                "labels": torch.from_numpy(draw.integers(0, num_classes, OBJECTS)).to(device),
                "masks": PackedPolygons.pack([[polygon] for polygon in corners]),
            }
        )
    return images, targets


def gradients_of(features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Random gradients, the same for all models."""
    return _gradients(tuple((f.shape, f.dtype, f.device) for f in features))


@lru_cache(2)
def _gradients(kinds: tuple) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape, dtype, device in kinds]
