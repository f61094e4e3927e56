"""Checks of arguments that several operations share."""

from __future__ import annotations

from functools import partial

import torch


def tensors(op: str, optional: tuple[str, ...] = (), **arguments: object) -> None:
    """Raise, naming the argument, unless all are float tensors on the first one's device, or None where allowed.

    Raises:
        TypeError: something else than a tensor, or one that is not of a float dtype.
        ValueError: a tensor on another device.
    """
    first = None
    for name, value in arguments.items():
        if value is None and name in optional:
            continue
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
        if not value.is_floating_point():
            raise TypeError(f"{op}: {name} must be of a float dtype, got {value.dtype}")
        if first is None:
            first, device = name, value.device
        elif value.device != device:
            raise ValueError(f"{op}: {name} is on {value.device}, {first} on {device}")


def _of_dtypes(dtypes, words, op: str, like: torch.Tensor, like_name: str, **arguments: object) -> None:
    """Raise, naming the argument, unless all are tensors of one of ``dtypes`` on the device of ``like``."""
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
        if value.dtype not in dtypes:
            raise TypeError(f"{op}: {name} must be {words}, got {value.dtype}")
        if value.device != like.device:
            raise ValueError(f"{op}: {name} is on {value.device}, {like_name} on {like.device}")


integers = partial(_of_dtypes, (torch.int32, torch.int64), "int32 or int64")
booleans = partial(_of_dtypes, (torch.bool,), "bool")


def shapes(op: str, main: str, expected: dict[str, tuple[torch.Tensor | None, tuple[int, ...]]]) -> None:
    """Raise ValueError, naming the argument, unless each tensor that is not None has its shape, that of ``main``."""
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{op}: {name} must be {tuple(shape)} for {main}, got {tuple(tensor.shape)}")
