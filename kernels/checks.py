"""Checks of arguments that several operations share."""

from __future__ import annotations

import torch


def tensors(op: str, *, optional: tuple[str, ...] = (), **arguments: object) -> None:
    """Raise TypeError, naming the argument, unless each is a tensor, or None where that is allowed."""
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor) and not (value is None and name in optional):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
