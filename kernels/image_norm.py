"""Checks, allocation and registration of the fused norms of feature maps (B, C, H, W), with one weight per channel."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import checks, debug, dispatch, library

# Limits of the GPU kernels: channels that fit into registers, positions that fit into int32.
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
    """Body of ``mimdet.kernels.<op>``: checks, choice of the implementation, call."""
    _check(op, x, weight, bias, sizes)
    impl = dispatch.resolve(op, impl, x.device, (x.dtype,), _too_large(x))
    if impl == "eager":
        return reference(x, weight, bias, eps, sizes)
    return _runs[op](x, weight, bias, sizes, eps, impl)[0]


def register(op: str, statistics: Callable[[torch.Tensor], tuple[int, ...]]) -> None:
    """Register ``mimdet::<op>`` and ``mimdet::<op>_backward``.

    The first returns (y, mean, rstd), the second dx and dparameters (2, C), of bias and of weight. All but y and dx are
    float32.
    Launchers of every implementation fill outputs that are allocated here.

    Args:
        op: the operation's name, and that of its folder.
        statistics: x -> shape of mean and rstd.
    """

    def allocate(x):
        y = torch.empty_like(x)
        mean = x.new_empty(statistics(x), dtype=torch.float32)
        return y, mean, torch.empty_like(mean)

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
        outputs = _allocate_backward(x)
        if x.numel():
            parameters = _parameters(weight, bias, sizes)
            library.launch(f"{op}_bwd", impl, dy, x, *parameters, mean, rstd, nhwc, *outputs)
        else:
            outputs[1].zero_()
        return outputs

    def differentiate(ctx, dy, dmean, drstd):
        saved = ctx.saved_tensors
        _, weight, bias, *_ = saved
        dx, dparameters = run_backward(dy, *saved, ctx.impl)
        dbias, dweight = (cast(dparameters[i], like.dtype) for i, like in enumerate((bias, weight)))
        return dx, dweight, dbias, None, None, None

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
        " -> (Tensor dx, Tensor dparameters)",
        backward,
        _fake_backward,
    )
    library.autograd(op, differentiate, _setup_context)
    dispatch.register(op, dispatch.standard(f"at most {WIDEST} channels and 2**30 positions"))


def _allocate_backward(x):
    return torch.empty_like(x), x.new_empty((2, x.shape[1]), dtype=torch.float32)


def _fake_backward(dy, x, weight, bias, sizes, mean, rstd, impl):
    return _allocate_backward(_dense(x)[0])


def _setup_context(ctx, inputs, output):
    x, weight, bias, sizes, _, ctx.impl = inputs
    ctx.save_for_backward(x, weight, bias, sizes, *output[1:])


def _check(op, x, weight, bias, sizes):
    checks.tensors(op, x=x, weight=weight, bias=bias)
    if x.ndim != 4:
        raise ValueError(f"{op}: x must be (B, C, H, W), got {tuple(x.shape)}")
    if sizes is not None:
        checks.integers(op, x, "x", sizes=sizes)
    row, pairs = (x.shape[1],), (x.shape[0], 2)
    if weight.shape != row or bias.shape != row or (sizes is not None and sizes.shape != pairs):
        expected = {"weight": (weight, row), "bias": (bias, row), "sizes": (sizes, pairs)}
        checks.shapes(op, f"x {tuple(x.shape)}", expected)
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
    """Contiguous float32, sizes int32: what launchers take."""
    return *float32(weight, bias), int32(sizes)


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``tensor.to(dtype)``, without a call of torch where nothing changes."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def float32(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Each as contiguous float32."""
    return [t.contiguous() if t.dtype == torch.float32 else t.float().contiguous() for t in tensors]


def int32(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """``tensor`` as contiguous int32; None stays None."""
    return None if tensor is None else tensor.int().contiguous()
