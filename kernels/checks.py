"""Checks of arguments that several operations share."""

from __future__ import annotations

import torch


def tensors(op: str, **arguments: object) -> None:
    """Raise TypeError, naming the argument, unless each is a tensor."""
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
