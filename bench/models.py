"""Ours and the peers, for any keep ratio and decoder depth, all on one set of weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from ..config import load
from ..engine.model import build_model
from ..modeling import MIMDetBackbone
from .reference_model import CleanBackbone, ReferenceBackbone

_BOTTOM_UP = "backbone.bottom_up"
_OBJECTS = 8  # in a picture; COCO has 7.3

PEERS: dict[str, tuple[str, Callable[[MIMDetBackbone], nn.Module]]] = {
    "ours": ("this package, activations kept", lambda ours: ours),
    "ours-checkpointed": ("this package, checkpointing", lambda ours: checkpointed(ours)),
    "original": (
        "the original as released: unfused attention, checkpointing",
        lambda ours: ReferenceBackbone(ours, fused_attention=False, checkpointing=True),
    ),
    "original-kept": (
        "the same, activations kept",
        lambda ours: ReferenceBackbone(ours, fused_attention=False, checkpointing=False),
    ),
    "original-sdpa": (
        "the original on today's timm: fused attention, checkpointing",
        lambda ours: ReferenceBackbone(ours, fused_attention=True, checkpointing=True),
    ),
    "original-sdpa-kept": (
        "the same, activations kept",
        lambda ours: ReferenceBackbone(ours, fused_attention=True, checkpointing=False),
    ),
    "clean": ("fused attention, channels last, torch.compile, activations kept", CleanBackbone),
}


def build_detector(config: str, overrides: Sequence[str], depth: int | None, device: str) -> nn.Module:
    """A config's detector with random weights, without checkpointing and with ``depth`` decoder blocks; None leaves
    the decoder to the config."""
    cfg = load(config, overrides)
    cfg.model.backbone.bottom_up.encoder.checkpointing = False
    if depth is not None:
        cfg.model.backbone.bottom_up.decoder.depth = depth
    torch.manual_seed(0)
    return build_model(cfg, pretrained=False).to(device)


def variant(detector: nn.Module, peer: str, ratio: float, depth: int) -> nn.Module:
    """``detector`` with the peer's backbone, a keep ratio for every mode and the first ``depth`` decoder blocks.

    Nothing is copied but the modules' own dictionaries: all variants share their weights.
    """
    bottom_up = detector.get_submodule(_BOTTOM_UP)
    blocks = nn.ModuleList(list(bottom_up.decoder.decoder_blocks)[:depth])
    bottom_up = with_child(bottom_up, "decoder.decoder_blocks", blocks)
    bottom_up.sample_ratio = bottom_up.inference_sample_ratio = ratio
    return with_child(detector, _BOTTOM_UP, PEERS[peer][1](bottom_up))


def bottom_up(detector: nn.Module) -> nn.Module:
    """The backbone below the pyramid."""
    return detector.get_submodule(_BOTTOM_UP)


def with_child(module: nn.Module, path: str, child: nn.Module) -> nn.Module:
    """``module`` with another module at ``path``; what is not on the path is shared."""
    made = _shallow(module)
    head, _, rest = path.partition(".")
    made._modules[head] = with_child(module._modules[head], rest, child) if rest else child
    return made


def checkpointed(ours: MIMDetBackbone) -> MIMDetBackbone:
    """The same backbone with checkpointing as the configs have it."""
    for path in ("encoder", "encoder.patch_embed", "decoder"):
        part = _shallow(ours.get_submodule(path))
        part.checkpointing = True
        ours = with_child(ours, path, part)
    return ours


def random_batch(batch: int, size: tuple[int, int], num_classes: int, device: str) -> tuple[list, list]:
    """Pictures of noise, and ground truth of eight random triangles each."""
    draw = np.random.default_rng(0)
    height, width = size
    images, targets = [], []
    for _ in range(batch):
        images.append(torch.from_numpy(draw.integers(0, 256, (3, height, width), dtype=np.uint8)).to(device))
        corners = draw.uniform(0, 1, (_OBJECTS, 3, 2)) * (width, height)
        boxes = np.concatenate([corners.min(1), corners.max(1)], axis=1)
        targets.append(
            {
                "boxes": torch.from_numpy(boxes).float().to(device),
                "labels": torch.from_numpy(draw.integers(0, num_classes, _OBJECTS)).to(device),
                "masks": [[polygon.flatten()] for polygon in corners],
            }
        )
    return images, targets


def _shallow(module: nn.Module) -> nn.Module:
    made = copy.copy(module)
    made._modules = dict(module._modules)
    return made
