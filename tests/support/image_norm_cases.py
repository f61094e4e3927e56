"""Inputs and checks of the fused norms of feature maps, for every implementation."""

import importlib
import re

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
    """``actual`` must be within the error budget; what it errs by, as a share of the budget, for each of ``NAMES``."""
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


# Registers per thread: 128 allow 2 programs of 8 warps (4 of 4 warps) on a multiprocessor.
REGISTERS = 128


def check_compiled(op, target, nhwc, run, counts):
    """The kernels that ``run(x, dy, sizes)`` would launch spill nothing and move 16 bytes where they can.

    Args:
        op: the operation.
        target: dtype, (C, H, W), whether there are sizes, and compute capability.
        nhwc: memory is channels_last.
        run: forward and backward by Triton, on maps of two images.
        counts: possible numbers of kernels: sums of one part need none that adds parts up.
    """
    from support.aot import compile_pair

    dtype, shape, has_sizes, capability = target
    memory = torch.channels_last if nhwc else torch.contiguous_format
    x, dy = (torch.empty(2, *shape, dtype=dtype).contiguous(memory_format=memory) for _ in range(2))
    sizes = torch.ones(2, 2, dtype=torch.int32) if has_sizes else None
    kernels = compile_pair(op, capability, lambda: run(x, dy, sizes))
    assert len(kernels) in counts
    # NCHW rows of another length start at any element, and with sizes neighbors in them need not be valid together.
    aligned = shape[0] % 16 == 0 if nhwc else shape[1] * shape[2] % 16 == 0 and not has_sizes
    for one in kernels:
        assert one.stack == 0, one
        assert one.registers <= REGISTERS, one
        if aligned and not re.search("combine|statistics|parts|means", one.name):
            assert one.loads_16, one
            # These kernels write few numbers, no map.
            assert one.stores_16 or "moments" in one.name or "sums" in one.name, one
