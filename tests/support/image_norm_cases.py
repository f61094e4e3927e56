"""Inputs and checks of the fused norms of feature maps, for every implementation."""

import importlib

import torch
from support.kernels import quantized

from mimdet import kernels
from mimdet.testing import assert_within_budget

OPS = ("group_norm_gelu", "layer_norm_gelu")
EPS = 1e-6
NAMES = ("y", "dx", "dweight", "dbias")


def api(op):
    return getattr(kernels, op)


def reference(op):
    return getattr(importlib.import_module(f"mimdet.kernels.{op}.reference"), op)


def inputs(shape, dtype=torch.float32, nhwc=False, mean=0.5, std=1.0, affine=None):
    """x, weight, bias and the gradient of y."""
    memory = torch.channels_last if nhwc else torch.contiguous_format
    x = quantized(*shape, dtype=dtype, mean=mean, std=std).contiguous(memory_format=memory)
    dy = quantized(*shape, dtype=dtype, seed=3).contiguous(memory_format=memory)
    weight = quantized(shape[1], dtype=affine or dtype, seed=1, mean=1.0, std=0.3)
    bias = quantized(shape[1], dtype=affine or dtype, seed=2, std=0.3)
    return x, weight, bias, dy


def forward_backward(function, x, weight, bias, dy, eps=EPS, **kwargs):
    """[y, dx, dweight, dbias]."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves, eps, **kwargs)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def cropped(function, x, weight, bias, dy, sizes):
    """``forward_backward`` of each sample's valid area alone, zero elsewhere."""
    total = [torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(weight), torch.zeros_like(bias)]
    for i, (rows, columns) in enumerate(sizes.tolist()):
        area = slice(i, i + 1), slice(None), slice(rows), slice(columns)
        y, dx, dweight, dbias = forward_backward(function, x[area], weight, bias, dy[area])
        total[0][area], total[1][area] = y, dx
        total[2] += dweight
        total[3] += dbias
    return total


def judge(op, actual, x, weight, bias, dy, sizes=None):
    """``got`` must be within the error budget; what it errs by, as a share of the budget, for each of ``NAMES``."""
    run = forward_backward if sizes is None else cropped
    more = () if sizes is None else (sizes,)
    same = run(reference(op), x, weight.to(x.dtype), bias.to(x.dtype), dy, *more)
    exact = run(reference(op), *(t.double() for t in (x, weight, bias, dy)), *more)
    terms = x.numel() // x.shape[1]
    shares = {}
    for name, g, s, e in zip(NAMES, actual, same, exact, strict=True):
        reduction = terms if name in NAMES[2:] and g.dtype == torch.float32 else 1
        shares[name] = assert_within_budget(g, s.to(g.dtype), e, reduction, name)
    return shares


def check_sizes(impl, op, shape, sizes, dtype, nhwc, index=torch.int32):
    """Each sample gets what its valid area gets alone; NaN in the padding of x and of the gradient leaks nowhere."""
    x, weight, bias, dy = inputs(shape, dtype, nhwc)
    sizes = torch.tensor(sizes, dtype=index)
    padding = torch.ones(shape, dtype=torch.bool)
    for i, (rows, columns) in enumerate(sizes.tolist()):
        padding[i, :, :rows, :columns] = False
    x, dy = x.masked_fill(padding, float("nan")), dy.masked_fill(padding, float("nan"))
    actual = forward_backward(api(op), x, weight, bias, dy, sizes=sizes, impl=impl)
    for map_ in actual[:2]:
        assert not map_[padding].any(), "the padding is not zero"
        assert map_.stride() == x.stride()
    return judge(op, actual, x, weight, bias, dy, sizes)
