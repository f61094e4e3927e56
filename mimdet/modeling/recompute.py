"""What backward computes again instead of keeping it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ..kernels import use
from ..kernels.dispatch import requested

RECOMPUTE = ("lean", "none")


def is_lean(recompute: str) -> bool:
    """Whether ``recompute`` is "lean" rather than "none"; ValueError if it is neither."""
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute: {recompute!r} is unknown; choose from {', '.join(RECOMPUTE)}")
    return recompute == "lean"


class Remade(NamedTuple):
    """A tensor that is cheap to make again, on its way to a ``Linear``: ``make(*sources)`` equals ``value``.

    Attributes:
        value: the tensor, part of the graph.
        make: called in backward, without gradients and with the kernels that were asked for in forward.
        sources: what ``value`` was made of and the graph keeps anyway.
    """

    value: torch.Tensor
    make: Callable[..., torch.Tensor]
    sources: tuple[torch.Tensor, ...]


class Linear(nn.Linear):
    """``nn.Linear`` that keeps the sources of a ``Remade`` input for backward in place of the input."""

    def forward(self, x: torch.Tensor | Remade, add_bias: bool = True) -> torch.Tensor:
        """(..., in_features) -> (..., out_features). Gradients of a ``Remade`` input are of first order."""
        weight, bias = self.weight, self.bias if add_bias else None
        if isinstance(x, torch.Tensor):
            return F.linear(x, weight, bias)
        # torch.compile decides itself what is kept, and would merge the second computation with the first.
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and weight.requires_grad):
            return F.linear(x.value, weight, bias)
        if torch.is_autocast_enabled(x.value.device.type):
            # Cast where gradients flow: the function then sees one dtype, and the parameter's gradient has its own.
            weight, bias = weight.to(x.value.dtype), None if bias is None else bias.to(x.value.dtype)
        return _Linear.apply(x.value, weight, bias, x.make, *(source.detach() for source in x.sources))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, make, *sources):
        ctx.make, ctx.kernels = make, requested()
        ctx.save_for_backward(weight, *sources)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, *sources = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[1]:
                with use(ctx.kernels):
                    x = ctx.make(*sources)
                grad_weight = rows.t() @ x.reshape(-1, x.shape[-1])
                del x
            if ctx.needs_input_grad[0]:
                grad_x = (rows @ weight).view(*grad.shape[:-1], weight.shape[1])
            if ctx.needs_input_grad[2]:
                grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias, None, *(None for _ in sources)


def checkpointed(function: Callable[..., torch.Tensor], *args) -> torch.Tensor:
    """``function(*args)``, computed again in backward: with the same random numbers and the same kernels."""
    if torch.compiler.is_compiling():
        return checkpoint(function, *args, use_reentrant=False)
    kernels = requested()
    return checkpoint(function, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), use(kernels)))
