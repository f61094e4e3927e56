"""``mimdet bench detectron2``: the backbone in Detectron2's pyramid, beside the original MIMDet's own code there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from . import environment, report
from .backbone import COMPARED, TOLERANCE, distance
from .cases import DTYPES
from .limits import measure_limits
from .measure import Timings, measure, wall_timer
from .results import Results
from .workload import Setting, check_words, gradients, pictures

CONFIG = "configs/detectron2/mimdet_b_mask_rcnn.py"
_ORIGINAL_CONFIG = "configs/mimdet/mimdet_vit_base_mask_rcnn_fpn_sr_0p5_800_1333_4xdec_coco_3x.py"
# Name -> (whether it is the original's code, checkpointing). Today's timm gives the original fused attention.
PEERS = {
    "ours": (False, True),
    "original-sdpa": (True, True),
    "ours-kept": (False, False),
    "original-sdpa-kept": (True, False),
}


@dataclass(frozen=True, kw_only=True)
class Options(Setting):
    """What to measure.

    Attributes:
        original: checkout of the original MIMDet, which runs on today's libraries.
        ratio: keep ratio.
        peers: words of ``PEERS``.
        rounds: see ``measure``.
        output: file of results.
    """

    original: Path
    output: Path
    ratio: float = 0.5
    peers: Sequence[str] = tuple(PEERS)
    rounds: int = 15
    config: str = CONFIG


def run_detectron2(options: Options) -> Results:
    """Time a training step of backbone and pyramid: forward, and backward from every level.

    All models have one set of weights; none is timed before its features and gradients are the original's.

    Raises:
        ImportError: Detectron2 is missing.
        FileNotFoundError: ``options.original`` is not a checkout of the original.
        ValueError: a word that is not known, or outputs that are not the original's.
    """
    check_words(options.peers, PEERS)
    original, ours = _build(options)
    _check_equal(original, ours, options)
    models = {name: original if PEERS[name][0] else ours for name in options.peers}
    runs = {name: _step(model, PEERS[name][1], options) for name, model in models.items()}
    limits = measure_limits(options.device, [DTYPES[options.dtype]])
    found = Results("backbone", environment.command(), environment.describe(options.device), limits)

    def keep(timings: Timings) -> None:
        found.rows = [_row(name, models[name], timings, options) for name in runs]
        found.write(options.output)

    keep(measure(runs, options.rounds, timer=wall_timer, warmup=1, least=0.0, on_round=keep))
    report.console().print(_table(found.rows))
    return found


def _build(options: Options) -> tuple[nn.Module, nn.Module]:
    from ..detectron2.config import load_config

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

    images = pictures(options)  # in channels_last memory, which our R-CNN hands over; the original's is plain
    images = images.contiguous() if type(model.bottom_up).__module__.startswith("models") else images
    return ImageList(images, [options.size] * options.batch)


def _step(model: nn.Module, checkpointing: bool, options: Options) -> Callable[[], None]:
    images, parameters = _images(model, options), list(model.parameters())
    # The original checkpoints a stage only if its input wants a gradient, as all but the first do.
    parts = [part for part in model.modules() if hasattr(part, "checkpointing")]

    def step() -> None:
        for part in parts:
            part.checkpointing = checkpointing
        with options.autocast():
            features = model(images)
        torch.autograd.backward(list(features.values()), gradients(features))
        for parameter in parameters:
            parameter.grad = None

    return step


def _check_equal(original: nn.Module, ours: nn.Module, options: Options) -> None:
    want, got = _outcome(original, options), _outcome(ours, options)
    for name, value in want.items():
        allowed, off = TOLERANCE[options.dtype]["gradient" in name], distance(got[name], value)
        if not off <= allowed:
            raise ValueError(f"{name} is {off:.2g} off the original's, allowed {allowed:.2g}: nothing was timed")


def _outcome(model: nn.Module, options: Options) -> Mapping[str, torch.Tensor]:
    torch.manual_seed(4)  # of the tokens and the drop path
    with options.autocast():
        features = model.bottom_up(_images(model, options))
    found = {name: feature.detach().float() for name, feature in features.items()}
    # Not through c5: its pooling hands a gradient to the larger of two cells that may differ by rounding alone.
    smooth = {name: features[name] for name in ("c2", "c3", "c4")}
    torch.autograd.backward(list(smooth.values()), gradients(smooth))
    named = sorted((n, p) for n, p in model.bottom_up.named_parameters() if p.requires_grad)
    found["the gradient"] = torch.cat([p.grad.flatten() for _, p in named])
    for parameter in model.parameters():
        parameter.grad = None
    return found


def _row(name: str, model: nn.Module, timings: Timings, options: Options) -> dict:
    row = {
        "part": "detectron2",
        "mode": "train",
        "size": "{}x{}".format(*options.size),
        "batch": options.batch,
        "dtype": options.dtype,
        "ratio": options.ratio,
        "depth": len(model.bottom_up.decoder.decoder_blocks),
        "model": name,
        "status": "ok",
        **report.timed_columns(timings, name),
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        **dict.fromkeys(("allocated_mib", "reserved_mib", "saved_mib")),
        **dict.fromkeys(COMPARED),
        **report.ratio_columns("vs_original", None),
        **report.ratio_columns("vs_clean", None),
    }
    other = "original-sdpa"
    compared = other in timings.samples and name != other
    return row | report.ratio_columns("vs_original_sdpa", timings.speedup(name, other) if compared else None)


def _table(rows: Sequence[dict]):
    first = rows[0]
    title = (
        f"backbone and pyramid in Detectron2, train, {first['size']}, batch {first['batch']}, {first['dtype']}, "
        f"ratio {first['ratio']:g}; A/A {report.ratio(first, 'control')}"
    )
    body = [(r["model"], report.number(r["p50_ms"], ".4g"), report.ratio(r, "vs_original_sdpa")) for r in rows]
    return report.table(title, ("model", "ms", "speed vs original-sdpa"), body)
