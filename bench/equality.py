"""Checks of outputs and gradients; nothing is timed before it passes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

# Added to twice the reference's error: ulps of the dtype at the largest magnitude.
_ULPS = 4
# Relative L2 distance allowed between two models: features, gradients.
_MODEL_TOLERANCE = {"fp32": (1e-5, 1e-4), "bf16": (3e-2, 1e-1), "fp16": (4e-3, 2e-2)}
BOX_TOLERANCE = 1e-2  # pixels
_SCORE_TOLERANCE = 1e-4
_MASK_TOLERANCE = 1e-3  # share of the pixels of an image


def differentiate(
    function: Callable[[dict], Sequence[torch.Tensor]],
    inputs: Mapping[str, torch.Tensor],
    differentiable: Sequence[str],
    gradients: Sequence[torch.Tensor],
    comparable: Callable[[tuple], Sequence[torch.Tensor]] = tuple,
) -> dict[str, torch.Tensor]:
    """``comparable`` outputs of ``function(inputs)``, and gradients of ``differentiable`` inputs."""
    leaves = {k: v.detach().requires_grad_(k in differentiable) for k, v in inputs.items()}
    outputs = function(leaves)
    tensors = {f"output {i}": output.detach() for i, output in enumerate(comparable(outputs))}
    if differentiable:
        sources = [leaves[name] for name in differentiable]
        computed = torch.autograd.grad(outputs, sources, list(gradients), materialize_grads=True)
        tensors |= {f"gradient of {name}": g for name, g in zip(differentiable, computed, strict=True)}
    return tensors


def mismatch(
    actual: Mapping[str, torch.Tensor],
    same_dtype: Mapping[str, torch.Tensor],
    exact: Mapping[str, torch.Tensor],
    terms: Mapping[str, int],
) -> str | None:
    """Where ``actual`` exceeds the error budget; None if nowhere.

    Args:
        actual: tensors of an implementation, by name.
        same_dtype: those of the reference in the same dtype.
        exact: those of the reference in float64; integers are alike in all.
        terms: how many are summed into one element, for names where that is many.
    """
    for name, expected in exact.items():
        value, plain = actual[name], same_dtype[name]
        if value.shape != expected.shape or value.dtype != plain.dtype:
            return f"{name}: {tuple(value.shape)} {value.dtype}, not {tuple(expected.shape)} {plain.dtype}"
        if not expected.is_floating_point():
            if not torch.equal(value, expected):
                return f"{name}: {(value != expected).sum().item()} of {expected.numel()} integers differ"
        elif expected.numel():
            error = (value.double() - expected).abs().max().item()
            reference = (plain.double() - expected).abs().max().item()
            ulps = _ULPS * terms.get(name, 1) ** 0.5  # grow with the root of the terms
            allowed = 2 * reference + ulps * torch.finfo(plain.dtype).eps * expected.abs().max().item()
            if not error <= allowed:
                return f"{name}: error {error:.2g}, allowed {allowed:.2g}"
    return None


def model_mismatch(
    actual: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    dtype: str,
    gradient: float | None = None,
) -> str | None:
    """Which feature or gradient of a model is too far from the expected one; None if none is.

    Args:
        actual, expected: tensors by name; names of gradients have "gradient" in them.
        dtype: one of ``session.DTYPES`` that both models computed in.
        gradient: tolerance of gradients; default: the dtype's.
    """
    tolerances = _MODEL_TOLERANCE[dtype][0], gradient or _MODEL_TOLERANCE[dtype][1]
    for name, value in expected.items():
        allowed = tolerances["gradient" in name]
        off, size = (torch.linalg.vector_norm(x, dtype=torch.float64) for x in (actual[name] - value, value))
        error = (off / size.clamp(min=1e-30)).item()
        if not error <= allowed:
            return f"{name}: relative error {error:.2g}, allowed {allowed:.2g}"
    return None


def matched(
    actual: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor], tolerance: float
) -> torch.Tensor | None:
    """Index in ``actual`` of each expected detection, both boxes (N, 4) and classes (N,); None if they differ.

    Order says nothing: detections with nearly equal scores may change places.

    Args:
        tolerance: of each coordinate, in pixels.
    """
    (boxes, classes), (their_boxes, their_classes) = actual, expected
    if boxes.shape != their_boxes.shape:
        return None
    gaps = torch.cdist(their_boxes, boxes, p=torch.inf)
    gaps[their_classes[:, None] != classes] = torch.inf
    order = torch.zeros_like(classes)
    for i, gap in enumerate(gaps):
        order[i] = gap.argmin()
        if not gap[order[i]] <= tolerance:
            return None
        gaps[:, order[i]] = torch.inf  # clipped boxes of one class can be equal
    return order


def detections_mismatch(actual: Sequence[Mapping], expected: Sequence[Mapping]) -> str | None:
    """How the detections of the images differ; None if they are equal up to their order.

    Args:
        actual, expected: for each image boxes (N, 4), scores (N,), labels (N,) and masks (N, H, W) bool.
    """
    for i, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        order = matched(*((each["boxes"], each["labels"]) for each in (ours, theirs)), BOX_TOLERANCE)
        if order is None:
            return f"image {i}: other boxes or classes among {len(ours['boxes'])} and {len(theirs['boxes'])} detections"
        if len(order):
            score = (ours["scores"][order] - theirs["scores"]).abs().max().item()
            mask = (ours["masks"][order] != theirs["masks"]).flatten(1).float().mean(1).max().item()
            for name, off, allowed in (("score", score, _SCORE_TOLERANCE), ("mask", mask, _MASK_TOLERANCE)):
                if not off <= allowed:
                    return f"image {i}: a {name} differs by {off:.2g}, allowed {allowed:.2g}"
    return None


def reason(error: Exception) -> str:
    """Status of a row that raised ``error``: out of memory, a missing compiler, ..."""
    first, *_ = str(error).strip().splitlines() or [""]
    return f"cannot run: {type(error).__name__}: {first[:120]}"
