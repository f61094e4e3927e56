"""What the fused norms of feature maps share: (B, C, H, W) in, the same out, one weight and bias a channel."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import checks, debug, dispatch, library

# The most channels that the GPU kernels hold in registers, and positions whose numbers fit their int32.
WIDEST = 8192
LONGEST = 2**30
_runs: dict[str, Callable] = {}


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
    impl = dispatch.resolve(op, impl, x.device, (x.dtype,), _too_large(x))
    if impl == "eager":
        return reference(x, weight, bias, eps, sizes)
    return _runs[op](x, weight, bias, sizes, eps, impl)[0]


def valid(x: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """(B, 1, H, W) bool: which positions of x are in the top left ``sizes`` of their sample."""
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
            library.launch(f"{op}_fwd", impl, x, *_parameters(weight, bias, sizes), eps, nhwc, *outputs)
        return outputs

    def fake(x, weight, bias, sizes, eps, impl):
        return allocate(_dense(x)[0])

    def backward(dy, x, weight, bias, sizes, mean, rstd, impl):
        x, nhwc = _dense(x)
        dy = dy.contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)
        outputs = allocate_backward(x, weight)
        if x.numel():
            parameters = _parameters(weight, bias, sizes)
            library.launch(f"{op}_bwd", impl, dy, x, *parameters, mean, rstd, nhwc, *outputs)
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
        dx, dweight, dbias = run_backward(dy, *saved, ctx.impl)
        return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), None, None, None

    _runs[op] = library.define(
        op,
        "(Tensor x, Tensor weight, Tensor bias, Tensor? sizes, float eps, str impl)"
        " -> (Tensor y, Tensor mean, Tensor rstd)",
        forward,
        fake,
    )
    run_backward = library.define(
        f"{op}_backward",
        "(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor? sizes, Tensor mean, Tensor rstd, str impl)"
        " -> (Tensor dx, Tensor dweight, Tensor dbias)",
        backward,
        fake_backward,
    )
    library.autograd(op, differentiate, setup_context)
    dispatch.register(op, dispatch.standard(f"at most {WIDEST} channels and 2**30 positions"))


def _check(op, x, weight, bias, sizes):
    checks.tensors(op, x=x, weight=weight, bias=bias)
    if x.ndim != 4:
        raise ValueError(f"{op}: x must be (B, C, H, W), got {tuple(x.shape)}")
    shapes = {"weight": (weight, (x.shape[1],)), "bias": (bias, (x.shape[1],))}
    if sizes is not None:
        checks.integers(op, x, "x", sizes=sizes)
        shapes["sizes"] = sizes, (x.shape[0], 2)
    for name, (tensor, shape) in shapes.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{op}: {name} must be {shape} for x {tuple(x.shape)}, got {tuple(tensor.shape)}")
    if sizes is not None and debug.enabled():
        debug.check_sizes(sizes, x.shape[2:], f"{op}: sizes")


def _too_large(x):
    _, channels, height, width = x.shape
    if channels > WIDEST:
        return f"it takes at most {WIDEST} channels, got {channels} (use eager)"
    if height * width > LONGEST:
        return f"it takes at most 2**30 positions, got {height} x {width} (use eager)"
    return None


def _dense(x):
    """x without gaps, and whether its memory is (B, H, W, C) rather than (B, C, H, W)."""
    if x.is_contiguous():
        return x, False
    nhwc = x.is_contiguous(memory_format=torch.channels_last) or x.stride(1) == 1
    return x.contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format), nhwc


def _parameters(weight, bias, sizes):
    """As the launchers take them: float32, sizes int32."""
    return weight.float().contiguous(), bias.float().contiguous(), None if sizes is None else sizes.int().contiguous()
