"""bias_gelu: a linear layer's bias and the exact GELU."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.gelu_everywhere import all_numbers, check_everywhere
from support.kernels import BF16, F16, F32, native, needs_compiler

from mimdet.kernels import bias_gelu
from mimdet.testing.op_cases import Case, differentiate

OP = "bias_gelu"


def gelu(x, impl, function=None):
    """GELU of (N, C) and its derivative."""
    example = Case(OP, {"x": x, "bias": torch.zeros(x.shape[1], device=x.device)}, {})
    tensors = differentiate(example, impl, lambda outputs: [torch.ones_like(o) for o in outputs], function)
    return tensors["output0"], tensors["grad_x"]


@native
def test_far_out_values(runner):
    """Where exp underflows, GELU is 0 or the identity, and its derivative 0 or 1."""
    impl, device = runner
    x = torch.cat([torch.linspace(-60, 60, 4001), torch.tensor([-1e30, -1e4, 1e4, 1e30])]).to(device).unsqueeze(0)
    exact = gelu(x.double(), None, lambda x, bias: F.gelu(x + bias))
    for actual, expected, limit in zip(gelu(x, impl), exact, (5e-7, 1e-6), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=2e-7, atol=limit)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
def test_every_16_bit_number(runner, dtype):
    impl, device = runner
    if dtype == F16 and impl == "cpp":
        pytest.skip("C++ does not take it")
    z = all_numbers(dtype)
    y, derivative = (t.cpu() for t in gelu(z.to(device), impl))
    # The error of csrc/gelu.h is absolute.
    floor = {"floor": 4e-7 * z.double().abs().clamp_min(1)} if impl == "cpp" else {}
    check_everywhere(z, y, derivative, **floor)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
def test_infinities_and_nan(runner, dtype):
    """As z * Phi(z) has it in plain PyTorch on a GPU: GELU(inf) is inf, and what takes inf * 0 is NaN."""
    impl, device = runner
    if impl == "cpp":
        pytest.skip("clamps")
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 1.0]], dtype=dtype, device=device)
    y, derivative = gelu(x, impl)
    nan = float("nan")
    expected = torch.tensor([[nan, float("inf"), nan, F.gelu(torch.tensor(1.0)).item()]]).to(dtype)
    torch.testing.assert_close(y.cpu(), expected, equal_nan=True)
    assert derivative.isnan().tolist() == [[True, True, True, False]]


def test_not_a_number_stays_one(runner):
    impl, device = runner
    y = bias_gelu(torch.tensor([[float("nan"), 1.0]], device=device), torch.zeros(2, device=device), impl=impl)
    assert y.isnan().tolist() == [[True, False]]


BAD = {
    "scalar": (ValueError, "bias must be", {"x": torch.tensor(1.0)}),
    "length": (ValueError, "bias must be", {"bias": torch.zeros(7)}),
}


@pytest.mark.parametrize(("error", "message", "change"), BAD.values(), ids=BAD)
def test_bad_input(error, message, change):
    with pytest.raises(error, match=message):
        bias_gelu(**({"x": torch.zeros(2, 8), "bias": torch.zeros(8)} | change))


def run_in(dtype, rows, channels):
    """Launches of forward and backward."""
    x = torch.empty(rows, channels, dtype=dtype)
    return lambda: gelu(x, "triton")


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
