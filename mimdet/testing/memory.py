"""Memory that shows what a kernel did not write."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def poison(tensor: torch.Tensor) -> float | int | bool:
    """NaN for a float tensor, else the largest value."""
    if tensor.is_floating_point():
        return float("nan")
    return True if tensor.dtype is torch.bool else torch.iinfo(tensor.dtype).max


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Inside, torch.empty, empty_like, empty_strided and new_empty return NaN (integers: their largest value)."""

    def fill(tensor):
        if tensor.device.type != "meta" and not isinstance(tensor, torch._subclasses.FakeTensor):
            tensor.detach().fill_(poison(tensor))
        return tensor

    def wrapped(function):
        return lambda *args, **kwargs: fill(function(*args, **kwargs))

    places = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")]
    originals = [getattr(owner, name) for owner, name in places]
    try:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, wrapped(original))
        yield
    finally:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)
