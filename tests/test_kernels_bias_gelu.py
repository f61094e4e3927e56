"""bias_gelu: a linear layer's bias and the exact GELU."""

import pytest
import torch
import torch.nn.functional as F
from block_ops import BF16, F32, check_bias_gelu, differentiate
from kernels_testing import layouts, quantised

from mimdet.kernels import KernelUnavailableError
from mimdet.kernels.bias_gelu import ops, reference
from mimdet.kernels.bias_gelu.api import bias_gelu
from mimdet.kernels.registry import can_run_cpp, can_run_cuda, can_run_triton

RUNNERS = {"cpp": (can_run_cpp, "cpu"), "triton": (can_run_triton, "cuda"), "cuda": (can_run_cuda, "cuda")}


@pytest.fixture(params=RUNNERS)
def runner(request):
    can_run, device = RUNNERS[request.param]
    reason = can_run(device, F32)
    if reason:
        pytest.skip(reason)
    return request.param, device


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(5,), (3, 17), (2, 33, 96), (2, 3, 5, 192), (2, 9, 3072)], ids=str)
def test_budget(runner, shape, dtype):
    impl, device = runner
    check_bias_gelu(impl, shape, dtype, device)


@pytest.mark.parametrize("channels", [1, 15, 16, 31, 32, 33, 63, 64, 65, 1023, 1025])
def test_sizes_around_a_vector(runner, channels):
    impl, device = runner
    check_bias_gelu(impl, (67, channels), F32, device)


def test_far_out_values(runner):
    """Where the bell underflows, GELU is 0 or the identity, and its derivative 0 or 1."""
    impl, device = runner
    x = torch.cat([torch.linspace(-60, 60, 4001), torch.tensor([-1e30, -1e4, 1e4, 1e30])]).to(device).unsqueeze(0)
    inputs = {"x": x, "bias": torch.zeros(x.shape[1], device=device)}
    got = differentiate(lambda **kw: bias_gelu(**kw, impl=impl), inputs, [torch.ones_like(x)])
    want = differentiate(lambda x, bias: F.gelu(x + bias), {k: v.double() for k, v in inputs.items()},
                         [torch.ones_like(x).double()])  # fmt: skip
    torch.testing.assert_close(got["output0"].double(), want["output0"], rtol=2e-7, atol=5e-7)
    torch.testing.assert_close(got["grad_x"].double(), want["grad_x"], rtol=2e-7, atol=1e-6)


def test_not_a_number_stays_one(runner):
    impl, device = runner
    y = bias_gelu(torch.tensor([[float("nan"), 1.0]], device=device), torch.zeros(2, device=device), impl=impl)
    assert y.isnan().tolist() == [[True, False]]


@pytest.mark.parametrize("of_gradient", ["contiguous", "transposed", "sliced", "offset", "expanded"])
@pytest.mark.parametrize("of_input", ["contiguous", "transposed", "sliced", "offset"])
def test_layouts(runner, of_input, of_gradient):
    impl, device = runner

    def layout(inputs, gradients):
        (g,) = gradients
        g = g[:, :1].expand(g.shape) if of_gradient == "expanded" else layouts(g)[of_gradient]
        return inputs | {"x": layouts(inputs["x"])[of_input]}, [g]

    check_bias_gelu(impl, (2, 6, 24), F32, device, layout=layout)


def test_bias_in_another_dtype(runner):
    impl, device = runner
    x, bias = quantised(4, 8, dtype=BF16).to(device), quantised(8, dtype=BF16).to(device)
    got = differentiate(lambda **kw: bias_gelu(**kw, impl=impl), {"x": x, "bias": bias}, [torch.ones_like(x)])
    assert got["output0"].dtype == got["grad_x"].dtype == got["grad_bias"].dtype == BF16


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)], ids=["no-rows", "no-tokens"])
def test_empty(runner, shape):
    impl, device = runner
    inputs = {"x": torch.zeros(shape, device=device), "bias": torch.zeros(8, device=device)}
    got = differentiate(lambda **kw: bias_gelu(**kw, impl=impl), inputs, [torch.zeros(shape, device=device)])
    assert got["output0"].shape == shape
    assert got["grad_bias"].eq(0).all()


def test_repeats_bitwise_with_any_number_of_threads(runner):
    impl, device = runner
    inputs = {"x": quantised(1500, 96).to(device), "bias": quantised(96).to(device)}
    gradients = [quantised(1500, 96, seed=3).to(device)]
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(differentiate(lambda **kw: bias_gelu(**kw, impl=impl), inputs, gradients))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


def test_writing_into_the_input_is_noticed(runner):
    impl, device = runner
    x = torch.randn(3, 8, device=device, requires_grad=True) * 1
    y = bias_gelu(x, torch.zeros(8, device=device), impl=impl)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_opcheck(runner):
    impl, device = runner
    x, bias = (t.to(device).requires_grad_() for t in (quantised(6, 16), quantised(16)))
    torch.library.opcheck(torch.ops.mimdet.bias_gelu.default, (x, bias, impl))
    torch.library.opcheck(
        torch.ops.mimdet.bias_gelu_backward.default, (torch.ones_like(x), x.detach(), bias.detach(), impl)
    )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_whole(runner, dynamic):
    impl, device = runner
    inputs = {"x": quantised(3, 6, 32, dtype=BF16).to(device), "bias": quantised(32).to(device)}
    gradients = [quantised(3, 6, 32, dtype=BF16, seed=3).to(device)]

    def function(x, bias):
        return bias_gelu(x, bias, impl=impl)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    want, got = (differentiate(f, inputs, gradients) for f in (function, compiled))
    assert all(torch.equal(got[name], value) for name, value in want.items())


def test_meta_tensors():
    made = ops.run(torch.zeros(2, 8, dtype=BF16, device="meta"), torch.zeros(8, device="meta"), "cpp")
    assert (made.shape, made.dtype) == ((2, 8), BF16)


def test_reference_gradients():
    x, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (4,)))
    assert torch.autograd.gradcheck(reference.bias_gelu, (x, bias))


@pytest.mark.parametrize("fault", ["tanh", "no bias", "dropped tail"])
def test_faults_are_caught(monkeypatch, fault):
    """The comparison itself: each of these wrong kernels must fail it."""

    def wrong(x, bias, impl):
        y = F.gelu(x + (0 if fault == "no bias" else bias), approximate="tanh" if fault == "tanh" else "none")
        if fault == "dropped tail":
            y = torch.cat([y[:, :-1], y[:, -1:] * 0], dim=1)
        return y

    if can_run_cpp("cpu", F32):
        pytest.skip("needs the C++ kernels")
    monkeypatch.setattr(ops, "run", wrong)
    # Without a bias its gradient does not exist, which is noticed first.
    with pytest.raises(AssertionError):
        check_bias_gelu("cpp", (40, 33), F32)


BAD = {
    "integer x": (TypeError, "x must be", {"x": torch.zeros(2, 8, dtype=torch.int64)}),
    "integer bias": (TypeError, "bias must be", {"bias": torch.zeros(8, dtype=torch.int32)}),
    "scalar": (ValueError, "bias must be", {"x": torch.tensor(1.0)}),
    "length": (ValueError, "bias must be", {"bias": torch.zeros(7)}),
    "device": (ValueError, "bias is on meta", {"bias": torch.zeros(8, device="meta")}),
    "double in C++": (KernelUnavailableError, "float64", {"x": torch.zeros(2, 8).double(), "impl": "cpp"}),
    "word": (ValueError, "impl", {"impl": "fast"}),
}


@pytest.mark.parametrize(("error", "message", "change"), BAD.values(), ids=BAD)
def test_bad_input(error, message, change):
    with pytest.raises(error, match=message):
        bias_gelu(**({"x": torch.zeros(2, 8), "bias": torch.zeros(8)} | change))
