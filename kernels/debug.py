"""Checks of values. They wait for the GPU, so they run there only with MIMDET_DEBUG_KERNELS=1."""

from __future__ import annotations

import itertools
import os

import torch

ENVIRONMENT = "MIMDET_DEBUG_KERNELS"


def enabled() -> bool:
    """Whether the environment asks for checks; never inside torch.compile, which has no values."""
    return not torch.compiler.is_compiling() and os.environ.get(ENVIRONMENT) == "1"


def check_unique_index(index: torch.Tensor, length: int, name: str, padding: int = 0) -> None:
    """``index`` (B, K) must hold numbers of 0 .. length - 1, none twice in one row.

    With ``padding``, K is length + padding: every number must occur, and -1 elsewhere.

    Raises:
        IndexError: a number outside of the range.
        ValueError: a number twice, or -1 too often.
    """
    outside = (index < (-1 if padding else 0)) | (index >= length)
    if outside.any():
        b, k = outside.nonzero()[0].tolist()
        raise IndexError(f"{name}[{b}, {k}] is {index[b, k].item()}, outside of 0 .. {length - 1}")
    # Sorted, padding - 1 of the -1 drop out: a second one left over means too many.
    ordered = index.sort(dim=1).values[:, max(0, padding - 1) :]
    duplicate = ordered[:, 1:] == ordered[:, :-1]
    if duplicate.any():
        b, k = duplicate.nonzero()[0].tolist()
        value = ordered[b, k].item()
        raise ValueError(f"{name}[{b}] holds {value} more than {'once' if value >= 0 else f'{padding} times'}")


def check_index(index: torch.Tensor, length: int, name: str) -> None:
    """``index`` (K,) must hold numbers of 0 .. length - 1.

    Raises:
        IndexError: a number outside of the range.
    """
    outside = (index < 0) | (index >= length)
    if outside.any():
        k = int(outside.nonzero()[0])
        raise IndexError(f"{name}[{k}] is {index[k].item()}, outside of 0 .. {length - 1}")


def check_starts(starts: torch.Tensor, total: int, name: str) -> None:
    """``starts`` (K + 1,) must not descend, and be within 0 .. total.

    Raises:
        IndexError: a number outside of the range.
        ValueError: a number smaller than the one before it.
    """
    check_index(starts, total + 1, name)
    descends = starts.diff() < 0
    if descends.any():
        k = int(descends.nonzero()[0]) + 1
        raise ValueError(f"{name} must not descend, got {starts[k].item()} after {starts[k - 1].item()} at {k}")


def check_sizes(sizes: torch.Tensor, limits: tuple[int, int], name: str, least: int = 1) -> None:
    """``sizes`` (B, 2) must hold numbers of least .. limits[0] and least .. limits[1].

    Raises:
        ValueError: a number outside of its range.
    """
    outside = (sizes < least) | (sizes > torch.tensor(limits, device=sizes.device))
    if outside.any():
        b, k = outside.nonzero()[0].tolist()
        raise ValueError(f"{name}[{b}, {k}] is {sizes[b, k].item()}, outside of {least} .. {limits[k]}")


def check_cu_seqlens(cu_seqlens: torch.Tensor, total: int, max_seqlen: int, name: str) -> list[int]:
    """``cu_seqlens`` (B + 1,) must rise from 0 to ``total``, by ``max_seqlen`` at most. Returns its numbers.

    Raises:
        ValueError: it does not.
    """
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise ValueError(f"{name}: cu_seqlens must start at 0, got {bounds[0]}")
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end < start:
            raise ValueError(f"{name}: cu_seqlens must not descend, got {end} after {start} at {i + 1}")
        if end - start > max_seqlen:
            raise ValueError(f"{name}: sequence {i} has {end - start} tokens, max_seqlen is {max_seqlen}")
    if bounds[-1] != total:
        raise ValueError(f"{name}: cu_seqlens must end at T = {total}, got {bounds[-1]}")
    return bounds
