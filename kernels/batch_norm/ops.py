"""The steps of batch norm, each an operation under ``mimdet::``: ``batch_norm_moments``, ``batch_norm_statistics``,
``batch_norm``, ``batch_norm_sums`` and ``batch_norm_backward``. Processes exchange what the first and the fourth find.
What each computes is in ``reference``.

Maps are (N, C, H, W); ``sizes`` (N, 2) are the rows and columns of the valid area at the top left of each, 0 .. H and
0 .. W, or None: all of them. Parameters and statistics are float32 (C,).
"""

from __future__ import annotations

from functools import wraps

import torch

from .. import dispatch, library
from ..image_norm import WIDEST, float32, int32
from . import reference

NAME = "batch_norm"
# The most cells of a batch that the GPU kernels count in int32.
MOST_CELLS = 2**30


def _dense(x):
    """x without gaps, and whether its memory is (N, H, W, C) rather than (N, C, H, W)."""
    dense = x.is_contiguous()
    nhwc = x.is_contiguous(memory_format=torch.channels_last) and not (dense and x.shape[2:] != (1, 1))
    nhwc |= x.stride(1) == 1 and not dense
    return x.contiguous(memory_format=_memory(nhwc)), nhwc


def _memory(nhwc):
    return torch.channels_last if nhwc else torch.contiguous_format


def _like_x(x, *rest):
    return torch.empty_like(_dense(x)[0])


def _step(name, arguments, fake):
    """Decorator: registers a step under ``mimdet::``; "eager" is the function of ``reference`` that has its name."""

    def decorate(run):
        registered = library.define(name, f"({arguments}, str impl) -> Tensor", run, fake)
        eager = getattr(reference, run.__name__)

        @wraps(run)
        def step(*arguments):
            return eager(*arguments[:-1]) if arguments[-1] == "eager" else registered(*arguments)

        return step

    return decorate


_PARAMETERS = "Tensor weight, Tensor bias, Tensor mean, Tensor rstd"
_REST = "Tensor? sizes, bool relu"


def _allocate_moments(x, *rest):
    return x.new_empty((2 * x.shape[1] + 1,), dtype=torch.float32)


@_step("batch_norm_moments", "Tensor x, Tensor? sizes", _allocate_moments)
def moments(x, sizes, impl):
    x, nhwc = _dense(x)
    output = _allocate_moments(x)
    if not x.numel():
        return output.zero_()
    library.launch("batch_norm_moments", impl, x, int32(sizes), nhwc, output)
    return output


def _allocate_statistics(parts, *rest):
    return parts.new_empty((parts.shape[1] // 2 * 3 + 1,))


@_step("batch_norm_statistics", "Tensor parts, float eps, bool unbiased", _allocate_statistics)
def statistics(parts, eps, unbiased, impl):
    outputs = _allocate_statistics(parts)
    library.launch("batch_norm_statistics", impl, parts.contiguous(), eps, unbiased, outputs)
    return outputs


@_step(NAME, f"Tensor x, {_PARAMETERS}, {_REST}", _like_x)
def forward(x, weight, bias, mean, rstd, sizes, relu, impl):
    x, nhwc = _dense(x)
    y = torch.empty_like(x)
    if x.numel():
        parameters = float32(weight, bias, mean, rstd)
        library.launch("batch_norm_fwd", impl, x, *parameters, int32(sizes), relu, nhwc, y)
    return y


def _allocate_sums(x, *rest):
    return x.new_empty((2, x.shape[1]), dtype=torch.float32)


@_step("batch_norm_sums", f"Tensor dy, Tensor x, {_PARAMETERS}, {_REST}", _allocate_sums)
def sums(dy, x, weight, bias, mean, rstd, sizes, relu, impl):
    x, nhwc = _dense(x)
    output = _allocate_sums(x)
    if not x.numel():
        return output.zero_()
    dy, parameters = dy.contiguous(memory_format=_memory(nhwc)), float32(weight, bias, mean, rstd)
    library.launch("batch_norm_sums", impl, dy, x, *parameters, int32(sizes), relu, nhwc, output)
    return output


@_step(
    "batch_norm_backward",
    f"Tensor dy, Tensor x, {_PARAMETERS}, Tensor means, {_REST}",
    lambda dy, *rest: _like_x(*rest),
)
def backward(dy, x, weight, bias, mean, rstd, means, sizes, relu, impl):
    x, nhwc = _dense(x)
    dx = torch.empty_like(x)
    if x.numel():
        dy, parameters = dy.contiguous(memory_format=_memory(nhwc)), float32(weight, bias, mean, rstd, means)
        library.launch("batch_norm_bwd", impl, dy, x, *parameters, int32(sizes), relu, nhwc, dx)
    return dx


dispatch.register(NAME, dispatch.standard(f"at most {WIDEST} channels and 2**30 positions"))
