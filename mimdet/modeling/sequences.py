"""Tokens of a batch as sequences for attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sequences:
    """Which tokens attend to each other: those of one image, or of one window of it.

    Attributes:
        shape: tokens are a tensor (*shape, C): (B, N) if all images have N tokens, (T, 1) if they are packed. Drop path
            has a factor for each of the ``shape[0]`` rows.
        cu_seqlens: (S + 1,) int32, where each sequence's tokens begin, and T.
        max_seqlen: most tokens of a sequence.
        owner: (T,) int64, the image of each packed token; None for (B, N).
        num_images: B where an image has several sequences; None where S is B.
    """

    shape: tuple[int, int]
    cu_seqlens: torch.Tensor
    max_seqlen: int
    owner: torch.Tensor | None = None
    num_images: int | None = None

    @property
    def batch(self) -> int:
        """Number of images."""
        return self.cu_seqlens.shape[0] - 1 if self.num_images is None else self.num_images

    @classmethod
    def equal(cls, batch: int, length: int, device: torch.device) -> Sequences:
        """``length`` tokens of each image."""
        starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
        return cls((batch, length), starts, length)

    @classmethod
    def packed(cls, cu_seqlens: torch.Tensor, total: int, max_seqlen: int) -> Sequences:
        """Images with different numbers of tokens, ``total`` in all; does not synchronize with the GPU."""
        images = torch.arange(cu_seqlens.shape[0] - 1, device=cu_seqlens.device)
        owner = torch.repeat_interleave(images, cu_seqlens.diff().long(), output_size=total)
        return cls((total, 1), cu_seqlens, max_seqlen, owner)
