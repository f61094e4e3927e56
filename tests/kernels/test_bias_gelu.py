"""bias_gelu: a linear layer's bias and the exact GELU."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.block_ops import check_bias_gelu, differentiate
from support.gelu_everywhere import all_numbers, check_everywhere
from support.kernels import BF16, F16, F32, here, native, needs_compiler, quantized

from mimdet.kernels import KernelUnavailableError, bias_gelu
from mimdet.kernels.bias_gelu import ops, reference

OP = "bias_gelu"
DTYPES = {"fp32": F32, "bf16": BF16} | here({}, {"fp16": F16})
SHAPES = here([(5,), (3, 17), (2, 33, 96), (2, 3, 5, 192), (2, 9, 3072)], [(3, 17), (2, 33, 48), (130, 96)])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_budget(runner, shape, dtype):
    impl, device = runner
    check_bias_gelu(impl, shape, dtype, device)


@pytest.mark.parametrize(
    "channels", here([1, 15, 16, 31, 32, 33, 63, 64, 65, 1023, 1025], [1, 31, 32, 33, 511, 512, 513])
)
def test_sizes_around_a_vector(runner, channels):
    impl, device = runner
    check_bias_gelu(impl, (here(67, 5), channels), F32, device)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 63, 64, 65, 129])
def test_rows_around_a_program(runner, rows):
    impl, device = runner
    check_bias_gelu(impl, (rows, 24), F32, device)


@pytest.mark.parametrize("rows", [9, 10, 13])
def test_partial_sums_share_out_rows_unevenly(monkeypatch, runner, rows):
    impl, device = runner
    monkeypatch.setitem(ops._PARTIALS, "triton", (1, 3))
    check_bias_gelu(impl, (rows, 24), BF16, device)


@native
def test_far_out_values(runner):
    """Where exp underflows, GELU is 0 or the identity, and its derivative 0 or 1."""
    impl, device = runner
    x = torch.cat([torch.linspace(-60, 60, 4001), torch.tensor([-1e30, -1e4, 1e4, 1e30])]).to(device).unsqueeze(0)
    inputs = {"x": x, "bias": torch.zeros(x.shape[1], device=device)}
    actual = differentiate(lambda **kw: bias_gelu(**kw, impl=impl), inputs, [torch.ones_like(x)])
    expected = differentiate(lambda x, bias: F.gelu(x + bias), {k: v.double() for k, v in inputs.items()},
                         [torch.ones_like(x).double()])  # fmt: skip
    torch.testing.assert_close(actual["output0"].double(), expected["output0"], rtol=2e-7, atol=5e-7)
    torch.testing.assert_close(actual["grad_x"].double(), expected["grad_x"], rtol=2e-7, atol=1e-6)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
def test_every_16_bit_number(runner, dtype):
    impl, device = runner
    if dtype not in DTYPES.values() and impl == "cpp":
        pytest.skip("C++ does not take it")
    z = all_numbers(dtype)
    inputs = {"x": z.to(device), "bias": torch.zeros(z.shape[1], device=device)}
    actual = differentiate(lambda **kw: bias_gelu(**kw, impl=impl), inputs, [torch.ones_like(inputs["x"])])
    # The error of csrc/gelu.h is absolute.
    floor = {"floor": 4e-7 * z.double().abs().clamp_min(1)} if impl == "cpp" else {}
    check_everywhere(z, actual["output0"].cpu(), actual["grad_x"].cpu(), **floor)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
def test_infinities_and_nan(runner, dtype):
    """As z * Phi(z) has it in plain PyTorch on a GPU: GELU(inf) is inf, and what takes inf * 0 is NaN."""
    impl, device = runner
    if impl == "cpp":
        pytest.skip("clamps")
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 1.0]], dtype=dtype, device=device)
    actual = differentiate(lambda **kw: bias_gelu(**kw, impl=impl), {"x": x, "bias": torch.zeros(4, device=device)},
                           [torch.ones_like(x)])  # fmt: skip
    nan = float("nan")
    expected = torch.tensor([[nan, float("inf"), nan, F.gelu(torch.tensor(1.0)).item()]]).to(dtype)
    torch.testing.assert_close(actual["output0"].cpu(), expected, equal_nan=True)
    assert actual["grad_x"].isnan().tolist() == [[True, True, True, False]]


def test_not_a_number_stays_one(runner):
    impl, device = runner
    y = bias_gelu(torch.tensor([[float("nan"), 1.0]], device=device), torch.zeros(2, device=device), impl=impl)
    assert y.isnan().tolist() == [[True, False]]


def test_bias_in_another_dtype(runner):
    impl, device = runner
    x, bias = quantized(4, 8, dtype=BF16).to(device), quantized(8, dtype=BF16).to(device)
    actual = differentiate(lambda **kw: bias_gelu(**kw, impl=impl), {"x": x, "bias": bias}, [torch.ones_like(x)])
    assert actual["output0"].dtype == actual["grad_x"].dtype == actual["grad_bias"].dtype == BF16


@native
def test_opcheck(runner):
    impl, device = runner
    x, bias = (t.to(device).requires_grad_() for t in (quantized(6, 16), quantized(16)))
    torch.library.opcheck(torch.ops.mimdet.bias_gelu.default, (x, bias, impl))
    torch.library.opcheck(
        torch.ops.mimdet.bias_gelu_backward.default, (torch.ones_like(x), x.detach(), bias.detach(), impl)
    )


def test_reference_gradients():
    x, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (4,)))
    assert torch.autograd.gradcheck(reference.bias_gelu, (x, bias))


@pytest.mark.parametrize("mutation", ["tanh", "no bias", "dropped tail"])
def test_mutations_are_caught(monkeypatch, mutation, cpp):
    """The comparison itself: each of these wrong kernels must fail it."""

    def wrong(x, bias, impl):
        y = F.gelu(x + (0 if mutation == "no bias" else bias), approximate="tanh" if mutation == "tanh" else "none")
        if mutation == "dropped tail":
            y = torch.cat([y[:, :-1], y[:, -1:] * 0], dim=1)
        return y

    monkeypatch.setattr(ops, "run", wrong)
    # Without bias, the missing gradient raises first.
    with pytest.raises(AssertionError):
        check_bias_gelu("cpp", (40, 33), F32)


BAD = {
    "scalar": (ValueError, "bias must be", {"x": torch.tensor(1.0)}),
    "length": (ValueError, "bias must be", {"bias": torch.zeros(7)}),
    "double in C++": (KernelUnavailableError, "float64", {"x": torch.zeros(2, 8).double(), "impl": "cpp"}),
}


@pytest.mark.parametrize(("error", "message", "change"), BAD.values(), ids=BAD)
def test_bad_input(error, message, change):
    with pytest.raises(error, match=message):
        bias_gelu(**({"x": torch.zeros(2, 8), "bias": torch.zeros(8)} | change))


def run_in(dtype, rows, channels):
    """Launches of forward and backward."""
    inputs = {"x": torch.empty(rows, channels, dtype=dtype), "bias": torch.empty(channels)}
    return lambda: differentiate(lambda **kw: bias_gelu(**kw, impl="triton"), inputs, [torch.empty_like(inputs["x"])])


# (aligned, dtype) -> registers per thread of forward and backward. float32 takes the library's erf.
REGISTERS = {(True, BF16): (40, 80), (True, F32): (40, 96), (False, BF16): (56, 128), (False, F32): (56, 128)}


@needs_compiler
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("channels", [3072, 2048, 1000, 17])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_compiles_within_the_budget(capability, channels, dtype):
    from support.aot import compile_pair

    aligned = channels % 256 == 0
    compiled = compile_pair(OP, capability, run_in(dtype, 4200, channels))
    for one, registers in zip(compiled, REGISTERS[aligned, dtype], strict=True):
        assert one.stack == 0, one
        assert one.registers <= registers, one
        assert not aligned or (one.loads_16 and one.stores_16), one


@needs_compiler
@pytest.mark.parametrize("shape", [(2100, 3072), (16800, 3072), (4200, 2048), (33600, 2048)], ids=str)
def test_backward_fills_an_h200_once(shape):
    """Every multiprocessor has at least 16 warps, and all programs run at the same time."""
    from support.aot import record, resident

    _, backward = record(OP, run_in(BF16, *shape))
    programs = math.prod(backward.grid)
    assert programs * backward.constants["num_warps"] >= 0.99 * 132 * 16
    assert programs <= 132 * resident(backward)


@needs_compiler
def test_forward_takes_few_instructions():
    """Threads compute 8 numbers each; with the address, bias and store, a number takes 24 instructions."""
    from support.aot import instructions, record

    forward, _ = record(OP, run_in(BF16, 2100, 3072))
    assert forward.grid == (2100, 3)
    code = instructions(90, forward.kernel, *forward.arguments, grid=forward.grid, **forward.constants)
    print(len(code) / 8)
    assert len(code) <= 8 * 26
