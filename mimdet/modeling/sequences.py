"""Tokens of a batch as sequences for attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sequences:
    """Which tokens attend to each other: those of one picture, or of one window of it.

    Attributes:
        shape: tokens are a tensor (*shape, C). (B, N) where all pictures have N tokens; (T, 1) where they are packed,
            so that what is given for each row, a drop path factor for example, is given for each token.
        cu_seqlens: (S + 1,) int32, where each sequence's tokens begin, and T.
        max_seqlen: most tokens of a sequence.
        owner: (T,) int64, the picture of each packed token; None for (B, N).
        pictures: B where a picture has several sequences; None where S is B.
    """

    shape: tuple[int, int]
    cu_seqlens: torch.Tensor
    max_seqlen: int
    owner: torch.Tensor | None = None
    pictures: int | None = None

    @property
    def batch(self) -> int:
        """Number of pictures."""
        return self.cu_seqlens.shape[0] - 1 if self.pictures is None else self.pictures

    @classmethod
    def equal(cls, batch: int, length: int, device: torch.device) -> Sequences:
        """``length`` tokens of each picture."""
        starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
        return cls((batch, length), starts, length)

    @classmethod
    def packed(cls, cu_seqlens: torch.Tensor, total: int, max_seqlen: int) -> Sequences:
        """Pictures of different numbers of tokens, ``total`` together; does not wait for the GPU."""
        pictures = torch.arange(cu_seqlens.shape[0] - 1, device=cu_seqlens.device)
        owner = torch.repeat_interleave(pictures, cu_seqlens.diff().long(), output_size=total)
        return cls((total, 1), cu_seqlens, max_seqlen, owner)
