"""The fused norms of feature maps, on CPU: the same numbers as plain PyTorch, whatever comes in."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from kernels_testing import Guarded, assert_within_budget, layouts, poisoned_allocations, quantised
from torch.utils.checkpoint import checkpoint

from mimdet.kernels import registry

OPS = ("group_norm_gelu", "layer_norm_gelu")
EPS = 1e-6
GRADS = ("dx", "dweight", "dbias")


def api(op):
    return getattr(importlib.import_module(f"mimdet.kernels.{op}.api"), op)


def reference(op):
    return getattr(importlib.import_module(f"mimdet.kernels.{op}.reference"), op)


@pytest.fixture(params=OPS)
def op(request):
    return request.param


@pytest.fixture(autouse=True)
def _needs_cpp():
    importlib.import_module("mimdet.kernels.group_norm_gelu.ops")
    reason = registry.can_run_cpp("cpu", torch.float32)
    if reason:
        pytest.skip(reason)
    with poisoned_allocations():
        yield


def inputs(shape, dtype=torch.float32, mean=0.5, std=1.0, affine=None):
    x = quantised(*shape, dtype=dtype, mean=mean, std=std)
    channels = shape[1]
    weight = quantised(channels, dtype=affine or dtype, seed=1, mean=1.0, std=0.3)
    bias = quantised(channels, dtype=affine or dtype, seed=2, std=0.3)
    return x, weight, bias, quantised(*shape, dtype=dtype, seed=3)


def forward_backward(function, x, weight, bias, dy, **kwargs):
    x, weight, bias = (
        t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight, bias)
    )
    y = function(x, weight, bias, EPS, **kwargs)
    return [y.detach(), *torch.autograd.grad(y, (x, weight, bias), dy)]


def judge(op, got, x, weight, bias, dy):
    same = forward_backward(reference(op), x, weight.to(x.dtype), bias.to(x.dtype), dy)
    exact = forward_backward(reference(op), *(t.double() for t in (x, weight, bias, dy)))
    rows = x.numel() // x.shape[1]
    for name, g, s, e in zip(("y", *GRADS), got, same, exact, strict=True):
        summed = name in ("dweight", "dbias")
        assert_within_budget(g, s.to(g.dtype), e, rows if summed and g.dtype == torch.float32 else 1, name)


SHAPES = [
    (2, 17, 5, 7),
    (2, 96, 24, 16),
    (1, 192, 31, 33),
    (3, 384, 8, 8),
    (1, 1000, 3, 5),
    (2, 3, 64, 65),
    (1, 1, 1, 9),
]


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_forward_and_backward_stay_within_the_budget(op, shape, dtype, channels_last):
    x, weight, bias, dy = inputs(shape, dtype)
    memory = torch.channels_last if channels_last else torch.contiguous_format
    x, dy = x.contiguous(memory_format=memory), dy.contiguous(memory_format=memory)
    got = forward_backward(api(op), x, weight, bias, dy, impl="cpp")
    judge(op, got, x, weight, bias, dy)
    assert got[0].stride() == x.stride()
    assert got[1].stride() == x.stride()


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("positions", [31, 32, 33, 1023, 1024, 1025])
def test_sizes_around_a_tile_touch_nothing_else(op, positions, channels_last):
    x, weight, bias, dy = inputs((2, 33, 1, positions))
    if channels_last:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    guards = [Guarded(t) for t in (x, weight, bias, dy)]
    got = forward_backward(api(op), *(g.tensor for g in guards), impl="cpp")
    for guard in guards:
        guard.check()
    judge(op, got, x, weight, bias, dy)


@pytest.mark.parametrize("grad", ["contiguous", "channels_last", "transposed", "sliced", "offset", "expanded"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced", "offset"])
def test_any_strides_of_input_and_gradient(op, layout, grad):
    x, weight, bias, dy = inputs((2, 6, 4, 5))
    dy = torch.ones(1, 6, 1, 1).expand(2, 6, 4, 5) if grad == "expanded" else layouts(dy)[grad]
    expected = forward_backward(reference(op), x, weight, bias, dy)
    leaf = layouts(x)[layout].requires_grad_()
    w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    y = api(op)(leaf, w, b, EPS, impl="cpp")
    got = [y.detach(), *torch.autograd.grad(y, (leaf, w, b), dy)]
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, atol=1e-5, rtol=1e-5)


def test_no_cancellation_far_from_zero(op):
    x, weight, bias, dy = inputs((1, 96, 64, 64), mean=1e3, std=0.1)
    got = forward_backward(api(op), x, weight, bias, dy, impl="cpp")
    judge(op, got, x, weight, bias, dy)


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)], ids=str)
def test_empty_inputs(op, shape):
    x, weight, bias, dy = inputs(shape)
    y, dx, dweight, dbias = forward_backward(api(op), x, weight, bias, dy, impl="cpp")
    assert y.shape == dx.shape == shape
    assert not dweight.any()
    assert not dbias.any()


def test_nan_goes_through_and_stays_in_its_sample(op):
    x, weight, bias, _ = inputs((2, 8, 4, 4))
    x[1, 2, 3, 3] = float("nan")
    y = api(op)(x, weight, bias, EPS, impl="cpp")
    assert y[1, :, 3, 3].isnan().all()
    assert torch.isfinite(y[0]).all()


def test_repeats_bitwise_on_any_number_of_threads(op):
    x, weight, bias, dy = inputs((2, 96, 40, 40))
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(forward_backward(api(op), x, weight, bias, dy, impl="cpp"))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_changing_the_input_in_place_is_noticed(op):
    x, weight, bias, dy = inputs((2, 8, 4, 4))
    x.requires_grad_()
    inner = x * 1
    y = api(op)(inner, weight, bias, EPS, impl="cpp")
    inner.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_opcheck(op, channels_last):
    x, weight, bias, _ = inputs((2, 6, 4, 5))
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    arguments = [t.requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(getattr(torch.ops.mimdet, op).default, (*arguments, EPS, "cpp"))


@pytest.mark.parametrize("impl", ["cpp", "eager"])
def test_compiles_whole_with_equal_results(op, impl):
    run = api(op)

    def function(x, weight, bias):
        return run(x * 2, weight, bias, EPS, impl=impl) + 1

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for shape in ((2, 6, 4, 5), (3, 6, 7, 5)):
        x, weight, bias, dy = inputs(shape)
        x = x.contiguous(memory_format=torch.channels_last)
        runs = []
        for f in (function, compiled):
            leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
            y = f(*leaves)
            runs.append([y, *torch.autograd.grad(y, leaves, dy)])
        for eager, whole in zip(*runs, strict=True):
            torch.testing.assert_close(whole, eager, atol=1e-5, rtol=1e-5)


def test_float32_parameters_under_bfloat16_autocast(op):
    x, weight, bias, dy = inputs((2, 8, 6, 6), torch.bfloat16, affine=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = forward_backward(api(op), x, weight, bias, dy, impl="cpp")
    assert [t.dtype for t in got] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    judge(op, got, x, weight, bias, dy)


def test_checkpointing_gives_the_same_gradients(op):
    x, weight, bias, dy = inputs((2, 8, 6, 6))
    plain = forward_backward(api(op), x, weight, bias, dy, impl="cpp")

    def recomputed(*args, **kwargs):
        return checkpoint(api(op), *args, use_reentrant=False, **kwargs)

    again = forward_backward(recomputed, x, weight, bias, dy, impl="cpp")
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_meta_tensors_keep_shape_and_strides(op):
    x, weight, bias, _ = inputs((2, 8, 6, 6))
    x = x.contiguous(memory_format=torch.channels_last)
    y = getattr(torch.ops.mimdet, op)(x.to("meta"), weight.to("meta"), bias.to("meta"), EPS, "cpp")[0]
    assert (y.shape, y.stride(), y.device.type) == (x.shape, x.stride(), "meta")


def test_reference_gradients(op):
    x, weight, bias, _ = inputs((2, 5, 3, 3), torch.float64)
    torch.autograd.gradcheck(
        lambda *a: reference(op)(*a, EPS), [t.requires_grad_() for t in (x, weight, bias)], check_batched_grad=False
    )


BAD = {
    "rank 3": (lambda x, w, b: (x[0], w, b), ValueError, r"x must be \(B, C, H, W\)"),
    "rank 2": (lambda x, w, b: (x[0, 0], w, b), ValueError, r"x must be \(B, C, H, W\)"),
    "integers": (lambda x, w, b: (x.long(), w, b), TypeError, "x must be a floating point"),
    "weight size": (lambda x, w, b: (x, w[:-1], b), ValueError, r"weight must be \(8,\)"),
    "bias rank": (lambda x, w, b: (x, w, b[None]), ValueError, r"bias must be \(8,\)"),
    "no bias": (lambda x, w, b: (x, w, None), TypeError, "bias must be a floating point"),
    "device": (lambda x, w, b: (x, w.to("meta"), b), ValueError, "weight is on meta, x on cpu"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(op, case):
    spoil, error, message = BAD[case]
    x, weight, bias, _ = inputs((2, 8, 4, 4))
    with pytest.raises(error, match=message):
        api(op)(*spoil(x, weight, bias), EPS, impl="cpp")


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_older_processors(op, isa):
    if "MIMDET_CPU_ISA" in os.environ:
        pytest.skip("already asked for")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", __file__]
    command += ["-k", f"{op} and (budget or around_a_tile or cancellation)"]
    done = subprocess.run(command, env={**os.environ, "MIMDET_CPU_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
