"""The steps of batch norm, each an operation under ``mimdet::``: ``batch_norm_moments``, ``batch_norm_statistics``,
``batch_norm``, ``batch_norm_sums`` and ``batch_norm_backward``. Processes exchange what the first and the fourth find.
What each computes is in ``reference``.

Maps are (N, C, H, W); ``sizes`` (N, 2) are the rows and columns of the valid area at the top left of each, 0 .. H and
0 .. W, or None: all of them. Parameters and statistics are float32 (C,).
"""

from __future__ import annotations

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


def _allocate_moments(x):
    return x.new_empty((2 * x.shape[1] + 1,), dtype=torch.float32)


def _run_moments(x, sizes, impl):
    x, nhwc = _dense(x)
    moments = _allocate_moments(x)
    if not x.numel():
        return moments.zero_()
    library.launch("batch_norm_moments", impl, x, int32(sizes), nhwc, moments)
    return moments


def _allocate_statistics(parts):
    return parts.new_empty((parts.shape[1] // 2 * 3 + 1,))


def _run_statistics(parts, eps, unbiased, impl):
    outputs = _allocate_statistics(parts)
    library.launch("batch_norm_statistics", impl, parts.contiguous(), eps, unbiased, outputs)
    return outputs


def _run_forward(x, weight, bias, mean, rstd, sizes, relu, impl):
    x, nhwc = _dense(x)
    y = torch.empty_like(x)
    if x.numel():
        parameters = float32(weight, bias, mean, rstd)
        library.launch("batch_norm_fwd", impl, x, *parameters, int32(sizes), relu, nhwc, y)
    return y


def _allocate_sums(x):
    return x.new_empty((2, x.shape[1]), dtype=torch.float32)


def _run_sums(dy, x, weight, bias, mean, rstd, sizes, relu, impl):
    x, nhwc = _dense(x)
    sums = _allocate_sums(x)
    if not x.numel():
        return sums.zero_()
    dy, parameters = dy.contiguous(memory_format=_memory(nhwc)), float32(weight, bias, mean, rstd)
    library.launch("batch_norm_sums", impl, dy, x, *parameters, int32(sizes), relu, nhwc, sums)
    return sums


def _run_backward(dy, x, weight, bias, mean, rstd, means, sizes, relu, impl):
    x, nhwc = _dense(x)
    dx = torch.empty_like(x)
    if x.numel():
        dy, parameters = dy.contiguous(memory_format=_memory(nhwc)), float32(weight, bias, mean, rstd, means)
        library.launch("batch_norm_bwd", impl, dy, x, *parameters, int32(sizes), relu, nhwc, dx)
    return dx


def _like_x(x):
    return torch.empty_like(_dense(x)[0])


def _step(name, arguments, eager, run, fake):
    """Register a step, computed by plain PyTorch too; return what takes its arguments and the implementation."""
    registered = library.define(name, f"({arguments}, str impl) -> Tensor", run, fake)

    def call(*arguments):
        return eager(*arguments[:-1]) if arguments[-1] == "eager" else registered(*arguments)

    return call


_PARAMETERS = "Tensor weight, Tensor bias, Tensor mean, Tensor rstd"
_REST = "Tensor? sizes, bool relu"

moments = _step(
    "batch_norm_moments",
    "Tensor x, Tensor? sizes",
    reference.moments,
    _run_moments,
    lambda x, *rest: _allocate_moments(x),
)
statistics = _step(
    "batch_norm_statistics",
    "Tensor parts, float eps, bool unbiased",
    reference.statistics,
    _run_statistics,
    lambda parts, *rest: _allocate_statistics(parts),
)
forward = _step(NAME, f"Tensor x, {_PARAMETERS}, {_REST}", reference.forward, _run_forward, lambda x, *rest: _like_x(x))
sums = _step(
    "batch_norm_sums",
    f"Tensor dy, Tensor x, {_PARAMETERS}, {_REST}",
    reference.sums,
    _run_sums,
    lambda dy, x, *rest: _allocate_sums(x),
)
backward = _step(
    "batch_norm_backward",
    f"Tensor dy, Tensor x, {_PARAMETERS}, Tensor means, {_REST}",
    reference.backward,
    _run_backward,
    lambda dy, x, *rest: _like_x(x),
)

dispatch.register(NAME, dispatch.standard(f"at most {WIDEST} channels and 2**30 positions"))
