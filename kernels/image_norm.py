"""What the fused norms of feature maps share: (B, C, H, W) in, the same out, one weight and bias a channel."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch

from . import build, library, registry


def check(op: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Raise TypeError or ValueError, naming the argument, unless the three belong together."""
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must be a floating point tensor, got {getattr(tensor, 'dtype', tensor)}")
    if x.ndim != 4:
        raise ValueError(f"{op}: x must be (B, C, H, W), got {tuple(x.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.shape != (x.shape[1],):
            raise ValueError(
                f"{op}: {name} must be ({x.shape[1]},) for {x.shape[1]} channels, got {tuple(tensor.shape)}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, x on {x.device}")


def register(op: str, statistics: Callable[[torch.Tensor], tuple[int, ...]]) -> None:
    """Register ``mimdet::<op>`` and ``mimdet::<op>_backward``.

    The first gives (y, mean, rstd), the second (dx, dweight, dbias) from (dy, x, weight, bias, mean, rstd). Mean and
    rstd are float32, as are the gradients of weight and bias before they are cast. Launchers of every implementation
    fill outputs that are allocated here.

    Args:
        op: the operation's name, and that of its folder.
        statistics: x -> shape of mean and rstd.
    """

    def allocate(x):
        y = torch.empty_like(x)
        mean, rstd = (x.new_empty(statistics(x), dtype=torch.float32) for _ in range(2))
        return y, mean, rstd

    def allocate_backward(x, weight):
        dx = torch.empty_like(x)
        dweight, dbias = (torch.empty(weight.shape, dtype=torch.float32, device=x.device) for _ in range(2))
        return dx, dweight, dbias

    def run(x, weight, bias, eps, impl):
        x, nhwc = dense(x)
        outputs = allocate(x)
        inputs = (x, weight.float().contiguous(), bias.float().contiguous(), eps, nhwc)
        if x.numel():
            _launch(op, "fwd", impl, inputs, outputs)
        return outputs

    def fake(x, weight, bias, eps, impl):
        return allocate(dense(x)[0])

    def run_backward(dy, x, weight, bias, mean, rstd, impl):
        x, nhwc = dense(x)
        dy = dy.contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)
        outputs = allocate_backward(x, weight)
        inputs = (dy, x, weight.float().contiguous(), bias.float().contiguous(), mean, rstd, nhwc)
        if x.numel():
            _launch(op, "bwd", impl, inputs, outputs)
        else:
            for gradient in outputs[1:]:
                gradient.zero_()
        return outputs

    def fake_backward(dy, x, weight, bias, mean, rstd, impl):
        return allocate_backward(dense(x)[0], weight)

    def setup_context(ctx, inputs, output):
        x, weight, bias, _, ctx.impl = inputs
        ctx.save_for_backward(x, weight, bias, *output[1:])

    def backward(ctx, dy, dmean, drstd):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        dx, dweight, dbias = call_backward(dy, x, weight, bias, mean, rstd, ctx.impl)
        return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), None, None

    library.define(
        op,
        "(Tensor x, Tensor weight, Tensor bias, float eps, str impl) -> (Tensor y, Tensor mean, Tensor rstd)",
        run,
        fake,
    )
    call_backward = library.define(
        f"{op}_backward",
        "(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, str impl)"
        " -> (Tensor dx, Tensor dweight, Tensor dbias)",
        run_backward,
        fake_backward,
    )
    library.autograd(op, backward, setup_context)
    registry.register(op, triton=registry.can_run_triton, cpp=registry.can_run_cpp)


def dense(x: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """x without gaps, and whether its memory is (B, H, W, C) rather than (B, C, H, W)."""
    if x.is_contiguous():
        return x, False
    nhwc = x.is_contiguous(memory_format=torch.channels_last) or x.stride(1) == 1
    return x.contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format), nhwc


def _launch(op, direction, impl, inputs, outputs):
    if impl == "triton":
        launcher = getattr(import_module(f".{op}.triton", __package__), f"launch_{op}_{direction}")
        launcher(*inputs, *outputs)
    elif impl == "cpp":
        build.call_cpp(f"{op}_{direction}", *inputs, *outputs)
    else:
        raise ValueError(f"{op}: {impl!r} is not an implementation of the registered operation")
