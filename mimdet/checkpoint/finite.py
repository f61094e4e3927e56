"""Refuse weights with NaN or infinite values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from .read import CheckpointError

_SHOWN = 5


def check_finite(state: Mapping[str, torch.Tensor], source: str | Path) -> None:
    """Check that all weights are finite.

    Args:
        state: tensors by name; integer tensors are not checked.
        source: file of the weights.

    Raises:
        CheckpointError: NaN or infinite values; the message names the first few tensors and the file.
    """
    bad = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        more = f", ... and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        tensors = "1 tensor holds" if len(bad) == 1 else f"{len(bad)} tensors hold"
        raise CheckpointError(
            f"checkpoint {source}: {tensors} NaN or infinite values: {', '.join(bad[:_SHOWN])}{more}. "
            "The training that wrote it diverged, or the file is damaged: take an earlier one, or download it again."
        )
