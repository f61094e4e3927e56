"""The fused norms of feature maps: what their maps' sizes and memory format decide."""

import pytest
import torch
from support.image_norm_cases import check_compiled
from support.kernels import BF16, F32, native, needs_compiler

from mimdet import kernels
from mimdet.kernels import KernelUnavailableError, image_norm
from mimdet.testing.op_cases import EPS, Case, case, differentiate

OP = "group_norm_gelu"
LAYOUTS = pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(params=["group_norm_gelu", "layer_norm_gelu"])
def op(request):
    return request.param


def test_nan_goes_through_and_stays_in_its_sample(runner, op):
    example = case(op, device=runner[1])
    example.inputs["x"][1, 2, 1, 1] = float("nan")
    y = example(runner[0])
    assert y[1, :, 1, 1].isnan().all()
    assert torch.isfinite(y[0]).all()


@native
@pytest.mark.parametrize("impl", ["cpp", "eager", "eager with sizes"])
def test_compiles_whole_with_equal_results(cpp, op, impl):
    def function(x, weight, bias):
        sizes = x.new_full((x.shape[0], 2), 3, dtype=torch.int64) if "sizes" in impl else None
        return getattr(kernels, op)(x * 2, weight, bias, EPS, sizes=sizes, impl=impl.split()[0]) + 1

    # Inductor chooses the strides of our operation's input; eager has no operation of ours.
    backend = "inductor" if impl == "cpp" else "aot_eager"
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for batch, length in ((2, 20), (3, 28)):
        example = case(op, batch, length, 6, layout="channels_last")
        eager, whole = (differentiate(example, None, function=f) for f in (function, compiled))
        for name, value in eager.items():
            torch.testing.assert_close(whole[name], value, atol=1e-5, rtol=1e-5, msg=name)


BAD = {
    "rank 3": (lambda x, w, b: (x[0], w, b), ValueError, r"x must be \(B, C, H, W\)"),
    "rank 2": (lambda x, w, b: (x[0, 0], w, b), ValueError, r"x must be \(B, C, H, W\)"),
    "integers": (lambda x, w, b: (x.long(), w, b), TypeError, "x must be of a float dtype"),
    "weight size": (lambda x, w, b: (x, w[:-1], b), ValueError, r"weight must be \(24,\)"),
    "bias rank": (lambda x, w, b: (x, w, b[None]), ValueError, r"bias must be \(24,\)"),
    "no bias": (lambda x, w, b: (x, w, None), TypeError, "bias must be a tensor"),
    "float sizes": (lambda x, w, b: (x, w, b, torch.ones(2, 2)), TypeError, "sizes must be int32 or int64"),
    "sizes of one": (lambda x, w, b: (x, w, b, torch.tensor([4, 4])), ValueError, r"sizes must be \(2, 2\)"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_names_the_argument(op, bad):
    spoil, error, message = BAD[bad]
    x, weight, bias, *sizes = spoil(*case(op).inputs.values())
    with pytest.raises(error, match=message):
        getattr(kernels, op)(x, weight, bias, EPS, sizes=sizes[0] if sizes else None)


@pytest.mark.parametrize("shape", [(1, image_norm.WIDEST + 1, 1, 1), (0, 1, 2**15, 2**15 + 1)], ids=["wide", "long"])
def test_what_a_gpu_cannot_take_runs_eager(op, shape):
    x, affine = torch.ones(shape), torch.ones(shape[1])
    with pytest.raises(KernelUnavailableError, match="triton cannot run: it takes at most"):
        getattr(kernels, op)(x, affine, affine, EPS, impl="triton")
    assert getattr(kernels, op)(x, affine, affine, EPS, impl="eager").shape == shape


# dtype, (C, H, W), with sizes, compute capability: the ends of the stem and odd numbers, each dtype on each target.
TARGETS = {
    "stride2": (BF16, (96, 400, 672), False, 90),
    "stride16": (F32, (768, 60, 80), False, 80),
    "stride8-sizes": (BF16, (384, 120, 160), True, 80),
    "stride4-sizes": (F32, (192, 100, 168), True, 90),
    "odd-sizes": (F32, (17, 11, 91), True, 90),
}


@needs_compiler
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@LAYOUTS
@pytest.mark.parametrize(
    ("op", "counts"), [("group_norm_gelu", (6, 7)), ("layer_norm_gelu", (2,))], ids=["group", "layer"]
)
def test_compiles_within_the_budget(op, counts, nhwc, target):
    def run(x, dy, sizes):
        weight, bias = torch.empty(2, x.shape[1], dtype=x.dtype)
        example = Case(op, {"x": x, "weight": weight, "bias": bias}, {"eps": EPS, "sizes": sizes})
        differentiate(example, "triton", lambda _: [dy])

    check_compiled(op, target, nhwc, run, counts)
