"""add_layer_norm: residual addition with drop path, and LayerNorm."""

import functools
import re

import pytest
import torch
from support.block_ops import DTYPES, add_layer_norm_inputs, check_add_layer_norm, differentiate
from support.kernels import here, native, needs_compiler

from mimdet.kernels import KernelUnavailableError, add_layer_norm
from mimdet.kernels.add_layer_norm import ops, reference

OP = "add_layer_norm"
SHAPES = here([(3, 7, 17), (2, 33, 96), (3, 5, 192), (2, 9, 768), (1, 3, 1000)], [(3, 5, 48)])


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["scaled", "unscaled", "alone"])
def test_budget(runner, dtypes, shape, kind):
    impl, device = runner
    check_add_layer_norm(impl, shape, dtypes, device, has_x=kind != "alone", scale=kind == "scaled")


@pytest.mark.parametrize(
    "channels", here([1, 15, 16, 31, 32, 33, 63, 64, 65, 1023, 1025], [1, 17, 31, 32, 33, 768, 1000])
)
def test_sizes_around_a_vector(runner, channels):
    impl, device = runner
    check_add_layer_norm(impl, (2, 3, channels), DTYPES["fp32"], device, eps=1e-3)


@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["only-sum", "only-norm"])
@pytest.mark.parametrize("scale", [True, False], ids=["scaled", "unscaled"])
def test_one_output_used(runner, used, scale):
    impl, device = runner
    check_add_layer_norm(impl, (3, 4, 40), DTYPES["amp"], device, used=used, scale=scale)


@pytest.mark.parametrize("rows", here([2051 * 3, 65, 16], [5, 6, 7, 13]))
def test_partial_sums_share_out_rows_unevenly(monkeypatch, runner, rows):
    impl, device = runner
    monkeypatch.setitem(ops._PARTIALS, "triton", (1, 3))
    check_add_layer_norm(impl, (1, rows, 8), DTYPES["fp32"], device)


@native
@pytest.mark.parametrize("dtypes", [DTYPES["fp32"], DTYPES["amp"]], ids=["fp32", "amp"])
@pytest.mark.parametrize("kind", ["scaled", "unscaled", "alone"])
def test_opcheck(runner, dtypes, kind):
    impl, device = runner
    inputs, (grad_r, grad_y) = add_layer_norm_inputs((2, 3, 16), dtypes, has_x=kind != "alone", scale=kind == "scaled")
    residual, x, scale, weight, bias = (t if t is None else t.to(device) for t in inputs.values())
    for tensor in (residual, x, weight, bias):
        if tensor is not None:
            tensor.requires_grad_()
    torch.library.opcheck(
        torch.ops.mimdet.add_layer_norm.default, (residual, x, scale, weight, bias, 1e-6, dtypes[2], impl)
    )
    statistics = [torch.rand(2, 3, device=device) for _ in range(2)]
    arguments = (grad_r.to(device), grad_y.to(device), residual.detach(), *statistics, scale, weight.detach())
    torch.library.opcheck(
        torch.ops.mimdet.add_layer_norm_backward.default, (*arguments, None if x is None else x.dtype, impl)
    )


def test_reference_gradients():
    inputs, _ = add_layer_norm_inputs((2, 3, 5), [torch.float64] * 3)
    residual, x, scale, weight, bias = (t.double() for t in inputs.values())
    leaves = [t.requires_grad_() for t in (residual, x, weight, bias)]

    def function(residual, x, weight, bias):
        return reference.add_layer_norm(residual, x, scale, weight, bias, 1e-5, torch.float64)

    assert torch.autograd.gradcheck(function, leaves)


MUTATIONS = {
    "eps": lambda r, x, scale, weight, bias, eps, dtype: (r, x, scale, weight, bias, eps * 3, dtype),
    "scale forgotten": lambda r, x, scale, *rest: (r, x, None, *rest),
    "weight forgotten": lambda r, x, scale, weight, *rest: (r, x, scale, torch.ones_like(weight), *rest),
}


@pytest.mark.parametrize("mutation", [*MUTATIONS, "dropped tail", "first chunk only"])
def test_mutations_are_caught(monkeypatch, mutation, cpp):
    """The comparison itself: each of these wrong kernels must fail it."""
    right, right_backward = ops._forward, ops.run_backward
    if mutation in MUTATIONS:
        replacement = lambda *a: right(*MUTATIONS[mutation](*a[:-1]), a[-1])  # noqa: E731
    elif mutation == "dropped tail":

        def replacement(*arguments):
            residual_out, y, mean, rstd = right(*arguments)
            y[..., -1] = 0
            return residual_out, y, mean, rstd

    else:
        replacement = right
        monkeypatch.setattr(
            ops, "run_backward",
            lambda gr, gy, *rest: (*right_backward(gr, gy, *rest)[:2], gy[:1].float().sum((0, 1)).expand(2, -1)),
        )  # fmt: skip

    class Mutated(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = replacement(*inputs)
            ops._setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *gradients):
            return ops._differentiate(ctx, *gradients)

    monkeypatch.setattr(ops, "run", Mutated.apply)
    with pytest.raises(AssertionError, match="budget"):
        check_add_layer_norm("cpp", (4, 5, 33), DTYPES["fp32"], eps=1e-2)


BAD = {
    "rank": (ValueError, "residual must be", {"residual": torch.zeros(8)}),
    "shape of x": (ValueError, "x must be", {"x": torch.zeros(2, 4, 8)}),
    "scale length": (ValueError, "scale must be", {"scale": torch.ones(3)}),
    "scale gradient": (ValueError, "scale has no gradient", {"scale": torch.ones(2, requires_grad=True)}),
    "scale alone": (ValueError, "scale without", {"x": None}),
    "weight length": (ValueError, "weight must be", {"weight": torch.ones(7)}),
    "bias length": (ValueError, "bias must be", {"bias": torch.ones(9)}),
    "dtype": (TypeError, "dtype must be", {"dtype": torch.int32}),
    "double in C++": (KernelUnavailableError, "float64", {"residual": torch.zeros(2, 3, 8).double(), "impl": "cpp"}),
    "half x in C++": (KernelUnavailableError, "float16", {"x": torch.zeros(2, 3, 8).half(), "impl": "cpp"}),
}


@pytest.mark.parametrize(("error", "message", "change"), BAD.values(), ids=BAD)
def test_bad_input(error, message, change):
    good = {"residual": torch.zeros(2, 3, 8), "x": torch.zeros(2, 3, 8), "scale": torch.ones(2)}
    good |= {"weight": torch.ones(8), "bias": torch.zeros(8)}
    with pytest.raises(error, match=message):
        add_layer_norm(**(good | change))


def test_auto_is_eager_where_no_kernel_runs():
    r = torch.randn(2, 3, 8, dtype=torch.float64)
    residual_out, y = add_layer_norm(r, r.half(), None, torch.ones(8), torch.zeros(8), impl="auto")
    assert residual_out.dtype == y.dtype == torch.float64


# aligned -> registers per thread of forward and backward. A multiprocessor has 65536: at 128 threads a program, 48
# allow 10 rows at a time and 80 allow 6.
REGISTERS = {True: (40, 80), False: (56, 120)}


@needs_compiler
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("channels", [768, 512, 1024, 1000, 17])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "amp"])
def test_compiles_within_the_budget(capability, channels, dtypes):
    from support.aot import compile_pair

    inputs, gradients = add_layer_norm_inputs((2, 2100, channels), DTYPES[dtypes])

    def function(**kw):
        return add_layer_norm(**kw, dtype=DTYPES[dtypes][2], impl="triton")

    aligned = channels % 256 == 0
    compiled = compile_pair(OP, capability, lambda: differentiate(function, inputs, gradients))
    for one, registers in zip(compiled, REGISTERS[aligned], strict=True):
        assert one.stack == 0, one
        assert one.registers <= registers, one
        assert not aligned or (one.loads_16 and one.stores_16), one


def run_at(rows, channels):
    """Launches of forward and backward, with all that may be passed."""
    residual, x = (torch.empty(1, rows, channels, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    inputs = {"residual": residual, "x": x, "scale": torch.ones(1)}
    inputs |= {"weight": torch.empty(channels), "bias": torch.empty(channels)}
    function = functools.partial(add_layer_norm, dtype=x.dtype, impl="triton")
    return lambda: differentiate(function, inputs, [residual, x])


@needs_compiler
@pytest.mark.parametrize("shape", [(2100, 768), (16800, 768), (4200, 512), (33600, 512), (16800, 1024)], ids=str)
def test_backward_fills_an_h200_once(shape):
    """Every multiprocessor has work, and all programs run at the same time: no second wave of a few."""
    from support.aot import record, resident

    _, backward = record(OP, run_at(*shape))
    assert 5 * 132 <= backward.grid[0] <= 132 * min(6, resident(backward))


@needs_compiler
@pytest.mark.parametrize("channels", [512, 768, 1024])
def test_backward_loads_before_it_sums(channels):
    """Of a row's 16-byte loads, none waits for the sums; both sums go through shared memory together."""
    from support.aot import instructions, record

    _, backward = record(OP, run_at(2100, channels))
    code = instructions(90, backward.kernel, *backward.arguments, grid=backward.grid, **backward.constants)
    names = [re.sub(r"^@!?\w+ +", "", one) for one in code]
    sums = [i for i, name in enumerate(names) if name.startswith("SHFL")]
    assert sums
    assert not [name for name in names[sums[0] :] if re.match(r"LDG\.E\S*128", name)]
    ahead = [name for name in names if re.match(r"LDGSTS\.E\S*128", name)]
    assert len(ahead) == 3 * 5  # of three inputs, 16 + 32 + 32 bytes a thread: two rows before the loop, and one in it
