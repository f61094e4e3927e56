"""Load ImageNet weights of ConvNeXt into the stem."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import nn

from .finite import check_finite
from .read import CheckpointError, read_checkpoint, state_dict_of

logger = logging.getLogger(__name__)

_HOW = "torch.save(timm.create_model('convnext_large', pretrained=True).state_dict(), PATH) makes a file for ViT-Base"


def load_convnext(stem: nn.Module, path: str | Path) -> None:
    """Copy weights of a ConvNeXt, under timm's names, into a ``ConvNeXtStem``; those it does not have are dropped.

    Raises:
        CheckpointError: the file cannot be read, lacks a tensor, or has one of another shape or not finite.
    """
    state = state_dict_of(read_checkpoint(path), path)
    problems, values = [], {}
    for key, target in stem.state_dict().items():
        if key not in state:
            problems.append(f"{key} is not in the file")
        elif state[key].shape != target.shape:
            problems.append(f"{key} is {tuple(state[key].shape)} in the file, {tuple(target.shape)} in the model")
        else:
            values[key] = state[key]
    if problems:
        more = f"\n  ... and {len(problems) - 5} more" if len(problems) > 5 else ""
        shown = "".join(f"\n  {problem}" for problem in problems[:5])
        raise CheckpointError(f"ConvNeXt weights {path} do not fit the stem:{shown}{more}\n{_HOW}.")
    check_finite(values, path)
    stem.load_state_dict(values)
    logger.info("ConvNeXt -> stem: %d tensors loaded, %d dropped by design", len(values), len(state) - len(values))
