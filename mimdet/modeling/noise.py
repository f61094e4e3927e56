"""The uniform random numbers that choose tokens, anchors and proposals: drawn here and nowhere else."""

from __future__ import annotations

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

    def draw_candidates(
        self, batch: int, proposals: int, truths: int, filled: int, device: torch.device
    ) -> torch.Tensor:
        """(batch, proposals + truths) numbers for the slots of proposals, then for those of ground-truth boxes.

        Slots beyond the first ``filled`` of the latter hold no box in any image.

        Raises:
            ValueError: fixed numbers of another batch, or for fewer candidates.
        """
        if not self.fixed:
            return torch.rand(batch, proposals + truths, device=device)
        fixed, first = self._next(), self.first_truth
        if len(fixed) != batch or first < proposals or fixed.shape[1] < first + filled:
            raise ValueError(
                f"noise of {self.name} must be ({batch}, {first} proposals + at least {filled} ground-truth boxes), "
                f"got {tuple(fixed.shape)}"
            )
        of_truths = fixed[:, first : first + truths]
        rest = fixed.new_ones(batch, truths - of_truths.shape[1])
        return torch.cat([fixed[:, :proposals], of_truths, rest], dim=1).to(device)

    def _next(self) -> torch.Tensor:
        self.fixed.append(self.fixed.pop(0))
        return self.fixed[-1]
