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
    """Context in which ``model`` uses these numbers instead of ``torch.rand``.

    Candidates with the smallest numbers are chosen, the earlier one on a tie. None draws as usual. Two detectors with
    the same numbers, such as this one and a port of it, train on the same tokens, anchors and proposals. Drop path is
    not fixed: set its rate to 0 for a comparison.

    Args:
        model: a detector, or a backbone alone.
        tokens: (B, L), L tokens of the padded batch; (passes, B, L) for a test-time ensemble.
        anchors: (B, anchors of all levels).
        proposals: (B, post_nms_topk + ground-truth slots): proposals first, then ground-truth boxes.

    Raises:
        ValueError: the model does not draw one of these kinds of numbers.
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
