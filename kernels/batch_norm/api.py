"""Batch norm over valid cells of one or several processes, with ReLU inside."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from .. import checks, debug, dispatch
from ..image_norm import WIDEST, cast
from ..tensors import is_fake
from . import ops

WEIGHTS = ("cells", "maps", "processes")
_OPTIONAL = ("weight", "bias", "running_mean", "running_var")


def batch_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    num_batches_tracked: torch.Tensor | None = None,
    *,
    training: bool,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    relu: bool = False,
    sizes: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    sync: bool = False,
    weigh: str = "cells",
    impl: str | None = None,
) -> torch.Tensor:
    """Batch norm of feature maps, and ReLU if asked, in one operation.

    Two passes forward and two backward. Several processes exchange 2 * C + 1 numbers forward and add up 2 * C backward.
    Results repeat bitwise, whatever the number of threads, and statistics are the same bits in every process. Only x
    and the statistics are kept for backward; gradients of first order.
    Sources: Ioffe and Szegedy, "Batch Normalization", 2015; Chan, Golub and LeVeque, "Updating Formulae and a Pairwise
    Algorithm for Computing Sample Variances", 1979.

    Args:
        x: (N, C, H, W) floating point. Contiguous and channels_last memory are read as they are, other strides are
            copied first.
        weight, bias: (C,) floating point, or None for ones and zeros.
        running_mean, running_var: (C,) floating point, changed in place when training; or None when training. The
            variance that is kept is unbiased in one process, biased in several. Without a valid cell neither moves.
        num_batches_tracked: () integer or None; counts batches. In one process, a batch without a valid cell is none.
        training: normalize by the statistics of this batch, not by the running ones.
        momentum: share of this batch in the running statistics; None: 1 / num_batches_tracked.
        eps: added to the variance.
        relu: the result is behind a ReLU.
        sizes: (N, 2) int32 or int64 on x's device, rows and columns of each map's valid area, which begins at its top
            left: 0 .. H and 0 .. W (MIMDET_DEBUG_KERNELS=1 checks). Statistics are those of the valid areas alone.
            Whatever x and the gradient hold outside of them, NaN too, is not looked at; result and gradient are zero
            there. None: everything is valid.
        valid: (N,) bool on x's device: which maps are valid at all; None: all of them.
        sync: statistics are those of all processes of the default group, which must all call this; each may have
            another N, 0 too.
        weigh: how much the statistics of a process count: by its valid "cells", by its valid "maps", or all
            "processes" that have a valid cell alike.
        impl: see ``mimdet.kernels.dispatch``.

    Returns:
        (N, C, H, W) in x's dtype and memory format. Statistics and arithmetic are float32 (float64 for float64).

    Raises:
        TypeError: an argument of another dtype.
        ValueError: an argument of another rank, size or device; training on one value a channel; not training without
            running statistics; another word for ``weigh``; while debugging, sizes outside of their range (RuntimeError
            from cpp, always).
        KernelUnavailableError: ``impl`` names what cannot run.
    """
    _check(x, weight, bias, running_mean, running_var, training, sizes, valid, weigh)
    impl = dispatch.resolve(ops.NAME, impl, x.device, (x.dtype,), _too_large(x))
    weight = x.new_ones(x.shape[1]) if weight is None else weight
    bias = x.new_zeros(x.shape[1]) if bias is None else bias
    sizes = _with_valid(x, sizes, valid)
    if not training:
        rstd = (running_var.detach() + eps).rsqrt()
        return _Normalize.apply(x, weight, bias, running_mean.detach(), rstd, None, sizes, relu, False, impl)
    world = dist.get_world_size() if sync and dist.is_available() and dist.is_initialized() else 1
    channels, cells = x.shape[1], x.numel() // max(x.shape[1], 1)
    if world == 1 and sizes is None and cells == 1:
        raise ValueError(f"{ops.NAME}: Expected more than 1 value per channel when training, got x {tuple(x.shape)}")
    # Nothing of what follows requires a gradient.
    parts, cell_weight = _parts(x, ops.moments(x.detach(), sizes, impl), sizes, weigh, world)
    statistics = ops.statistics(parts, eps, world == 1, impl)
    mean, rstd, kept, inverse = statistics.split([channels, channels, channels, 1])
    # Whether there is a valid cell anywhere.
    moved = cells > 0 if world == 1 and sizes is None else inverse.squeeze(0) > 0
    counts = moved if world == 1 else True
    _track(mean, kept, moved, counts, running_mean, running_var, num_batches_tracked, momentum)
    share = inverse if cell_weight is None else inverse * cell_weight
    return _Normalize.apply(x, weight, bias, mean, rstd, share, sizes, relu, world > 1, impl)


def _parts(x, moments, sizes, weigh, world):
    """Moments of all processes (world, 2 * C + 1), by rank, and the weight of one cell of this one; None for 1."""
    if world == 1:
        return moments[None], None
    weight = None
    if weigh == "maps":
        weight = 1 / max(x.shape[2] * x.shape[3], 1)
    elif weigh == "processes":
        cells = max(x.numel() // x.shape[1], 1)
        weight = 1 / cells if sizes is None else 1 / moments[-1].clamp(min=1)
    if weight is not None:
        moments[x.shape[1] :].mul_(weight)
    gathered = moments.new_empty((world, len(moments)))
    if not is_fake(moments):
        dist.all_gather_into_tensor(gathered.view(-1), moments)
    return gathered, weight


def _track(mean, kept, moved, counts, running_mean, running_var, num_batches_tracked, momentum) -> None:
    """Update running statistics in place, unless ``moved``, a bool or a tensor (), is False."""
    if num_batches_tracked is not None:
        num_batches_tracked.add_(int(counts) if isinstance(counts, bool) else counts)
    if running_mean is None:
        return
    if momentum is None:
        momentum = 1 if num_batches_tracked is None else 1 / num_batches_tracked.clamp(min=1)
    step = momentum * moved
    for running, value in ((running_mean, mean), (running_var, kept)):
        kind = running.dtype
        running.lerp_(cast(value, kind), cast(step, kind) if isinstance(step, torch.Tensor) else step)


class _Normalize(torch.autograd.Function):
    """x -> y with given statistics. ``share`` (1,) is that of one valid cell of this process in them.

    The gradient is the one through the statistics too, unless share is None.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean, rstd, share, sizes, relu, sync, impl):
        ctx.save_for_backward(x, weight, bias, mean, rstd, sizes, share)
        ctx.relu, ctx.sync, ctx.impl = relu, sync, impl
        return ops.forward(x, weight, bias, mean, rstd, sizes, relu, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, mean, rstd, sizes, share = ctx.saved_tensors
        sums = ops.sums(dy, x, weight, bias, mean, rstd, sizes, ctx.relu, ctx.impl)
        dx = None
        if share is None:
            means = torch.zeros_like(sums)
        elif ctx.sync:
            means = sums.clone()
            if not is_fake(means):
                dist.all_reduce(means)
            means = means * share
        else:
            means = sums * share
        if ctx.needs_input_grad[0]:
            dx = ops.backward(dy, x, weight, bias, mean, rstd, means, sizes, ctx.relu, ctx.impl)
        return dx, cast(sums[1], weight.dtype), cast(sums[0], bias.dtype), None, None, None, None, None, None, None


def _with_valid(x, sizes, valid):
    """Sizes with those of maps that are not valid zero."""
    if valid is None:
        return sizes
    if sizes is not None:
        return sizes * valid[:, None]
    height, width = x.shape[2:]
    if height == width:
        return (valid * height)[:, None].expand(-1, 2)
    return torch.stack([valid * height, valid * width], dim=1)


def _check(x, weight, bias, running_mean, running_var, training, sizes, valid, weigh):
    op = ops.NAME
    checks.tensors(
        op, _OPTIONAL, x=x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var
    )  # fmt: skip
    if x.ndim != 4:
        raise ValueError(f"{op}: x must be (N, C, H, W), got {tuple(x.shape)}")
    row = (x.shape[1],)
    for tensor in (weight, bias, running_mean, running_var):
        if tensor is not None and tensor.shape != row:
            parameters = zip(_OPTIONAL, (weight, bias, running_mean, running_var), strict=True)
            checks.shapes(op, f"x {tuple(x.shape)}", {name: (value, row) for name, value in parameters})
    if sizes is not None:
        checks.integers(op, x, "x", sizes=sizes)
        checks.shapes(op, f"x {tuple(x.shape)}", {"sizes": (sizes, (x.shape[0], 2))})
    if valid is not None:
        checks.booleans(op, x, "x", valid=valid)
        checks.shapes(op, f"x {tuple(x.shape)}", {"valid": (valid, (x.shape[0],))})
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{op}: running_mean and running_var must both be given, or neither")
    if not training and running_mean is None:
        raise ValueError(f"{op}: without training, running_mean and running_var must be given")
    if weigh not in WEIGHTS:
        raise ValueError(f"{op}: weigh must be one of {', '.join(WEIGHTS)}, got {weigh!r}")
    if sizes is not None and debug.enabled():
        debug.check_sizes(sizes, x.shape[2:], f"{op}: sizes", least=0)


def _too_large(x):
    if x.shape[1] > WIDEST:
        return f"it takes at most {WIDEST} channels, got {x.shape[1]} (use eager)"
    if x.shape[0] * x.shape[2] * x.shape[3] > ops.MOST_CELLS:
        return f"it takes at most 2**30 positions, got {x.shape[0]} x {x.shape[2]} x {x.shape[3]} (use eager)"
    return None
