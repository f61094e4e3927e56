"""Which tokens the encoder sees (paper, section 2.1), and which the decoder fills in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..kernels import sample_packed_tokens, sample_tokens, valid_mask
from .noise import NoiseSource
from .sequences import Sequences

SAMPLING = ("random", "grid")


def check_ratio(ratio: float, name: str = "sample_ratio") -> float:
    """``ratio`` if it is in (0, 1]; otherwise ValueError."""
    if not 0.0 < ratio <= 1.0:
        raise ValueError(f"{name} must be in (0, 1], got {ratio}")
    return float(ratio)


def cell_sizes(image_sizes: Sequence[tuple[int, int]], stride: int) -> list[tuple[int, int]]:
    """(rows, columns) of the cells of ``stride`` pixels that hold at least one pixel of each image."""
    return [(-(-height // stride), -(-width // stride)) for height, width in image_sizes]


@dataclass(frozen=True)
class TokenSplit:
    """Which of a batch's tokens the encoder sees, and which the decoder fills in.

    In a padded batch, G is B and each image has L tokens, padding included. In a packed batch, G is 1, and tokens are
    numbered through the batch: L is then the number of all tokens with padding, V of those without.

    Attributes:
        ids_keep: (G, K) int64, tokens that the encoder sees; None if it sees all L in their order.
        ids_mask: (G, D) int64, the others; None if ``ids_keep`` is.
        ids_restore: (G, L), packed (1, V): place of each of the decoder's tokens in ``cat([ids_keep, ids_mask], 1)``;
            None if ``ids_keep`` is.
        encoder, decoder: sequences of the encoder's tokens and of the decoder's.
        valid_index: (V,) int64, the packed tokens among all with padding; None in a padded batch.
        sizes: (rows, columns) of each image's tokens without padding; None in a padded batch.
    """

    ids_keep: torch.Tensor | None
    ids_mask: torch.Tensor | None
    ids_restore: torch.Tensor | None
    encoder: Sequences
    decoder: Sequences
    valid_index: torch.Tensor | None = None
    sizes: list[tuple[int, int]] | None = None

    def to_map(self, tokens: torch.Tensor, batch: int, grid: tuple[int, int]) -> torch.Tensor:
        """The decoder's tokens (*decoder.shape, D) as a map (B, D, *grid) in channels_last memory; padding of packed
        images is zero."""
        if self.valid_index is not None:
            empty = tokens.new_zeros((batch * grid[0] * grid[1], tokens.shape[-1]))
            tokens = empty.index_copy(0, self.valid_index, tokens.flatten(0, 1))
        return tokens.reshape(batch, *grid, -1).permute(0, 3, 1, 2)


def split_padded(
    sizes: Sequence[tuple[int, int]], grid: tuple[int, int], ratio: float, noise: torch.Tensor | None, device
) -> TokenSplit:
    """The original's split of a padded batch: int(L * ratio) tokens of each image, at least one, padding last.

    Args:
        sizes: (rows, columns) of each image's tokens without padding.
        grid: (rows, columns) of the padded tokens, L = rows * columns.
        ratio: keep ratio in (0, 1].
        noise: (B, L) uniform numbers; not used if ratio is 1.
        device: of the result.
    """
    batch, length = len(sizes), grid[0] * grid[1]
    every = Sequences.equal(batch, length, device)
    if ratio == 1.0:
        return TokenSplit(None, None, None, every, every)
    sample = sample_tokens(noise, valid_mask(sizes, grid, device).flatten(1), ratio)
    return TokenSplit(*sample, Sequences.equal(*sample.ids_keep.shape, device), every)


def split_packed(
    sizes: Sequence[tuple[int, int]], grid: tuple[int, int], ratio: float, noise: torch.Tensor | None, device
) -> TokenSplit:
    """int(n * ratio) of the n tokens of each image, at least one, without padding. Arguments: ``split_padded``."""
    none = torch.zeros((len(sizes), grid[0] * grid[1]), device=device)
    whole = sample_packed_tokens(none, sizes, grid, 1.0)
    every = Sequences.packed(whole.cu_keep, len(whole.ids_keep), whole.max_keep)
    if ratio == 1.0:
        sample, encoder = whole, every
    else:
        sample = sample_packed_tokens(noise, sizes, grid, ratio)
        encoder = Sequences.packed(sample.cu_keep, len(sample.ids_keep), sample.max_keep)
    restore = sample.ids_restore.flatten()[whole.ids_keep]
    parts = (part[None] for part in (sample.ids_keep, sample.ids_mask, restore))
    return TokenSplit(*parts, encoder, every, whole.ids_keep, list(sizes))


def sampling_noise(
    sampling: str, batch: int, grid: tuple[int, int], ratio: float, noise: NoiseSource, device
) -> torch.Tensor | None:
    """(B, L) numbers; tokens with the smallest are chosen. None at ratio 1, where all are.

    "random" draws them from ``noise``. "grid" is a checkerboard: tokens with an even sum of row
    and column come first (paper, Table 3).

    Raises:
        ValueError: "grid" with fixed noise, or with a ratio that is neither 0.5 nor 1.
    """
    rows, columns = grid
    if ratio == 1.0:
        return None
    if sampling == "random":
        return noise.draw((batch, rows * columns), device)
    if noise.fixed:
        raise ValueError("sampling='grid' chooses by position: tokens cannot have fixed noise")
    if ratio != 0.5:
        raise ValueError(f"sampling='grid' keeps half of the tokens: sample_ratio must be 0.5 or 1, got {ratio}")
    row, column = (torch.arange(n, device=device) for n in grid)
    return ((row[:, None] + column) % 2).float().flatten().expand(batch, -1)
