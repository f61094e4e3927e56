"""The Triton kernels of the feature map norms, against plain PyTorch in float64."""

import pytest
import torch
from image_norm_cases import OPS, api, check_sizes, forward_backward, inputs, judge
from kernels_testing import Guarded

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LAYOUTS = pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
# Channels around powers of two and of the model; samples of less than one tile, of one more, and of several parts.
CASES = {
    "odd": ((2, 17, 5, 7), F32),
    "odd-bf16": ((2, 17, 5, 7), BF16),
    "odd-fp16": ((2, 17, 5, 7), F16),
    "stem": ((1, 96, 6, 7), BF16),
    "two parts": ((1, 96, 9, 6), F32),
    "long": ((1, 5, 40, 41), F32),
    "wide": ((1, 260, 2, 3), F32),
    "one channel": ((1, 1, 1, 9), F32),
    "powers of two": ((2, 32, 8, 8), F32),
}


@LAYOUTS
@pytest.mark.parametrize(("shape", "dtype"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("op", OPS)
def test_forward_and_backward_stay_within_the_budget(op, shape, dtype, nhwc):
    arguments = inputs(shape, dtype, nhwc)
    guards = [Guarded(t) for t in arguments]
    got = forward_backward(api(op), *(g.tensor for g in guards), impl="triton")
    for guard in guards:
        guard.check()
    judge(op, got, *arguments)
    assert got[0].stride() == arguments[0].stride()


@LAYOUTS
@pytest.mark.parametrize("op", OPS)
def test_repeats_bitwise(op, nhwc):
    arguments = inputs((2, 17, 5, 7), nhwc=nhwc)
    first, second = (forward_backward(api(op), *arguments, impl="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@LAYOUTS
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("op", OPS)
def test_sizes_give_what_the_valid_area_gets_alone(op, dtype, nhwc):
    check_sizes("triton", op, (4, 17, 5, 7), [[5, 7], [1, 1], [3, 7], [5, 3]], dtype, nhwc, torch.int64)


@LAYOUTS
@pytest.mark.parametrize("op", OPS)
def test_sizes_over_several_parts(op, nhwc):
    check_sizes("triton", op, (2, 40, 12, 20), [[11, 19], [3, 5]], F32, nhwc)


@LAYOUTS
@pytest.mark.parametrize("op", OPS)
def test_no_cancellation_far_from_zero(op, nhwc):
    arguments = inputs((1, 24, 20, 20), nhwc=nhwc, mean=1e3, std=0.1)
    judge(op, forward_backward(api(op), *arguments, impl="triton"), *arguments)


@pytest.mark.parametrize("op", OPS)
def test_empty_batch(op):
    got = forward_backward(api(op), *inputs((0, 8, 4, 4)), impl="triton")
    assert got[0].shape == got[1].shape == (0, 8, 4, 4)
    assert not got[2].any()
    assert not got[3].any()


@pytest.mark.parametrize("sizes", [None, torch.tensor([[4, 5], [2, 3]])], ids=["whole", "sizes"])
@pytest.mark.parametrize("op", OPS)
def test_registered_operation(op, sizes):
    x, weight, bias, _ = inputs((2, 6, 4, 5), nhwc=True)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    api(op)
    torch.library.opcheck(getattr(torch.ops.mimdet, op).default, (*leaves, sizes, 1e-6, "triton"))
