"""Choice of the tokens that the encoder sees."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from .. import checks
from ..dispatch import resolve
from . import ops, reference


class TokenSample(NamedTuple):
    """A split of each image's L tokens into kept and masked ones, both in raster order.

    Attributes:
        ids_keep: (B, K) int64, tokens the encoder sees.
        ids_mask: (B, L - K) int64, the others.
        ids_restore: (B, L) int64, the row of token i in ``cat([ids_keep, ids_mask], 1)``.
    """

    ids_keep: torch.Tensor
    ids_mask: torch.Tensor
    ids_restore: torch.Tensor


class PackedTokenSample(NamedTuple):
    """A split of the images' own tokens, one image's after the other's, each in raster order; no padding.

    Tokens are rows of the (B * L, C) matrix of all the batch's tokens.

    Attributes:
        ids_keep: (T,) int64, tokens the encoder sees.
        ids_mask: (D,) int64, the other valid ones.
        ids_restore: (B, L) int64, the row of each token in ``cat([ids_keep, ids_mask])``; -1 for padding.
        cu_keep: (B + 1,) int32, where each image's kept tokens begin, and T: attention's ``cu_seqlens``.
        max_keep: most kept tokens of an image.
    """

    ids_keep: torch.Tensor
    ids_mask: torch.Tensor
    ids_restore: torch.Tensor
    cu_keep: torch.Tensor
    max_keep: int


def sample_tokens(noise: torch.Tensor, valid: torch.Tensor, ratio: float, *, impl: str | None = None) -> TokenSample:
    """Keep the int(L * ratio) tokens of smallest noise, at least one; padding comes last.

    The count is that of the padded grid, so a image with fewer valid tokens than that contributes padding. Equal
    noise, and padding among itself, is taken in raster order; NaN comes after padding. Every implementation returns
    the same integers, without a sort and without waiting for the GPU. Source: Fang et al., "Unleashing Vanilla Vision
    Transformer with Masked Image Modeling for Object Detection", 2022, section 2.1.

    Args:
        noise: (B, L) uniform numbers, any float dtype; any strides.
        valid: (B, L) bool, False for padding; ``valid_tokens`` makes it.
        ratio: keep ratio in (0, 1].
        impl: see ``mimdet.kernels.dispatch``.

    Raises:
        TypeError: noise is not of a float dtype, or valid not bool.
        ValueError: ratio outside (0, 1], shapes or devices that do not fit together.
        KernelUnavailableError: ``impl`` names what cannot run.
    """
    _check_noise(noise, ratio)
    if not isinstance(valid, torch.Tensor):
        raise TypeError(f"sample_tokens: valid must be a tensor, got {type(valid).__name__}")
    if valid.dtype != torch.bool:
        raise TypeError(f"sample_tokens: valid must be bool, got {valid.dtype}")
    if valid.shape != noise.shape:
        shapes = f"{tuple(noise.shape)} and {tuple(valid.shape)}"
        raise ValueError(f"sample_tokens: noise and valid must both be (B, L), got {shapes}")
    if valid.device != noise.device:
        raise ValueError(f"sample_tokens: valid is on {valid.device}, noise on {noise.device}")
    length = noise.shape[1]
    count = min(_count(length, ratio), length)
    impl = resolve(ops.NAME, impl, noise.device, (noise.dtype,))
    noise = noise.detach()
    if impl == "eager":
        return TokenSample(*reference.sample_tokens(noise, valid, count))
    return TokenSample(*ops.run(noise.float(), valid, None, count, length - count, impl))


def sample_packed_tokens(
    noise: torch.Tensor,
    sizes: Sequence[tuple[int, int]],
    grid: tuple[int, int],
    ratio: float,
    *,
    impl: str | None = None,
) -> PackedTokenSample:
    """Keep, of each image's n own tokens, the int(n * ratio) of smallest noise, at least one.

    A image keeps what it would keep alone, whatever it is batched with. Equal noise is taken in raster order, NaN
    last. All lengths follow from ``sizes``: nothing waits for the GPU. Without padding the choice is that of
    ``sample_tokens``.

    Args:
        noise: (B, L) uniform numbers, any float dtype; any strides. L is rows times columns of ``grid``.
        sizes: (rows, columns) of tokens of each image, from the top left corner of its grid.
        grid: (rows, columns) of tokens of the padded images.
        ratio: keep ratio in (0, 1].
        impl: see ``mimdet.kernels.dispatch``.

    Raises:
        TypeError: noise is not of a float dtype.
        ValueError: ratio outside (0, 1], sizes that are not B or not within the grid, noise of another shape.
        KernelUnavailableError: ``impl`` names what cannot run.
    """
    _check_noise(noise, ratio)
    _check_sizes(sizes, grid)
    if noise.shape != (len(sizes), grid[0] * grid[1]):
        wanted = len(sizes), grid[0] * grid[1]
        raise ValueError(f"sample_packed_tokens: noise must be {wanted} for the sizes, got {tuple(noise.shape)}")
    keep = [_count(rows * columns, ratio) for rows, columns in sizes]
    mask = [rows * columns - count for (rows, columns), count in zip(sizes, keep, strict=True)]
    # One transfer takes all the numbers to the device.
    starts = [list(accumulate(counts, initial=0)) for counts in (keep, mask)]
    sides = [[*side, 0] for side in zip(*sizes, strict=True)] or [[0], [0]]
    numbers = to_device([*starts, *sides], noise.device)
    offsets, valid = numbers[:2], _inside(numbers[2:, :-1], grid)
    impl = resolve(ops.NAME, impl, noise.device, (noise.dtype,))
    totals = sum(keep), sum(mask)
    noise = noise.detach()
    if impl == "eager":
        split = reference.sample_packed_tokens(noise, valid, offsets, *totals)
    else:
        split = ops.run(noise.float(), valid, offsets, *totals, impl)
    return PackedTokenSample(*split, offsets[0], max([0, *keep]))


def valid_tokens(sizes: Sequence[tuple[int, int]], grid: tuple[int, int], device: torch.device | str) -> torch.Tensor:
    """(B, rows * columns of ``grid``) bool: True inside each image's (rows, columns); does not wait for the GPU.

    Raises:
        ValueError: sizes that are not within the grid.
    """
    _check_sizes(sizes, grid)
    sides = [list(side) for side in zip(*sizes, strict=True)] or [[], []]
    return _inside(to_device(sides, torch.device(device)), grid)


def to_device(numbers: Sequence, device: torch.device, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """Nested lists, or an array, as a tensor, without waiting for the GPU."""
    pinned = device.type == "cuda"  # else the copy would wait for all that the GPU has to do
    return torch.tensor(numbers, dtype=dtype, device="cpu", pin_memory=pinned).to(device, non_blocking=pinned)


def _inside(sides: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    rows, columns = (torch.arange(n, device=sides.device) < side[:, None] for n, side in zip(grid, sides, strict=True))
    return (rows[:, :, None] & columns[:, None, :]).flatten(1)


def _count(length: int, ratio: float) -> int:
    return max(1, int(length * ratio))


def _check_noise(noise: torch.Tensor, ratio: float) -> None:
    checks.tensors(ops.NAME, noise=noise)
    if noise.dim() != 2:
        raise ValueError(f"sample_tokens: noise must be (B, L), got {tuple(noise.shape)}")
    if not 0.0 < ratio <= 1.0:
        raise ValueError(f"sample_tokens: ratio must be in (0, 1], got {ratio}")


def _check_sizes(sizes: Sequence[tuple[int, int]], grid: tuple[int, int]) -> None:
    for b, (rows, columns) in enumerate(sizes):
        if not (1 <= rows <= grid[0] and 1 <= columns <= grid[1]):
            raise ValueError(f"sample_tokens: sizes[{b}] is {(rows, columns)}, not within 1 .. {tuple(grid)}")
