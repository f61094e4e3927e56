"""add_layer_norm: residual addition with drop path, and LayerNorm."""

import pytest
import torch
import torch.nn.functional as F
from block_ops import DTYPES, F32, add_layer_norm_inputs, check_add_layer_norm, differentiate
from kernels_testing import layouts

from mimdet.kernels import KernelUnavailableError
from mimdet.kernels.add_layer_norm import ops, reference
from mimdet.kernels.add_layer_norm.api import add_layer_norm
from mimdet.kernels.registry import can_run_cpp, can_run_cuda, can_run_triton

RUNNERS = {"cpp": (can_run_cpp, "cpu"), "triton": (can_run_triton, "cuda"), "cuda": (can_run_cuda, "cuda")}


@pytest.fixture(params=RUNNERS)
def runner(request):
    can_run, device = RUNNERS[request.param]
    reason = can_run(device, F32)
    if reason:
        pytest.skip(reason)
    return request.param, device


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(3, 7, 17), (2, 33, 96), (3, 5, 192), (2, 9, 768), (1, 3, 1000)], ids=str)
@pytest.mark.parametrize("kind", ["scaled", "unscaled", "alone"])
def test_budget(runner, dtypes, shape, kind):
    impl, device = runner
    check_add_layer_norm(impl, shape, dtypes, device, branch=kind != "alone", scale=kind == "scaled")


@pytest.mark.parametrize("channels", [1, 15, 16, 31, 32, 33, 63, 64, 65, 1023, 1025])
def test_sizes_around_a_vector(runner, channels):
    impl, device = runner
    check_add_layer_norm(impl, (2, 3, channels), DTYPES["fp32"], device, eps=1e-3)


@pytest.mark.parametrize("shape", [(5, 48), (3, 7, 48), (2, 3, 5, 48)], ids=["2d", "3d", "4d"])
def test_any_rank(runner, shape):
    impl, device = runner
    inputs, gradients = add_layer_norm_inputs(shape, DTYPES["fp32"])
    inputs, gradients = {k: v.to(device) for k, v in inputs.items()}, [g.to(device) for g in gradients]
    got = differentiate(lambda **kw: add_layer_norm(**kw, impl=impl), inputs, gradients)
    plain = inputs["r"] + inputs["scale"].view(-1, *[1] * (len(shape) - 1)) * inputs["branch"]
    torch.testing.assert_close(got["output0"], plain)
    torch.testing.assert_close(got["output1"], F.layer_norm(plain, shape[-1:], inputs["weight"], inputs["bias"]))
    assert got["grad_r"].shape == shape


@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["only-sum", "only-norm"])
@pytest.mark.parametrize("scale", [True, False], ids=["scaled", "unscaled"])
def test_one_output_used(runner, used, scale):
    impl, device = runner
    check_add_layer_norm(impl, (3, 4, 40), DTYPES["amp"], device, used=used, scale=scale)


@pytest.mark.parametrize("of_gradient", ["contiguous", "transposed", "sliced", "offset", "expanded"])
@pytest.mark.parametrize("of_input", ["contiguous", "transposed", "sliced", "offset", "mixed"])
def test_layouts(runner, of_input, of_gradient):
    impl, device = runner

    def layout(inputs, gradients):
        names = ["transposed", "sliced"] if of_input == "mixed" else [of_input] * 2
        changed = {k: layouts(inputs[k])[n] for k, n in zip(("r", "branch"), names, strict=True)}
        if of_gradient == "expanded":
            return inputs | changed, [g[:, :1].expand(g.shape) for g in gradients]
        return inputs | changed, [layouts(g)[of_gradient] for g in gradients]

    check_add_layer_norm(impl, (2, 6, 24), DTYPES["fp32"], device, layout=layout)


def test_large_mean_and_small_deviation(runner):
    """A variance computed as E[x^2] - E[x]^2 would be noise here."""
    impl, device = runner
    check_add_layer_norm(impl, (2, 4, 1024), DTYPES["fp32"], device, branch=False, mean=1e3, std=0.1)


def test_many_rows_make_uneven_chunks(runner):
    impl, device = runner
    check_add_layer_norm(impl, (3, 2051, 8), DTYPES["fp32"], device)


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)], ids=["no-samples", "no-tokens"])
def test_empty(runner, shape):
    impl, device = runner
    inputs, gradients = add_layer_norm_inputs(shape, DTYPES["fp32"])
    inputs, gradients = {k: v.to(device) for k, v in inputs.items()}, [g.to(device) for g in gradients]
    got = differentiate(lambda **kw: add_layer_norm(**kw, impl=impl), inputs, gradients)
    assert got["output1"].shape == shape
    assert got["grad_weight"].eq(0).all()


def test_repeats_bitwise_with_any_number_of_threads(runner):
    impl, device = runner
    inputs, gradients = add_layer_norm_inputs((3, 500, 96), DTYPES["amp"])
    inputs, gradients = {k: v.to(device) for k, v in inputs.items()}, [g.to(device) for g in gradients]
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(differentiate(lambda **kw: add_layer_norm(**kw, dtype=torch.bfloat16, impl=impl),
                                         inputs, gradients))  # fmt: skip
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


def test_writing_into_the_sum_is_noticed(runner):
    impl, device = runner
    inputs, _ = add_layer_norm_inputs((2, 3, 16), DTYPES["fp32"])
    inputs = {k: v.to(device) for k, v in inputs.items()}
    inputs["r"].requires_grad_()
    r_new, y = add_layer_norm(**inputs, impl=impl)
    r_new.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dtypes", [DTYPES["fp32"], DTYPES["amp"]], ids=["fp32", "amp"])
@pytest.mark.parametrize("kind", ["scaled", "unscaled", "alone"])
def test_opcheck(runner, dtypes, kind):
    impl, device = runner
    inputs, (grad_r, grad_y) = add_layer_norm_inputs((2, 3, 16), dtypes, branch=kind != "alone", scale=kind == "scaled")
    r, branch, scale, weight, bias = (t if t is None else t.to(device) for t in inputs.values())
    for tensor in (r, branch, weight, bias):
        if tensor is not None:
            tensor.requires_grad_()
    torch.library.opcheck(
        torch.ops.mimdet.add_layer_norm.default, (r, branch, scale, weight, bias, 1e-6, dtypes[2], impl)
    )
    statistics = [torch.rand(2, 3, device=device) for _ in range(2)]
    arguments = (grad_r.to(device), grad_y.to(device), r.detach(), *statistics, scale, weight.detach())
    torch.library.opcheck(
        torch.ops.mimdet.add_layer_norm_backward.default, (*arguments, None if branch is None else branch.dtype, impl)
    )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_whole(runner, dynamic):
    impl, device = runner
    inputs, gradients = add_layer_norm_inputs((2, 6, 32), DTYPES["amp"])
    inputs, gradients = {k: v.to(device) for k, v in inputs.items()}, [g.to(device) for g in gradients]

    def function(**kw):
        return add_layer_norm(**kw, eps=1e-6, dtype=torch.bfloat16, impl=impl)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    want, got = (differentiate(f, inputs, gradients) for f in (function, compiled))
    assert all(torch.equal(got[name], value) for name, value in want.items())


def test_meta_tensors():
    inputs, _ = add_layer_norm_inputs((2, 3, 16), DTYPES["amp"])
    made = ops.run(*(t.to("meta") for t in inputs.values()), 1e-6, torch.bfloat16, "cpp")
    assert [(tuple(t.shape), t.dtype) for t in made] == [
        ((2, 3, 16), F32), ((2, 3, 16), torch.bfloat16), ((2, 3), F32), ((2, 3), F32)
    ]  # fmt: skip


def test_reference_gradients():
    inputs, _ = add_layer_norm_inputs((2, 3, 5), [torch.float64] * 3)
    r, branch, scale, weight, bias = (t.double() for t in inputs.values())
    leaves = [t.requires_grad_() for t in (r, branch, weight, bias)]

    def function(r, branch, weight, bias):
        return reference.add_layer_norm(r, branch, scale, weight, bias, 1e-5, torch.float64)

    assert torch.autograd.gradcheck(function, leaves)


FAULTS = {
    "eps": lambda r, branch, scale, weight, bias, eps, dtype: (r, branch, scale, weight, bias, eps * 3, dtype),
    "scale forgotten": lambda r, branch, scale, *rest: (r, branch, None, *rest),
    "weight forgotten": lambda r, branch, scale, weight, *rest: (r, branch, scale, torch.ones_like(weight), *rest),
}


@pytest.mark.parametrize("fault", [*FAULTS, "dropped tail", "first chunk only"])
def test_faults_are_caught(monkeypatch, fault):
    """The comparison itself: each of these wrong kernels must fail it."""
    if can_run_cpp("cpu", F32):
        pytest.skip("needs the C++ kernels")
    right, right_backward = ops._run, ops.run_backward
    if fault in FAULTS:
        replacement = lambda *a: right(*FAULTS[fault](*a[:-1]), a[-1])  # noqa: E731
    elif fault == "dropped tail":

        def replacement(*arguments):
            r_new, y, mean, rstd = right(*arguments)
            y[..., -1] = 0
            return r_new, y, mean, rstd

    else:
        replacement = right
        monkeypatch.setattr(
            ops, "run_backward",
            lambda gr, gy, *rest: (*right_backward(gr, gy, *rest)[:3], gy[:1].float().sum((0, 1))),
        )  # fmt: skip

    class Faulty(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = replacement(*inputs)
            ops._setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *gradients):
            return ops._backward(ctx, *gradients)

    monkeypatch.setattr(ops, "run", Faulty.apply)
    with pytest.raises(AssertionError, match="budget"):
        check_add_layer_norm("cpp", (4, 5, 33), DTYPES["fp32"], eps=1e-2)


BAD = {
    "integer r": (TypeError, "r must be", {"r": torch.zeros(2, 3, 8, dtype=torch.int64)}),
    "rank": (ValueError, "r must be", {"r": torch.zeros(8)}),
    "branch shape": (ValueError, "branch must be", {"branch": torch.zeros(2, 4, 8)}),
    "scale length": (ValueError, "scale must be", {"scale": torch.ones(3)}),
    "scale gradient": (ValueError, "scale has no gradient", {"scale": torch.ones(2, requires_grad=True)}),
    "scale alone": (ValueError, "scale without", {"branch": None}),
    "weight length": (ValueError, "weight must be", {"weight": torch.ones(7)}),
    "bias length": (ValueError, "bias must be", {"bias": torch.ones(9)}),
    "device": (ValueError, "weight is on meta", {"weight": torch.ones(8, device="meta")}),
    "dtype": (TypeError, "dtype must be", {"dtype": torch.int32}),
    "double in C++": (KernelUnavailableError, "float64", {"r": torch.zeros(2, 3, 8).double(), "impl": "cpp"}),
    "half branch in C++": (KernelUnavailableError, "float16", {"branch": torch.zeros(2, 3, 8).half(), "impl": "cpp"}),
    "word": (ValueError, "impl", {"impl": "fast"}),
}


@pytest.mark.parametrize(("error", "message", "change"), BAD.values(), ids=BAD)
def test_bad_input(error, message, change):
    good = {"r": torch.zeros(2, 3, 8), "branch": torch.zeros(2, 3, 8), "scale": torch.ones(2)}
    good |= {"weight": torch.ones(8), "bias": torch.zeros(8)}
    with pytest.raises(error, match=message):
        add_layer_norm(**(good | change))


def test_auto_takes_what_no_kernel_takes():
    r = torch.randn(2, 3, 8, dtype=torch.float64)
    r_new, y = add_layer_norm(r, r.half(), None, torch.ones(8), torch.zeros(8), impl="auto")
    assert r_new.dtype == y.dtype == torch.float64
