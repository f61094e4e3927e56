"""Layers that recompute their input in backward."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.kernels import activation_bytes, quantized
from torch._subclasses.fake_tensor import FakeTensorMode

from mimdet.kernels import use
from mimdet.kernels.dispatch import requested
from mimdet.modeling import ConvStem, convolution
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


def stem_gradients(dtype, sizes, **options):
    """Features and gradients of a ConvStem."""
    torch.manual_seed(0)
    stem = ConvStem(embed_dim=32, **options).to(dtype, memory_format=torch.channels_last)
    assert stem.state_dict()["proj.0.0.weight"].shape == (4, 3, 3, 3)
    x = torch.randn(2, 3, 64, 96, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    features = stem(x, sizes)
    sum(f.square().sum() for f in features).backward()
    return [*features, x.grad, *(p.grad for p in stem.parameters())]


@pytest.fixture
def more_channels(monkeypatch):
    """Switches the channels of zeros of images on or off, whatever the device."""
    return lambda on: monkeypatch.setattr(convolution, "_needs_more_channels", lambda x, dtype: on and x.shape[1] == 3)


@pytest.mark.parametrize("packed", [False, True], ids=["canvas", "packed"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("recompute", ["lean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_channels_of_zeros_change_nothing(dtype, recompute, checkpointing, packed, more_channels):
    sizes = torch.tensor([[[32, 48], [9, 7]], [[16, 24], [5, 4]], [[8, 12], [3, 2]], [[4, 6], [2, 1]]]).int()
    results = []
    for on in (False, True):
        more_channels(on)
        options = {"recompute": recompute, "checkpointing": checkpointing}
        results.append(stem_gradients(dtype, sizes if packed else None, **options))
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)
        assert actual.stride() == expected.stride()


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_channels_of_zeros_under_autocast(compiled, more_channels):
    layer, x = narrow()

    def call(layer, x):
        return layer(x)

    def compiled_call(layer, x):
        return torch.compile(layer, backend="aot_eager", fullgraph=True)(x)

    more_channels(False)
    exact = gradients(layer, x, call, dtype=torch.float64)
    same = gradients(layer, x, call, autocast=True)
    more_channels(True)
    actual = gradients(layer, x, compiled_call if compiled else call, autocast=True)
    for name, value in exact.items():
        assert_within_budget(actual[name], same[name], value, x.numel() // x.shape[1], name)


def test_a_convolution_reads_eight_channels(more_channels, monkeypatch):
    seen = []
    plain = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda x, weight, *rest: seen.append((x, weight)) or plain(x, weight, *rest))
    more_channels(True)
    layer, x = narrow()
    with torch.autocast("cpu", BF16), torch.no_grad():
        layer(x)
    ((padded, weight),) = seen
    assert padded.shape == (2, 8, 9, 7)
    assert weight.shape == (8, 8, 3, 3)
    assert padded.dtype == weight.dtype == BF16
    assert padded.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(padded[:, :3], x.to(BF16))
    assert padded[:, 3:].abs().max() == weight[:, 3:].abs().max() == 0


def test_channels_of_zeros_are_for_tensor_cores(monkeypatch):
    with FakeTensorMode():
        on_gpu = torch.empty(2, 3, 8, 8, device="cuda").contiguous(memory_format=torch.channels_last)
        eight = torch.empty(2, 8, 8, 8, device="cuda").contiguous(memory_format=torch.channels_last)
        assert convolution._needs_more_channels(on_gpu, BF16)
        assert convolution._needs_more_channels(on_gpu, torch.float16)
        assert not convolution._needs_more_channels(on_gpu, torch.float32)
        assert not convolution._needs_more_channels(on_gpu.contiguous(), BF16)
        assert not convolution._needs_more_channels(eight, BF16)
        assert not convolution._needs_more_channels(on_gpu.to("cpu"), BF16)
        monkeypatch.setattr(torch.version, "hip", "6.4")
        assert not convolution._needs_more_channels(on_gpu, BF16)
