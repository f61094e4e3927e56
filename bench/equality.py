"""Nothing is timed before its outputs and gradients are right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

# Slack beside twice the reference's error, in units of the dtype's last place at the largest magnitude.
_ULPS = 4


def differentiate(
    function: Callable[[dict], Sequence[torch.Tensor]],
    inputs: Mapping[str, torch.Tensor],
    differentiable: Sequence[str],
    gradients: Sequence[torch.Tensor],
    comparable: Callable[[tuple], Sequence[torch.Tensor]] = tuple,
) -> dict[str, torch.Tensor]:
    """Outputs of ``function(inputs)``, as ``comparable`` shows them, and gradients of ``differentiable`` inputs."""
    leaves = {k: v.detach().requires_grad_(k in differentiable) for k, v in inputs.items()}
    outputs = function(leaves)
    found = {f"output {i}": output.detach() for i, output in enumerate(comparable(outputs))}
    if differentiable:
        wanted = [leaves[name] for name in differentiable]
        computed = torch.autograd.grad(outputs, wanted, list(gradients), materialize_grads=True)
        found |= {f"gradient of {name}": g for name, g in zip(differentiable, computed, strict=True)}
    return found


def why_wrong(
    got: Mapping[str, torch.Tensor],
    same_dtype: Mapping[str, torch.Tensor],
    exact: Mapping[str, torch.Tensor],
    terms: Mapping[str, int],
) -> str | None:
    """None if ``got`` errs at most twice as much as ``same_dtype``, plus a few units in the last place; else why.

    Args:
        got, same_dtype, exact: tensors by name; ``exact`` in float64, integers alike in all.
        terms: how many are summed into one element, for names where that is many; slack grows with its root.
    """
    for name, want in exact.items():
        value, plain = got[name], same_dtype[name]
        if value.shape != want.shape or value.dtype != plain.dtype:
            return f"{name}: {tuple(value.shape)} {value.dtype}, not {tuple(want.shape)} {plain.dtype}"
        if not want.is_floating_point():
            if not torch.equal(value, want):
                return f"{name}: {(value != want).sum().item()} of {want.numel()} integers differ"
            continue
        if not want.numel():
            continue
        error, reference = ((t.double() - want).abs().max().item() for t in (value, plain))
        slack = _ULPS * torch.finfo(value.dtype).eps * want.abs().max().item() * terms.get(name, 1) ** 0.5
        if not error <= 2 * reference + slack:
            return f"{name}: error {error:.2g}, allowed {2 * reference + slack:.2g}"
    return None
