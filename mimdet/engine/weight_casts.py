"""Mixed precision: the casts of weights to 16 bits, and of their gradients back, many in one operation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# Elements. DDP: the gradients of a group arrive together, so a group is about one bucket, 25 MiB of float32.
_GROUP = 2**23


class WeightCasts:
    """Casts a model's float32 weights to 16 bits once a training step, in groups of one operation each.

    autocast takes one operation for each weight, one more for its gradient, and another where checkpointing recomputes.
    The first step does that. Weights that its autograd graph uses only in one such cast are grouped then, in the order
    of the casts, and from the second step on a group is cast where the first of its modules runs. Every number is the
    same. Without mixed precision there are no such weights, and nothing changes.

    A module has the copies in place of its weights only while its ``forward`` runs. No copy outlives the step, so none
    is ever out of date.

    Args:
        model: as it is trained, with any wrapper.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._groups: list[_Group] | None = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Inside, the forward and backward of one step run; the copies are of the weights of now."""
        if self._groups is not None and not all(group.is_valid() for group in self._groups):
            self._groups = None
        groups, replaced = self._groups or (), []
        try:
            for group in groups:
                for module in group.weights:
                    replaced.append((module, vars(module).get("forward")))
                    vars(module)["forward"] = group.forward_of(module)
            yield
        finally:
            for module, forward in reversed(replaced):
                del vars(module)["forward"]
                if forward is not None:
                    vars(module)["forward"] = forward
            for group in groups:
                group.copies = {}

    def learn(self, loss: torch.Tensor) -> None:
        """Find the weights to cast; call it in every step before backward.

        Args:
            loss: scalar, with its autograd graph.
        """
        if self._groups is None:
            self._groups = _grouped(self.model, _single_casts(loss))


class _Group:
    """Weights that are cast together.

    Attributes:
        weights: module -> name -> parameter.
        copies: as ``weights``, in 16 bits; empty until the first module runs.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.key = device, dtype
        self.elements = 0
        self.weights: dict[nn.Module, dict[str, nn.Parameter]] = defaultdict(dict)
        self.copies: dict[nn.Module, dict[str, torch.Tensor]] = {}

    def is_valid(self) -> bool:
        """Whether each weight is still its module's, and is trained."""
        return all(
            module._parameters.get(name) is weight and weight.requires_grad
            for module, weights in self.weights.items()
            for name, weight in weights.items()
        )

    def forward_of(self, module: nn.Module) -> Callable:
        """``module.forward`` with the copies in place of the weights."""
        forward, parameters, weights = module.forward, module._parameters, self.weights[module]

        def forward_with_copies(*args: Any, **kwargs: Any) -> Any:
            if not self.copies:
                self._cast()
            parameters.update(self.copies[module])
            try:
                return forward(*args, **kwargs)
            finally:
                parameters.update(weights)

        return forward_with_copies

    def _cast(self) -> None:
        weights = [weight for of_module in self.weights.values() for weight in of_module.values()]
        with torch.enable_grad():  # the first module may be one that runs without gradients
            copies = iter(_Cast.apply(self.key[1], *weights))
        self.copies = {module: {name: next(copies) for name in names} for module, names in self.weights.items()}


class _Cast(torch.autograd.Function):
    """Tensors of one dtype in another one, and the gradients of the results back, each in one operation."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.dtype = weights[0].dtype
        ctx.set_materialize_grads(False)
        return tuple(_cast(weights, dtype))

    @staticmethod
    def backward(ctx, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        present = [grad for grad in grads if grad is not None]
        # create_graph: a second-order gradient needs operations that autograd records.
        cast = iter([g.to(ctx.dtype) for g in present] if torch.is_grad_enabled() else _cast(present, ctx.dtype))
        return None, *(None if grad is None else next(cast) for grad in grads)


def _cast(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    results = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(results, tensors)
    return results


def _single_casts(loss: torch.Tensor) -> list[tuple[torch.Tensor, torch.dtype]]:
    """Float32 leaves that a loss depends on only through one cast to 16 bits, with its dtype, in the casts' order."""
    uses = defaultdict(list)
    stack = [] if loss.grad_fn is None else [loss.grad_fn]
    seen = set(stack)
    while stack:
        node = stack.pop()
        for source, _ in node.next_functions:
            if type(source).__name__ == "AccumulateGrad":
                uses[source.variable].append(node)
            elif source is not None and source not in seen:
                seen.add(source)
                stack.append(source)
    casts = []
    for weight, nodes in uses.items():
        if len(nodes) == 1 and type(nodes[0]).__name__ == "ToCopyBackward0" and weight.dtype == torch.float32:
            result = nodes[0]._input_metadata[0]
            if result.dtype in (torch.bfloat16, torch.float16) and result.device == weight.device:
                casts.append((nodes[0]._sequence_nr(), weight, result.dtype))
    return [cast[1:] for cast in sorted(casts, key=lambda cast: cast[0])]


def _grouped(model: nn.Module, casts: Sequence[tuple[torch.Tensor, torch.dtype]]) -> list[_Group]:
    """Groups of consecutive casts, of one device and dtype each; not of weights that several modules share."""
    places = defaultdict(list)
    for module in model.modules():
        for name, weight in module._parameters.items():
            places[weight].append((module, name))
    groups: list[_Group] = []
    for weight, dtype in casts:
        if len(places[weight]) != 1:
            continue
        (module, name), key = places[weight][0], (weight.device, dtype)
        if not groups or groups[-1].key != key or groups[-1].elements + weight.numel() > _GROUP:
            groups.append(_Group(*key))
        groups[-1].weights[module][name] = weight
        groups[-1].elements += weight.numel()
    return groups
