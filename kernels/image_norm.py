"""What the fused norms of feature maps share: (B, C, H, W) in, the same out, one weight and bias a channel."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch

from . import build, debug, library, registry
from .selector import KernelUnavailableError, requested

# The most channels that the GPU kernels hold in registers.
WIDEST = 8192
_calls: dict[str, Callable] = {}


def run(
    op: str,
    reference: Callable[..., torch.Tensor],
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    sizes: torch.Tensor | None,
    impl: str | None,
) -> torch.Tensor:
    """What ``mimdet.kernels.<op>.api.<op>`` does: checks, choice of the implementation, call."""
    _check(op, x, weight, bias, sizes)
    impl = _choose(op, impl, x)
    if impl == "eager":
        return reference(x, weight, bias, eps, sizes)
    return _calls[op](x, weight, bias, sizes, eps, impl)[0]


def valid(x: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """(B, 1, H, W) bool: which positions of x lie in the top left ``sizes`` of their sample."""
    row, column = (torch.arange(length, device=x.device) for length in x.shape[2:])
    rows, columns = sizes.unbind(1)
    return (row < rows[:, None])[:, None, :, None] & (column < columns[:, None])[:, None, None, :]


def register(op: str, statistics: Callable[[torch.Tensor], tuple[int, ...]]) -> None:
    """Register ``mimdet::<op>`` and ``mimdet::<op>_backward``.

    The first gives (y, mean, rstd), the second (dx, dweight, dbias) from (dy, x, weight, bias, sizes, mean, rstd). Mean
    and rstd are float32, as are the gradients of weight and bias before they are cast. Launchers of every
    implementation fill outputs that are allocated here.

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

    def forward(x, weight, bias, sizes, eps, impl):
        x, nhwc = _dense(x)
        outputs = allocate(x)
        if x.numel():
            _launch(op, "fwd", impl, (x, *_parameters(weight, bias, sizes), eps, nhwc), outputs)
        return outputs

    def fake(x, weight, bias, sizes, eps, impl):
        return allocate(_dense(x)[0])

    def backward(dy, x, weight, bias, sizes, mean, rstd, impl):
        x, nhwc = _dense(x)
        dy = dy.contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)
        outputs = allocate_backward(x, weight)
        if x.numel():
            _launch(op, "bwd", impl, (dy, x, *_parameters(weight, bias, sizes), mean, rstd, nhwc), outputs)
        else:
            for gradient in outputs[1:]:
                gradient.zero_()
        return outputs

    def fake_backward(dy, x, weight, bias, sizes, mean, rstd, impl):
        return allocate_backward(_dense(x)[0], weight)

    def setup_context(ctx, inputs, output):
        x, weight, bias, sizes, _, ctx.impl = inputs
        ctx.save_for_backward(x, weight, bias, sizes, *output[1:])

    def differentiate(ctx, dy, dmean, drstd):
        saved = ctx.saved_tensors
        _, weight, bias, *_ = saved
        dx, dweight, dbias = call_backward(dy, *saved, ctx.impl)
        return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), None, None, None

    _calls[op] = library.define(
        op,
        "(Tensor x, Tensor weight, Tensor bias, Tensor? sizes, float eps, str impl)"
        " -> (Tensor y, Tensor mean, Tensor rstd)",
        forward,
        fake,
    )
    call_backward = library.define(
        f"{op}_backward",
        "(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor? sizes, Tensor mean, Tensor rstd, str impl)"
        " -> (Tensor dx, Tensor dweight, Tensor dbias)",
        backward,
        fake_backward,
    )
    library.autograd(op, differentiate, setup_context)
    registry.register(op, triton=registry.can_run_triton, cuda=registry.can_run_cuda, cpp=registry.can_run_cpp)


def _check(op, x, weight, bias, sizes):
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must be a floating point tensor, got {getattr(tensor, 'dtype', tensor)}")
    if x.ndim != 4:
        raise ValueError(f"{op}: x must be (B, C, H, W), got {tuple(x.shape)}")
    wanted = {"weight": (weight, (x.shape[1],)), "bias": (bias, (x.shape[1],))}
    if sizes is not None:
        if not isinstance(sizes, torch.Tensor) or sizes.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: sizes must be an int32 or int64 tensor, got {getattr(sizes, 'dtype', sizes)}")
        wanted["sizes"] = sizes, (x.shape[0], 2)
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{op}: {name} must be {shape} for x {tuple(x.shape)}, got {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, x on {x.device}")
    if sizes is not None and debug.enabled():
        debug.check_sizes(sizes, x.shape[2:], f"{op}: sizes")


def _choose(op, impl, x):
    chosen = registry.choose(op, impl, x.device.type, x.dtype)
    if chosen not in ("triton", "cuda"):
        return chosen
    if x.shape[1] > WIDEST:
        reason = f"at most {WIDEST} channels, got {x.shape[1]}"
    elif x.shape[2] * x.shape[3] > 2**30:
        reason = f"at most 2**30 positions, got {x.shape[2]} x {x.shape[3]}"
    else:
        return chosen
    if requested(impl) == "auto":
        return "eager"
    raise KernelUnavailableError(f"{op}: {chosen} takes {reason}. auto would choose what can.")


def _dense(x):
    """x without gaps, and whether its memory is (B, H, W, C) rather than (B, C, H, W)."""
    if x.is_contiguous():
        return x, False
    nhwc = x.is_contiguous(memory_format=torch.channels_last) or x.stride(1) == 1
    return x.contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format), nhwc


def _parameters(weight, bias, sizes):
    """As the launchers take them: float32, sizes int32."""
    return weight.float().contiguous(), bias.float().contiguous(), None if sizes is None else sizes.int().contiguous()


def _launch(op, direction, impl, inputs, outputs):
    if impl == "cpp":
        build.call_cpp(f"{op}_{direction}", *inputs, *outputs)
    elif impl in ("triton", "cuda"):
        launcher = getattr(import_module(f".{op}.{impl}", __package__), f"launch_{op}_{direction}")
        launcher(*inputs, *outputs)
    else:
        raise ValueError(f"{op}: {impl!r} is not an implementation of the registered operation")
