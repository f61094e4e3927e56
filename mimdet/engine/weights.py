"""Load the weights of a detector from a checkpoint; errors name the likely cause of a mismatch."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import nn

from ..checkpoint.finite import check_finite
from ..checkpoint.read import CheckpointError, read_checkpoint, state_dict_of, strip_prefixes

logger = logging.getLogger(__name__)

_SHOWN = 5
_CLASS_KEYS = {"roi_heads.mask_head.predictor.weight": 0, "roi_heads.box_predictor.cls_score.weight": 1}
_CLASS_LAYERS = {"roi_heads.": "roi_heads.box_predictor.*,roi_heads.mask_head.predictor.*", "head.": "head.cls_score.*"}
_DETECTORS = {
    "roi_heads.box_predictor.cls_score.weight": "Mask R-CNN",
    "roi_heads.box_predictor.0.cls_score.weight": "Cascade Mask R-CNN",
    "head.cls_score.weight": "RetinaNet",
}


@dataclass
class _Mismatch:
    missing: list[str]
    unexpected: list[str]
    shapes: list[str]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes)


def load_model_weights(model: nn.Module, path: str | Path, ignore: Sequence[str] = ()) -> None:
    """Load every weight of ``model`` from a checkpoint.

    Args:
        model: the bare detector.
        path: a file with ``{"model": state_dict, ...}`` or a bare state dict; a leading ``module.`` of the
            keys is dropped.
        ignore: patterns (``fnmatch``) of keys that are not loaded, whether the file has them or not.

    Raises:
        CheckpointError: the file cannot be read, its keys or shapes are not the model's (the message lists the
            first few of each kind and the likely cause), or it has NaN or infinite values.
        ValueError: a pattern matches no key.
    """
    state = strip_prefixes(state_dict_of(read_checkpoint(path), path), ("module.",))
    load_state(model, state, path, ignore)


def load_state(
    model: nn.Module, state: Mapping[str, torch.Tensor], source: str | Path, ignore: Sequence[str] = ()
) -> None:
    """As :func:`load_model_weights`, from a state dict; ``source`` names it in messages."""
    model_state = model.state_dict()
    for pattern in ignore:
        if not any(fnmatchcase(key, pattern) for key in (*model_state, *state)):
            raise ValueError(f"train.init_checkpoint_ignore: {pattern!r} matches no key of the model or of {source}")

    def ignored(key: str) -> bool:
        return any(fnmatchcase(key, pattern) for pattern in ignore)

    expected = {key: value for key, value in model_state.items() if not ignored(key)}
    loaded = {key: value for key, value in state.items() if not ignored(key)}
    mismatch = _compare(expected, loaded)
    if mismatch:
        raise CheckpointError(_explain(mismatch, expected, loaded, source))
    check_finite(loaded, source)
    model.load_state_dict(loaded, strict=False)
    num_ignored = len(model_state) - len(expected)
    logger.info(
        "loaded %d tensors from %s%s", len(loaded), source, f", {num_ignored} ignored as told" if num_ignored else ""
    )


def _compare(expected: Mapping[str, torch.Tensor], loaded: Mapping[str, torch.Tensor]) -> _Mismatch:
    return _Mismatch(
        missing=[key for key in expected if key not in loaded],
        unexpected=[key for key in loaded if key not in expected],
        shapes=[
            f"{key}: checkpoint {tuple(loaded[key].shape)}, model {tuple(value.shape)}"
            for key, value in expected.items()
            if key in loaded and loaded[key].shape != value.shape
        ],
    )


def _explain(
    mismatch: _Mismatch,
    expected: Mapping[str, torch.Tensor],
    loaded: Mapping[str, torch.Tensor],
    source: str | Path,
) -> str:
    lines = [f"checkpoint {source} does not fit the model:"]
    kinds = {
        "missing in the checkpoint": mismatch.missing,
        "unexpected in the checkpoint": mismatch.unexpected,
        "of another shape": mismatch.shapes,
    }
    for kind, keys in kinds.items():
        if keys:
            more = f", ... and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
            separator = "; " if keys is mismatch.shapes else ", "
            lines.append(f"  {len(keys)} {kind}: {separator.join(keys[:_SHOWN])}{more}")
    lines += [f"Likely cause: {cause}." for cause in _likely_causes(mismatch, expected, loaded)]
    return "\n".join(lines)


def _likely_causes(
    mismatch: _Mismatch, expected: Mapping[str, torch.Tensor], loaded: Mapping[str, torch.Tensor]
) -> list[str]:
    if any(key.startswith("blocks.") for key in loaded) and any(key.startswith("backbone.") for key in expected):
        return ["the checkpoint is a pre-trained MAE, not a detector: pass it as mae_checkpoint.path"]
    ours, theirs = _detector(expected), _detector(loaded)
    if None not in (ours, theirs) and ours != theirs:
        return [f"the checkpoint is of a {theirs}, the model is a {ours}: another config"]
    causes = []
    for part in ("encoder", "decoder"):
        ours, theirs = _width_and_depth(expected, part), _width_and_depth(loaded, part)
        for name, our, their in zip((f"{part} width", f"{part} depth"), ours, theirs, strict=True):
            if None not in (our, their) and our != their:
                causes.append(f"the checkpoint's {name} is {their}, the model's {our}: another model size")
    ours, theirs = _num_classes(expected), _num_classes(loaded)
    if None not in (ours, theirs) and ours != theirs:
        causes.append(
            f"the checkpoint has {theirs} classes, the model {ours}: to train a detector for other classes, "
            f"pass train.init_checkpoint_ignore=[{_class_layers(expected)}]"
        )
    if not causes and len(mismatch.missing) == len(expected):
        causes.append("the checkpoint is of another architecture or project: no key is the same")
    return causes


def _width_and_depth(state: Mapping[str, torch.Tensor], part: str) -> tuple[int | None, int | None]:
    """Embedding width and number of blocks of a state dict's ``encoder`` or ``decoder``, None if it has none."""
    prefix = "decoder_" if part == "decoder" else ""
    block = re.compile(rf"backbone\.bottom_up\.{part}\.{prefix}blocks\.(\d+)\.norm1\.weight")
    widths = {int(match[1]): state[key].shape[0] for key in state if (match := block.fullmatch(key))}
    return (widths[min(widths)], len(widths)) if widths else (None, None)


def _detector(state: Mapping[str, torch.Tensor]) -> str | None:
    return next((name for key, name in _DETECTORS.items() if key in state), None)


def _class_layers(state: Mapping[str, torch.Tensor]) -> str:
    return next(p for prefix, p in _CLASS_LAYERS.items() if any(key.startswith(prefix) for key in state))


def _num_classes(state: Mapping[str, torch.Tensor]) -> int | None:
    for key, background in _CLASS_KEYS.items():
        if key in state:
            return state[key].shape[0] - background
    if {"head.cls_score.weight", "head.bbox_pred.weight"} <= state.keys():
        # A score for each class and anchor, and four deltas for each anchor.
        return 4 * state["head.cls_score.weight"].shape[0] // state["head.bbox_pred.weight"].shape[0]
    return None
