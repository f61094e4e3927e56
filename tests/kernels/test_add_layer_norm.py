"""add_layer_norm: residual addition with drop path, and LayerNorm."""

import functools
import re

import pytest
import torch
from support.kernel_cases import changed
from support.kernels import BF16, F32, needs_compiler

from mimdet.kernels import KernelUnavailableError, add_layer_norm
from mimdet.testing import assert_within_budget
from mimdet.testing.op_cases import Case, case, cotangents, differentiate, judge

OP = "add_layer_norm"
# dtypes of residual, x and y
DTYPES = {"fp32": (F32, F32, F32), "bf16": (BF16, BF16, BF16), "amp": (F32, BF16, BF16)}
MIXED = {"amp": (F32, BF16, BF16), "amp_fp32_out": (F32, BF16, F32), "fp32_bf16_out": (F32, F32, BF16)}


@pytest.mark.parametrize("dtypes", MIXED.values(), ids=MIXED)
@pytest.mark.parametrize("arguments", [{}, {"scale": None}, {"x": None, "scale": None}], ids=["", "unscaled", "alone"])
def test_mixed_dtypes(runner, dtypes, arguments):
    impl, device = runner
    example = case(OP, length=11, channels=48, device=device)
    inputs = {"residual": example.inputs["residual"].to(dtypes[0]), "x": example.inputs["x"].to(dtypes[1])}
    inputs = {k: v for k, v in (example.inputs | inputs).items() if k not in arguments}
    example = Case(OP, inputs, example.others | arguments)

    def function(**inputs):
        return add_layer_norm(**inputs, **example.others, dtype=dtypes[2], impl=impl)

    actual = differentiate(example, None, function=function)
    cpu, double = example.on_cpu(), example.on_cpu(torch.float64)
    same, exact = (differentiate(one, None, function=one.plain) for one in (cpu, double))
    same["output1"] = same["output1"].to(dtypes[2])
    for name, value in actual.items():
        rows = 22 if name in ("grad_weight", "grad_bias") else 1
        assert_within_budget(value, same[name], exact[name], rows, name)


@pytest.mark.parametrize("used", [0, 1], ids=["only-sum", "only-norm"])
@pytest.mark.parametrize("scale", [True, False], ids=["scaled", "unscaled"])
def test_one_output_used(runner, used, scale):
    impl, device = runner
    example = case(OP, channels=40, dtype=BF16, device=device)
    example = example if scale else changed(example, scale=None)

    def upstream(outputs):
        return [g * (i == used) for i, g in enumerate(cotangents(outputs))]

    inputs = {k: v.requires_grad_() for k, v in example.inputs.items()}
    output = example(impl)[used]
    gradients = torch.autograd.grad(
        output, list(inputs.values()), cotangents([output, output])[used], allow_unused=True
    )
    judge(example, {f"grad_{k}": g for k, g in zip(inputs, gradients, strict=True) if g is not None}, upstream)
    assert used == 0 or None not in gradients


BAD = {
    "rank": (ValueError, "residual must be", {"residual": torch.zeros(8)}),
    "shape of x": (ValueError, "x must be", {"x": torch.zeros(2, 4, 8)}),
    "scale length": (ValueError, "scale must be", {"scale": torch.ones(3)}),
    "scale gradient": (ValueError, "scale has no gradient", {"scale": torch.ones(2, requires_grad=True)}),
    "scale alone": (ValueError, "scale without", {"x": None}),
    "weight length": (ValueError, "weight must be", {"weight": torch.ones(7)}),
    "bias length": (ValueError, "bias must be", {"bias": torch.ones(9)}),
    "dtype": (TypeError, "dtype must be", {"dtype": torch.int32}),
    "half x in C++": (KernelUnavailableError, "float16", {"x": torch.zeros(2, 3, 8).half(), "impl": "cpp"}),
}


@pytest.mark.parametrize(("error", "message", "change"), BAD.values(), ids=BAD)
def test_bad_input(error, message, change):
    good = {"residual": torch.zeros(2, 3, 8), "x": torch.zeros(2, 3, 8), "scale": torch.ones(2)}
    good |= {"weight": torch.ones(8), "bias": torch.zeros(8)}
    with pytest.raises(error, match=message):
        add_layer_norm(**(good | change))


def run_at(rows, channels, dtypes=(F32, BF16, BF16)):
    """Launches of forward and backward, with all that may be passed."""
    residual, x = (torch.empty(1, rows, channels, dtype=dtype) for dtype in dtypes[:2])
    weight, bias = torch.empty(2, channels)
    example = Case(OP, {"residual": residual, "x": x, "weight": weight, "bias": bias}, {"scale": torch.ones(1)})
    function = functools.partial(add_layer_norm, **example.others, dtype=dtypes[2], impl="triton")
    return lambda: differentiate(example, None, lambda outputs: [torch.empty_like(o) for o in outputs], function)


# aligned -> registers per thread of forward and backward. A multiprocessor has 65536: at 128 threads a program, 48
# allow 10 rows at a time and 80 allow 6.
REGISTERS = {True: (40, 80), False: (56, 120)}


@needs_compiler
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("channels", [768, 512, 1024, 1000, 17])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_compiles_within_the_budget(capability, channels, dtypes):
    from support.aot import compile_pair

    aligned = channels % 256 == 0
    compiled = compile_pair(OP, capability, run_at(4200, channels, dtypes))
    for one, registers in zip(compiled, REGISTERS[aligned], strict=True):
        assert one.stack == 0, one
        assert one.registers <= registers, one
        assert not aligned or (one.loads_16 and one.stores_16), one


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
