"""Layers that recompute their input in backward."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.kernels import activation_bytes, quantized

from mimdet.kernels import use
from mimdet.kernels.dispatch import requested
from mimdet.modeling import convolution
from mimdet.modeling.convolution import RecomputeConv2d, weight_gradient
from mimdet.modeling.recompute import Recomputed, RecomputeLinear, checkpointed
from mimdet.testing import assert_within_budget

BF16 = torch.bfloat16


def linear():
    return RecomputeLinear(6, 4), quantized(3, 5, 6)


def stem():
    """A convolution whose weight gradient is a matrix product."""
    x = quantized(2, 16, 9, 7).contiguous(memory_format=torch.channels_last)
    return RecomputeConv2d(16, 8, 3, stride=2, padding=1), x


def narrow():
    """A convolution with too few channels for a matrix product."""
    return RecomputeConv2d(3, 8, 3, stride=2, padding=1), quantized(2, 3, 9, 7)


LAYERS = pytest.mark.parametrize("make_layer", [linear, stem, narrow], ids=lambda f: f.__name__)


def recomputed(source, make=torch.tanh):
    return Recomputed(make(source), make, (source,))


def gradients(layer, x, function, autocast=False, dtype=torch.float32):
    layer, x = copy.deepcopy(layer).to(dtype), x.to(dtype, copy=True).requires_grad_()
    with torch.autocast("cpu", BF16, enabled=autocast):
        y = function(layer, x)
    y.backward(quantized(*y.shape, seed=9).to(y.dtype))
    return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in layer.named_parameters()}}


@LAYERS
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_budget(make_layer, autocast):
    layer, x = make_layer()
    dtype = BF16 if autocast else torch.float32
    operation = {RecomputeLinear: F.linear, RecomputeConv2d: partial(F.conv2d, stride=2, padding=1)}[type(layer)]

    def plain(layer, x, dtype=dtype):
        return operation(torch.tanh(x.to(dtype)), *layer.parameters())

    actual = gradients(layer, x, lambda layer, x: layer(recomputed(x.to(dtype))), autocast)
    same = gradients(layer, x, plain, autocast)
    exact = gradients(layer, x, partial(plain, dtype=torch.float64), dtype=torch.float64)
    for name, value in exact.items():
        assert_within_budget(actual[name], same[name], value, x.numel() // x.shape[1], name)


@LAYERS
def test_keeps_the_source_alone(make_layer):
    layer, x = make_layer()
    x.requires_grad_()
    # tanh would save its output for backward
    assert activation_bytes(lambda: layer(Recomputed(x * 1, lambda x: x * 1, (x,))), layer) == x.nbytes
    assert activation_bytes(lambda: layer(recomputed(x.detach())), layer.requires_grad_(False)) == 0


@LAYERS
def test_writing_into_the_source_is_noticed(make_layer):
    layer, x = make_layer()
    y = layer(recomputed(x))
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@LAYERS
def test_second_order_is_refused(make_layer):
    layer, x = make_layer()
    y = layer(recomputed(x.requires_grad_()))
    (first,) = torch.autograd.grad(y.square().sum(), layer.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@LAYERS
def test_no_gradients_no_recomputation(make_layer):
    layer, x = make_layer()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            y = layer(recomputed(x))
        assert y.grad_fn is None
        torch.testing.assert_close(y, layer(torch.tanh(x)))


@pytest.mark.parametrize("how", ["recomputed", "checkpointed"])
def test_the_kernels_of_forward_serve_backward(how):
    seen = []

    def make(x):
        seen.append(requested())
        return x.tanh()

    layer, x = linear()
    with use("eager"):
        y = layer(recomputed(x, make)) if how == "recomputed" else layer(checkpointed(make, x.requires_grad_()))
    with use("auto"):
        y.sum().backward()
    assert seen == ["eager", "eager"]


@pytest.mark.parametrize("band", [1, 2000, 2**19], ids=["a-row", "some-rows", "whole"])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (3, 1, 1), (5, 3, 2), (3, 2, 0), (1, 1, 0)])
def test_weight_gradient(monkeypatch, band, kernel, stride, padding):
    monkeypatch.setattr(convolution, "_BAND", band)
    for height, width in ((12, 9), (11, 10), (kernel, kernel)):
        x = quantized(2, 5, height, width, dtype=torch.float64)
        weight = quantized(4, 5, kernel, kernel, dtype=torch.float64)
        grad = quantized(*F.conv2d(x, weight, None, stride, padding).shape, dtype=torch.float64, seed=2)
        expected = torch.nn.grad.conv2d_weight(x, weight.shape, grad, stride, padding)
        torch.testing.assert_close(weight_gradient(grad, x, kernel, stride, padding), expected)


def test_convolution_repeats_bitwise():
    layer, x = stem()
    first, second = (gradients(layer, x, lambda layer, x: layer(x)) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
