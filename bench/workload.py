"""A model, its data and what is done with it in one step: what the tables and the roofline measure."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .cases import DTYPES
from .models import bottom_up, random_batch, variant

MODES = ("train", "inference")
PARTS = ("backbone", "detector")

# Keep ratio, decoder depth, word of ``models.PEERS``.
Key = tuple[float, int, str]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a step works on.

    Attributes:
        part: word of ``PARTS``.
        config, overrides: the detector.
        size, batch, dtype, device: of the pictures; dtype other than fp32 means autocast.
    """

    device: str
    part: str = "backbone"
    config: str = "mimdet_b_mask_rcnn"
    overrides: Sequence[str] = ()
    size: tuple[int, int] = (480, 640)
    batch: int = 1
    dtype: str = "fp32"

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context that the forward runs in."""
        kind = torch.device(self.device).type
        return torch.autocast(kind, DTYPES[self.dtype], enabled=self.dtype != "fp32")


@dataclass(frozen=True)
class Workload:
    """A model and what is done with it; ``forward`` stands alone for what it saves."""

    model: nn.Module
    step: Callable[[], object]
    forward: Callable[[], object]
    resident: int


def check_words(given: Iterable[str], known: Collection[str]) -> None:
    """Raise ValueError, naming the choice, unless all are known."""
    unknown = [word for word in given if word not in known]
    if unknown:
        raise ValueError(f"no {', '.join(unknown)} to measure; choose from {', '.join(known)}")


def idle_optimizer(detector: nn.Module) -> torch.optim.Optimizer:
    """AdamW that does the work of an update and leaves the weights as they are: its learning rate is zero."""
    return torch.optim.AdamW((p for p in detector.parameters() if p.requires_grad), lr=0.0)


def workload(detector: nn.Module, optimizer: torch.optim.Optimizer, mode: str, key: Key, setting: Setting) -> Workload:
    """One step of a peer at a keep ratio and depth; ``optimizer`` is used by a whole detector alone."""
    ratio, depth, peer = key
    return step_of(variant(detector, peer, ratio, depth), optimizer, mode, setting)


def step_of(detector: nn.Module, optimizer: torch.optim.Optimizer, mode: str, setting: Setting) -> Workload:
    """One step of a detector as it is, or of its backbone."""
    whole = setting.part == "detector"
    model = (detector if whole else bottom_up(detector)).train(mode == "train")
    parameters = list(model.parameters())
    resident = sum(p.nbytes for p in parameters)
    if whole:
        images, targets = random_batch(setting.batch, setting.size, model.num_classes, setting.device)
    else:
        images, targets = pictures(setting), None

    def forward() -> object:
        with setting.autocast():
            return model(images, targets) if whole and mode == "train" else model(images)

    def inference() -> object:
        with torch.inference_mode():
            return forward()

    def train() -> None:
        if whole:
            sum(forward().values()).backward()
            optimizer.step()
        else:
            features = forward()
            torch.autograd.backward(list(features.values()), gradients(features))
        for parameter in parameters:
            parameter.grad = None

    if whole and mode == "train":
        resident += sum(2 * p.nbytes for p in parameters if p.requires_grad)
    return Workload(model, train if mode == "train" else inference, forward, resident)


def pictures(setting: Setting) -> torch.Tensor:
    """(B, 3, H, W) noise in channels_last memory."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(setting.batch, 3, *setting.size, generator=generator).to(setting.device)
    return images.contiguous(memory_format=torch.channels_last)


_made: dict[tuple, list[torch.Tensor]] = {}


def gradients(features: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Random, the same for all models; made once."""
    key = tuple((f.shape, f.dtype, f.device) for f in features.values())
    if key not in _made:
        _made.clear()
        generator = torch.Generator().manual_seed(2)
        _made[key] = [torch.randn(f.shape, generator=generator).to(f) for f in features.values()]
    return _made[key]
