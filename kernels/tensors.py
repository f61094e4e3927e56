"""Small tensors from numbers of the host, and the mask of the valid area of padded maps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch._subclasses import FakeTensor

_ALIGNMENT = 64  # bytes


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a shape and no numbers (``torch._subclasses.FakeTensor``); not while torch.compile traces,
    which records what is done with such tensors."""
    return isinstance(tensor, FakeTensor) and not torch.compiler.is_compiling()


def to_device(numbers: Sequence, device: torch.device, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """Nested lists, or an array, as a tensor, without waiting for the GPU."""
    return to_device_together([torch.tensor(numbers, dtype=dtype, device="cpu")], device)[0]


def to_device_together(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Tensors on the device: those of the CPU in one copy to a GPU, from pinned memory.

    A copy from pageable memory would wait for all work that the GPU has queued.
    """
    ours = [t for t in tensors if t.device.type == "cpu"]
    if device.type != "cuda" or not ours:
        return [t.to(device, non_blocking=True) for t in tensors]
    ends = list(accumulate(-(-t.numel() * t.element_size() // _ALIGNMENT) * _ALIGNMENT for t in ours))
    pinned = torch.empty(ends[-1], dtype=torch.uint8, device="cpu", pin_memory=True)
    starts = [0, *ends[:-1]]
    for t, start in zip(ours, starts, strict=True):
        _view(pinned, start, t).copy_(t)
    blob = pinned.to(device, non_blocking=True)
    moved = iter([_view(blob, start, t) for t, start in zip(ours, starts, strict=True)])
    return [next(moved) if t.device.type == "cpu" else t.to(device, non_blocking=True) for t in tensors]


def to_host_together(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors of one device on the CPU, by one copy from a GPU, which waits for it."""
    if all(t.device.type == "cpu" for t in tensors):
        return list(tensors)
    # Larger elements come first: a view of another dtype must begin at a multiple of its size.
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())
    parts = [tensors[i].contiguous().view(-1).view(torch.uint8) for i in order]
    blob, start, moved = torch.cat(parts).cpu(), 0, {}
    for i, part in zip(order, parts, strict=True):
        moved[i] = _view(blob, start, tensors[i])
        start += part.numel()
    return [moved[i] for i in range(len(tensors))]


class HostCopy:
    """A tensor's numbers on their way to the host, while the device goes on."""

    def __init__(self, tensor: torch.Tensor):
        self._tensor, self._event = tensor, None
        if tensor.is_cuda:
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def tolist(self) -> Any:
        """``Tensor.tolist``, once the device has come to the tensor; work that it got since is not waited for."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensor.tolist()


def _view(blob: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    return blob[start : start + like.numel() * like.element_size()].view(like.dtype).view(like.shape)


def valid_mask(
    sizes: torch.Tensor | Sequence[tuple[int, int]], grid: tuple[int, int], device: torch.device | str = "cpu"
) -> torch.Tensor:
    """(B, *grid) bool: True in the top left (rows, columns) of each map; does not wait for the GPU.

    Args:
        sizes: (rows, columns) of each map, or a (B, 2) tensor of them.
        grid: (rows, columns) of the padded maps.
        device: of the mask; that of ``sizes`` if it is a tensor.

    Raises:
        ValueError: listed sizes that are not within the grid.
    """
    if not isinstance(sizes, torch.Tensor):
        check_sizes("valid_mask", sizes, grid)
        sizes = to_device(list(sizes), torch.device(device)).view(-1, 2)
    rows, columns = (
        torch.arange(length, device=sides.device) < sides[:, None]
        for length, sides in zip(grid, sizes.unbind(1), strict=True)
    )
    return rows[:, :, None] & columns[:, None, :]


def zero_padding(x: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Maps (B, C, H, W), zero outside of the top left (rows, columns) of each; sizes: (B, 2)."""
    return x.masked_fill(~valid_mask(sizes, x.shape[2:])[:, None], 0)


def check_sizes(op: str, sizes: Sequence[tuple[int, int]], grid: tuple[int, int]) -> None:
    """Raise ValueError unless every (rows, columns) is within ``grid``."""
    for b, (rows, columns) in enumerate(sizes):
        if not (1 <= rows <= grid[0] and 1 <= columns <= grid[1]):
            raise ValueError(f"{op}: sizes[{b}] is {(rows, columns)}, not within 1 .. {tuple(grid)}")
