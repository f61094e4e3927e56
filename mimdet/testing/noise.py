"""Fixed random numbers for a detector or a backbone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..modeling.noise import NoiseSource


@contextmanager
def fixed_noise(
    model: nn.Module,
    tokens: torch.Tensor | None = None,
    anchors: torch.Tensor | None = None,
    proposals: torch.Tensor | None = None,
) -> Iterator[None]:
    """Inside the block, ``model`` chooses by these numbers instead of drawing its own.

    The smallest numbers are chosen, the earlier one on a tie. None leaves the drawing to ``torch.rand``. Two detectors
    under the same numbers, for example this one and a port of it, train on the same tokens, anchors and proposals. Drop
    path draws its own: set its rate to 0 to compare.

    Args:
        model: a detector, or a backbone alone.
        tokens: (B, L), L tokens of the padded batch; for an ensemble (passes, B, L).
        anchors: (B, anchors of all levels).
        proposals: (B, post_nms_topk + ground-truth slots): column j is proposal j, then come ground-truth boxes.

    Raises:
        ValueError: the model chooses nothing by numbers that are given.
    """
    sources = {module.noise.name: module.noise for module in model.modules() if _has_source(module)}
    fixed = {"tokens": tokens, "anchors": anchors, "proposals": proposals}
    fixed = {name: numbers for name, numbers in fixed.items() if numbers is not None}
    if unknown := sorted(fixed.keys() - sources.keys()):
        raise ValueError(f"fixed_noise: {type(model).__name__} draws no numbers for {' or '.join(unknown)}")
    before = {name: (sources[name].fixed, sources[name].first_truth) for name in fixed}
    try:
        for name, numbers in fixed.items():
            sources[name].fixed = list(numbers) if numbers.dim() == 3 else [numbers]
        if "proposals" in fixed:
            sources["proposals"].first_truth = model.proposal_generator.post_nms_topk[0]
        yield
    finally:
        for name, state in before.items():
            sources[name].fixed, sources[name].first_truth = state


def _has_source(module: nn.Module) -> bool:
    return isinstance(getattr(module, "noise", None), NoiseSource)
