"""The Triton kernels of the feature map norms, against plain PyTorch in float64."""

import importlib

import pytest
import torch
from kernels_testing import Guarded, assert_within_budget, quantised

OPS = ("group_norm_gelu", "layer_norm_gelu")
EPS = 1e-6


def functions(op):
    api = importlib.import_module(f"mimdet.kernels.{op}.api")
    reference = importlib.import_module(f"mimdet.kernels.{op}.reference")
    return getattr(api, op), getattr(reference, op)


def forward_backward(function, x, weight, bias, dy, **kwargs):
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves, EPS, **kwargs)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


# Channels around powers of two and of the model; samples of less than one tile, of one more, and of several parts.
SHAPES = [(2, 17, 5, 7), (2, 96, 6, 7), (1, 192, 9, 15), (1, 5, 40, 41), (1, 1000, 2, 5), (1, 1, 1, 9), (3, 64, 8, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("op", OPS)
def test_forward_and_backward_stay_within_the_budget(op, shape, nhwc, dtype):
    if dtype != torch.float32 and shape[1] not in (17, 96):
        pytest.skip("half precision differs in loads and stores alone")
    run, reference = functions(op)
    x, dy = quantised(*shape, dtype=dtype, mean=0.5), quantised(*shape, dtype=dtype, seed=3)
    weight = quantised(shape[1], dtype=dtype, seed=1, mean=1.0, std=0.3)
    bias = quantised(shape[1], dtype=dtype, seed=2, std=0.3)
    if nhwc:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    guards = [Guarded(t) for t in (x, weight, bias, dy)]
    got = forward_backward(run, *(g.tensor for g in guards), impl="triton")
    for guard in guards:
        guard.check()
    same = forward_backward(reference, x, weight, bias, dy)
    exact = forward_backward(reference, *(t.double() for t in (x, weight, bias, dy)))
    for name, g, s, e in zip(("y", "dx", "dweight", "dbias"), got, same, exact, strict=True):
        rows = x.numel() // shape[1] if name in ("dweight", "dbias") else 1
        assert_within_budget(g, s, e, rows, name)
    assert got[0].stride() == x.stride()
    again = forward_backward(run, x, weight, bias, dy, impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("op", OPS)
def test_no_cancellation_far_from_zero(op, nhwc):
    run, reference = functions(op)
    x = quantised(1, 24, 30, 30, mean=1e3, std=0.1)
    x = x.contiguous(memory_format=torch.channels_last) if nhwc else x
    weight, bias = torch.ones(24), torch.zeros(24)
    exact = reference(x.double(), weight.double(), bias.double(), EPS)
    assert_within_budget(run(x, weight, bias, EPS, impl="triton"), reference(x, weight, bias, EPS), exact)


@pytest.mark.parametrize("op", OPS)
def test_empty_batch(op):
    run, _ = functions(op)
    x = torch.zeros(0, 8, 4, 4, requires_grad=True)
    weight, bias = torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)
    run(x, weight, bias, EPS, impl="triton").sum().backward()
    assert not weight.grad.any()
    assert not bias.grad.any()


@pytest.mark.parametrize("op", OPS)
def test_registered_operation(op):
    x = quantised(2, 6, 4, 5).contiguous(memory_format=torch.channels_last)
    leaves = [t.requires_grad_() for t in (x, torch.ones(6), torch.zeros(6))]
    functions(op)
    torch.library.opcheck(getattr(torch.ops.mimdet, op).default, (*leaves, EPS, "triton"))
