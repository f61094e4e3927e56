"""Selective recomputation and checkpointing: backward recomputes activations instead of saving them."""

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

RECOMPUTE = ("auto", "lean", "none")


def is_checkpointing(checkpointing: bool | str) -> bool:
    """``checkpointing`` if it is True or False; "auto" is decided at the first step. ValueError for another."""
    if checkpointing not in (True, False, "auto"):
        raise ValueError(f"checkpointing: {checkpointing!r} is unknown; choose from true, false, auto")
    return checkpointing is True


def is_selective(recompute: str) -> bool:
    """Whether ``recompute`` is "lean"; "auto" is decided at the first step. ValueError for an unknown one."""
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute: {recompute!r} is unknown; choose from {', '.join(RECOMPUTE)}")
    return recompute == "lean"


class Recomputed(NamedTuple):
    """An activation that backward recomputes: input of a ``RecomputeLinear`` or ``RecomputeConv2d``.

    Attributes:
        value: the activation, part of the autograd graph; equals ``function(*sources)``.
        function: cheap; backward calls it without gradients and with the kernels requested in forward.
        sources: arguments of ``function``, which autograd saves anyway.
    """

    value: torch.Tensor
    function: Callable[..., torch.Tensor]
    sources: tuple[torch.Tensor, ...]


class RecomputeLinear(nn.Linear):
    """``nn.Linear`` that saves the sources of a ``Recomputed`` input for backward, not the input."""

    def forward(self, x: torch.Tensor | Recomputed, add_bias: bool = True) -> torch.Tensor:
        """(..., in_features) -> (..., out_features). A ``Recomputed`` input has no second-order gradient."""
        weight, bias = self.weight, self.bias if add_bias else None
        if isinstance(x, torch.Tensor):
            return F.linear(x, weight, bias)
        # torch.compile decides itself what to save, and would merge the recomputation with the first computation.
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and weight.requires_grad):
            return F.linear(x.value, weight, bias)
        if torch.is_autocast_enabled(x.value.device.type):
            # autocast: cast inside the graph, so that the parameter's gradient has the parameter's dtype.
            weight, bias = weight.to(x.value.dtype), None if bias is None else bias.to(x.value.dtype)
        return _RecomputeLinear.apply(x.value, weight, bias, x.function, *(source.detach() for source in x.sources))


class _RecomputeLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, function, *sources):
        ctx.function, ctx.kernels = function, requested()
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
                    x = ctx.function(*sources)
                grad_weight = rows.t() @ x.reshape(-1, x.shape[-1])
                del x
            if ctx.needs_input_grad[0]:
                grad_x = (rows @ weight).view(*grad.shape[:-1], weight.shape[1])
            if ctx.needs_input_grad[2]:
                grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias, None, *(None for _ in sources)


def checkpointed(function: Callable[..., torch.Tensor], *args) -> torch.Tensor:
    """``function(*args)``, which draws no random numbers, recomputed in backward with the same kernels."""
    options = {"use_reentrant": False, "preserve_rng_state": False}
    if torch.compiler.is_compiling():
        return checkpoint(function, *args, **options)
    kernels = requested()
    return checkpoint(function, *args, **options, context_fn=lambda: (nullcontext(), use(kernels)))
