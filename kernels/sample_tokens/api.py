"""Choice of the tokens that the encoder sees."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from .. import checks, tensors
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
    """A split of the images' valid tokens, image after image, each in raster order; no padding.

    Numbers of tokens are rows of the (B * L, C) matrix of all the batch's tokens.

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


def sample_tokens(
    noise: torch.Tensor, valid_mask: torch.Tensor, ratio: float, *, impl: str | None = None
) -> TokenSample:
    """Keep the int(L * ratio) tokens of smallest noise, at least one; padding comes last.

    The count is that of the padded grid, so an image with fewer valid tokens contributes padding. Ties of noise, and
    of padding, are resolved in raster order; NaN comes after padding. Every implementation returns the same integers,
    without a sort and without waiting for the GPU. Source: Fang et al., "Unleashing Vanilla Vision Transformer with
    Masked Image Modeling for Object Detection", 2022, section 2.1.

    Args:
        noise: (B, L) uniform numbers, any float dtype; any strides.
        valid_mask: (B, L) bool, False for padding; ``mimdet.kernels.valid_mask`` makes it, flattened.
        ratio: keep ratio in (0, 1].
        impl: see ``mimdet.kernels.dispatch``.

    Raises:
        TypeError: noise is not of a float dtype, or valid_mask not bool.
        ValueError: ratio outside (0, 1], shapes or devices that do not fit together.
        KernelUnavailableError: ``impl`` names what cannot run.
    """
    _check_noise(noise, ratio)
    checks.booleans(ops.NAME, noise, "noise", valid_mask=valid_mask)
    if valid_mask.shape != noise.shape:
        shapes = f"{tuple(noise.shape)} and {tuple(valid_mask.shape)}"
        raise ValueError(f"sample_tokens: noise and valid_mask must both be (B, L), got {shapes}")
    length = noise.shape[1]
    count = min(_count(length, ratio), length)
    impl = resolve(ops.NAME, impl, noise.device, (noise.dtype,))
    noise = noise.detach()
    if impl == "eager":
        return TokenSample(*reference.sample_tokens(noise, valid_mask, count))
    return TokenSample(*ops.run(noise.float(), valid_mask, None, count, length - count, impl))


def sample_packed_tokens(
    noise: torch.Tensor,
    sizes: Sequence[tuple[int, int]],
    grid: tuple[int, int],
    ratio: float,
    *,
    impl: str | None = None,
) -> PackedTokenSample:
    """Of each image's n valid tokens, keep the int(n * ratio) of smallest noise, at least one.

    An image keeps the same tokens in every batch. Ties of noise are resolved in raster order, NaN comes last. All
    lengths follow from ``sizes``: nothing waits for the GPU. Without padding the choice is that of ``sample_tokens``.

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
    tensors.check_sizes("sample_packed_tokens", sizes, grid)
    shape = len(sizes), grid[0] * grid[1]
    if noise.shape != shape:
        raise ValueError(f"sample_packed_tokens: noise must be {shape} for the sizes, got {tuple(noise.shape)}")
    keep = [_count(rows * columns, ratio) for rows, columns in sizes]
    mask = [rows * columns - count for (rows, columns), count in zip(sizes, keep, strict=True)]
    # One copy to the GPU for all numbers: offsets (2, B + 1), then sizes (2, B), padded to B + 1.
    starts = [list(accumulate(counts, initial=0)) for counts in (keep, mask)]
    sides = [[*side, 0] for side in zip(*sizes, strict=True)] or [[0], [0]]
    numbers = tensors.to_device([*starts, *sides], noise.device)
    offsets, valid_mask = numbers[:2], tensors.valid_mask(numbers[2:, :-1].t(), grid).flatten(1)
    impl = resolve(ops.NAME, impl, noise.device, (noise.dtype,))
    totals = sum(keep), sum(mask)
    noise = noise.detach()
    if impl == "eager":
        split = reference.sample_packed_tokens(noise, valid_mask, offsets, *totals)
    else:
        split = ops.run(noise.float(), valid_mask, offsets, *totals, impl)
    return PackedTokenSample(*split, offsets[0], max([0, *keep]))


def _count(length: int, ratio: float) -> int:
    return max(1, int(length * ratio))


def _check_noise(noise: torch.Tensor, ratio: float) -> None:
    checks.tensors(ops.NAME, noise=noise)
    if noise.dim() != 2:
        raise ValueError(f"sample_tokens: noise must be (B, L), got {tuple(noise.shape)}")
    if not 0.0 < ratio <= 1.0:
        raise ValueError(f"sample_tokens: ratio must be in (0, 1], got {ratio}")
