"""``mimdet bench detectron2``: the backbone in Detectron2's pyramid, beside the original MIMDet's own code there.

Its rows are those of ``backbone``, with the part "detectron2".
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .. import session, views, workload
from ..equality import model_mismatch
from ..row import Results
from ..session import Candidate
from ..workload import Setting, check_choices
from .backbone import columns, title

_ORIGINAL_CONFIG = "configs/mimdet/mimdet_vit_base_mask_rcnn_fpn_sr_0p5_800_1333_4xdec_coco_3x.py"
# Name -> (whether it is the original's code, checkpointing). Today's timm gives the original fused attention.
IMPLEMENTATIONS = {
    "ours": (False, True),
    "original-sdpa": (True, True),
    "ours-no-checkpoint": (False, False),
    "original-sdpa-no-checkpoint": (True, False),
}


@dataclass(frozen=True, kw_only=True)
class Options(Setting):
    """What to measure.

    Attributes:
        original: checkout of the original MIMDet, which runs on today's libraries.
        ratio: keep ratio.
        implementations: each one of ``IMPLEMENTATIONS``.
    """

    original: Path
    part: str = "detectron2"
    config: str = "configs/detectron2/mimdet_b_mask_rcnn.py"
    ratio: float = 0.5
    implementations: Sequence[str] = tuple(IMPLEMENTATIONS)


def run(options: Options) -> Results:
    """Time a training step of backbone and pyramid: forward, and backward from every level.

    All models have one set of weights; none is timed before its features and gradients are the original's.

    Raises:
        ImportError: Detectron2 is missing.
        FileNotFoundError: ``options.original`` is not a checkout of the original.
        ValueError: an unknown implementation, or outputs that are not the original's.
    """
    check_choices(options.implementations, IMPLEMENTATIONS)
    original, ours = _build(options)
    difference = model_mismatch(_outputs(ours, options), _outputs(original, options), options.dtype)
    if difference:
        raise ValueError(f"ours differs from the original, so nothing was timed: {difference}")
    results = session.begin(options.device, [options.dtype])
    candidates = []
    for name in options.implementations:
        is_original, checkpointing = IMPLEMENTATIONS[name]
        model = original if is_original else ours
        keys = {
            **options.keys("backbone", "train"),
            "ratio": options.ratio,
            "depth": len(model.bottom_up.decoder.decoder_blocks),
            "implementation": name,
        }
        candidates.append(Candidate(keys, _step(model, checkpointing, options), values=workload.sizes_of(model)))
    rows = session.interleave(results, candidates, options.rounds, options.output)
    views.console().print(views.terminal(title(rows), columns(rows), rows))
    return results


def _build(options: Options) -> tuple[nn.Module, nn.Module]:
    from ...detectron2.config import load_config

    file = options.original / _ORIGINAL_CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{options.original} is not a checkout of the original MIMDet: it has no {file.name}")
    from detectron2.config import LazyConfig, instantiate

    sys.path.append(str(options.original))
    theirs = LazyConfig.apply_overrides(LazyConfig.load(str(file)), list(options.overrides))
    torch.manual_seed(0)
    original, ours = (
        instantiate(cfg.model).backbone.to(options.device).train()
        for cfg in (theirs, load_config(options.config, options.overrides))
    )
    ours.load_state_dict(original.state_dict())
    for model in (original, ours):
        model.bottom_up.sample_ratio = options.ratio
    return original, ours


def _images(model: nn.Module, options: Options):
    from detectron2.structures import ImageList

    images = workload.random_images(options)  # channels_last memory, as our R-CNN gives it; the original's is plain
    images = images.contiguous() if type(model.bottom_up).__module__.startswith("models") else images
    return ImageList(images, [options.size] * options.batch)


def _step(model: nn.Module, checkpointing: bool, options: Options) -> Callable[[], None]:
    images = _images(model, options)
    # The original checkpoints a stage only if its input wants a gradient, as all but the first do.
    parts = [part for part in model.modules() if hasattr(part, "checkpointing")]

    def step() -> None:
        for part in parts:
            part.checkpointing = checkpointing
        with options.autocast():
            features = list(model(images).values())
        torch.autograd.backward(features, workload.gradients_of(features))
        workload.forget_gradients(model)

    return step


def _outputs(model: nn.Module, options: Options) -> Mapping[str, torch.Tensor]:
    torch.manual_seed(4)  # of the tokens and the drop path
    with options.autocast():
        features = model.bottom_up(_images(model, options))
    tensors = {name: feature.detach().float() for name, feature in features.items()}
    smooth = workload.smooth_features(features)
    torch.autograd.backward(smooth, workload.gradients_of(smooth))
    named = sorted((n, p) for n, p in model.bottom_up.named_parameters() if p.requires_grad)
    tensors["the gradient"] = torch.cat([p.grad.flatten() for _, p in named])
    workload.forget_gradients(model)
    return tensors
