"""The uniform random numbers that choose tokens, anchors and proposals: drawn here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class NoiseSource:
    """Uniform numbers in [0, 1): candidates with the smallest are chosen, the earlier one on a tie.

    The encoder chooses tokens, the RPN anchors, the ROI heads proposals. Numbers come from ``torch.rand``, or from
    ``mimdet.testing.fixed_noise``.

    Args:
        name: what is chosen: "tokens", "anchors" or "proposals".

    Attributes:
        fixed: tensors that replace the draws, in turn and over again; empty for ``torch.rand``.
        first_truth: column of the first ground-truth box in fixed numbers of "proposals".
    """

    def __init__(self, name: str):
        self.name = name
        self.fixed: list[torch.Tensor] = []
        self.first_truth = 0

    def draw(self, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
        """Float numbers of ``shape``.

        Raises:
            ValueError: fixed numbers of another shape.
        """
        if not self.fixed:
            return torch.rand(shape, device=device)
        fixed = self._next()
        if tuple(fixed.shape) != tuple(shape):
            raise ValueError(f"noise of {self.name} must be {tuple(shape)}, got {tuple(fixed.shape)}")
        return fixed.to(device)

    def draw_candidates(self, counts: Sequence[tuple[int, int]], device: torch.device) -> torch.Tensor:
        """(B, N) numbers for the candidates of each image: ``counts`` of proposals, then of ground-truth boxes.

        N is the largest number of candidates of an image; numbers past an image's last candidate are arbitrary.

        Raises:
            ValueError: fixed numbers for fewer candidates.
        """
        length = max(sum(count) for count in counts)
        if not self.fixed:
            return torch.rand(len(counts), length, device=device)
        fixed, first = self._next(), self.first_truth
        proposals, truths = (max(count) for count in zip(*counts, strict=True))
        if len(fixed) != len(counts) or first < proposals or fixed.shape[1] < first + truths:
            raise ValueError(
                f"noise of {self.name} must be ({len(counts)}, {first} proposals + at least {truths} ground-truth "
                f"boxes), got {tuple(fixed.shape)}"
            )
        rows = [torch.cat([row[:n], row[first : first + m]]) for row, (n, m) in zip(fixed, counts, strict=True)]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)

    def _next(self) -> torch.Tensor:
        self.fixed.append(self.fixed.pop(0))
        return self.fixed[-1]
