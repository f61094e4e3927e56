"""The fused norms of feature maps, on CPU: the same numbers as plain PyTorch, whatever comes in."""

import importlib

import pytest
import torch
from image_norm_cases import EPS, OPS, api, check_sizes, cropped, forward_backward, inputs, judge, reference
from kernels_testing import Guarded, layouts, poisoned_allocations, run_on_older_processor
from torch.utils.checkpoint import checkpoint

from mimdet.kernels import KernelUnavailableError, image_norm, registry

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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


SHAPES = [
    (2, 17, 5, 7),
    (2, 96, 24, 16),
    (1, 192, 31, 33),
    (3, 384, 8, 8),
    (1, 1000, 3, 5),
    (2, 3, 64, 65),
    (1, 1, 1, 9),
]


@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_forward_and_backward_stay_within_the_budget(op, shape, dtype, nhwc):
    x, weight, bias, dy = inputs(shape, dtype, nhwc)
    got = forward_backward(api(op), x, weight, bias, dy, impl="cpp")
    judge(op, got, x, weight, bias, dy)
    assert got[0].stride() == x.stride()
    assert got[1].stride() == x.stride()


@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("positions", [31, 32, 33, 1023, 1024, 1025])
def test_sizes_around_a_tile_touch_nothing_else(op, positions, nhwc):
    x, weight, bias, dy = inputs((2, 33, 1, positions), nhwc=nhwc)
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


@pytest.mark.parametrize("sizes", [None, torch.tensor([[2, 5], [4, 1]])], ids=["whole", "sizes"])
@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
def test_opcheck(op, nhwc, sizes):
    x, weight, bias, dy = inputs((2, 6, 4, 5), nhwc=nhwc)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    ops = torch.ops.mimdet
    torch.library.opcheck(getattr(ops, op).default, (*leaves, sizes, EPS, "cpp"))
    plain = [t.detach() for t in leaves]
    _, mean, rstd = getattr(ops, op)(*plain, sizes, EPS, "cpp")
    torch.library.opcheck(getattr(ops, f"{op}_backward").default, (dy, *plain, sizes, mean, rstd, "cpp"))


@pytest.mark.parametrize("impl", ["cpp", "eager", "eager with sizes"])
def test_compiles_whole_with_equal_results(op, impl):
    run = api(op)

    def function(x, weight, bias):
        sizes = x.new_full((x.shape[0], 2), 3, dtype=torch.int64) if "sizes" in impl else None
        return run(x * 2, weight, bias, EPS, sizes=sizes, impl=impl.split()[0]) + 1

    # Inductor decides on the strides that our operation sees; plain PyTorch is its own business.
    backend = "inductor" if impl == "cpp" else "aot_eager"
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
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
    y = getattr(torch.ops.mimdet, op)(x.to("meta"), weight.to("meta"), bias.to("meta"), None, EPS, "cpp")[0]
    assert (y.shape, y.stride(), y.device.type) == (x.shape, x.stride(), "meta")


@pytest.mark.parametrize("sizes", [None, torch.tensor([[3, 2], [1, 3]])], ids=["whole", "sizes"])
def test_reference_gradients(op, sizes):
    x, weight, bias, _ = inputs((2, 5, 3, 3), torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    # A large eps: finite differences of one position alone would see 1 / sqrt(eps).
    assert torch.autograd.gradcheck(lambda *a: reference(op)(*a, 1e-2, sizes), leaves)


def test_reference_with_sizes_is_the_reference_of_each_crop(op):
    x, weight, bias, dy = inputs((3, 5, 4, 6), torch.float64)
    sizes = torch.tensor([[4, 6], [1, 1], [3, 2]])
    x[1, :, 2:], dy[2, :, :, 2:] = float("nan"), float("nan")
    got = forward_backward(reference(op), x, weight, bias, dy, sizes=sizes)
    for g, e in zip(got, cropped(reference(op), x, weight, bias, dy, sizes), strict=True):
        torch.testing.assert_close(g, e)


# Whole, one position, whole rows, part of the rows; the last goes over several tasks, whose bounds cut rows.
SIZES = {
    "small": ((4, 17, 5, 7), [[5, 7], [1, 1], [3, 7], [5, 3]]),
    "large": ((2, 96, 24, 30), [[23, 29], [11, 30]]),
}


@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("shape", "sizes"), SIZES.values(), ids=SIZES)
def test_sizes_give_what_the_valid_area_gets_alone(op, shape, sizes, dtype, nhwc):
    check_sizes("cpp", op, shape, sizes, dtype, nhwc, torch.int64 if nhwc else torch.int32)


def test_sizes_of_everything_change_nothing(op):
    x, weight, bias, dy = inputs((2, 6, 4, 5))
    whole = forward_backward(api(op), x, weight, bias, dy, impl="cpp")
    sized = forward_backward(api(op), x, weight, bias, dy, sizes=torch.tensor([[4, 5], [4, 5]]), impl="cpp")
    assert all(torch.equal(a, b) for a, b in zip(whole, sized, strict=True))


@pytest.mark.parametrize("bad", [[[4, 5], [5, 5]], [[4, 0], [4, 5]], [[4, 5], [-1, 5]]], ids=str)
def test_sizes_outside_of_the_map(op, bad, monkeypatch):
    x, weight, bias, _ = inputs((2, 6, 4, 5))
    with pytest.raises(RuntimeError, match="sizes"):
        api(op)(x, weight, bias, EPS, sizes=torch.tensor(bad), impl="cpp")
    monkeypatch.setenv("MIMDET_DEBUG_KERNELS", "1")
    with pytest.raises(ValueError, match=f"{op}: sizes"):
        api(op)(x, weight, bias, EPS, sizes=torch.tensor(bad), impl="eager")


def _tail(got):
    got[0][-1, -1, -1, -1] = 0
    return got


def _one_sample(got, x, weight, bias, dy):
    return [*got[:2], *forward_backward(api("group_norm_gelu"), x[:1], weight, bias, dy[:1], impl="cpp")[2:]]


# What a faulty kernel would give, from the function, its inputs and what is right.
FAULTS = {
    "eps": lambda f, got, *a: forward_backward(f, *a, eps=3 * EPS),
    "no bias": lambda f, got, x, w, b, dy: forward_backward(f, x, w, 0 * b, dy),
    "dropped tail": lambda f, got, *a: _tail(got),
    "one sample's weight gradient": lambda f, got, *a: _one_sample(got, *a),
    "no mean in dx": lambda f, got, *a: [got[0], got[1] + got[1].abs().mean() / 10, *got[2:]],
    "bf16 inside": lambda f, got, *a: [t.bfloat16().float() for t in got],
}


@pytest.mark.parametrize("fault", [*FAULTS, "tanh"])
def test_faults_are_caught(op, fault, monkeypatch):
    """The judgement itself: each of these must fail it, and what they are made from must not."""
    arguments = inputs((2, 17, 5, 7), mean=0.0, std=1e-3)
    got = forward_backward(reference(op), *arguments)
    judge(op, got, *arguments)
    with monkeypatch.context() as patch:
        if fault == "tanh":
            gelu = torch.nn.functional.gelu
            patch.setattr(torch.nn.functional, "gelu", lambda z: gelu(z, approximate="tanh"))
            got = forward_backward(reference(op), *arguments)
        else:
            got = FAULTS[fault](reference(op), got, *arguments)
    with pytest.raises(AssertionError, match="budget"):
        judge(op, got, *arguments)


@pytest.mark.parametrize("sizes", [None, [[5, 7], [5, 3]]], ids=["ignored", "off by one"])
def test_faulty_sizes_are_caught(op, sizes):
    arguments = inputs((2, 17, 5, 7))
    right = torch.tensor([[5, 7], [5, 2]])
    got = forward_backward(reference(op), *arguments, sizes=None if sizes is None else torch.tensor(sizes))
    with pytest.raises(AssertionError, match="budget"):
        judge(op, got, *arguments, right)


BAD = {
    "rank 3": (lambda x, w, b: (x[0], w, b), ValueError, r"x must be \(B, C, H, W\)"),
    "rank 2": (lambda x, w, b: (x[0, 0], w, b), ValueError, r"x must be \(B, C, H, W\)"),
    "integers": (lambda x, w, b: (x.long(), w, b), TypeError, "x must be a floating point"),
    "weight size": (lambda x, w, b: (x, w[:-1], b), ValueError, r"weight must be \(8,\)"),
    "bias rank": (lambda x, w, b: (x, w, b[None]), ValueError, r"bias must be \(8,\)"),
    "no bias": (lambda x, w, b: (x, w, None), TypeError, "bias must be a floating point"),
    "device": (lambda x, w, b: (x, w.to("meta"), b), ValueError, "weight is on meta, x on cpu"),
    "float sizes": (lambda x, w, b: (x, w, b, torch.ones(2, 2)), TypeError, "sizes must be an int32 or int64"),
    "sizes of one": (lambda x, w, b: (x, w, b, torch.tensor([4, 4])), ValueError, r"sizes must be \(2, 2\)"),
    "sizes elsewhere": (
        lambda x, w, b: (x, w, b, torch.ones(2, 2, dtype=torch.int64, device="meta")),
        ValueError,
        "sizes is on meta, x on cpu",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(op, case):
    spoil, error, message = BAD[case]
    x, weight, bias, *sizes = spoil(*inputs((2, 8, 4, 4))[:3])
    with pytest.raises(error, match=message):
        api(op)(x, weight, bias, EPS, sizes=sizes[0] if sizes else None, impl="cpp")


@pytest.mark.parametrize("shape", [(1, image_norm.WIDEST + 1, 1, 1), (0, 1, 2**15, 2**15 + 1)], ids=["wide", "long"])
def test_what_a_gpu_cannot_take_runs_eager(op, shape, monkeypatch):
    monkeypatch.setattr(registry, "choose", lambda *_: "triton")
    x, affine = torch.ones(shape), torch.ones(shape[1])
    with pytest.raises(KernelUnavailableError, match="triton takes at most"):
        api(op)(x, affine, affine, EPS, impl="triton")
    assert api(op)(x, affine, affine, EPS, impl="auto").shape == shape


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_older_processors(op, isa):
    run_on_older_processor(isa, __file__, f"{op} and (budget or around_a_tile or cancellation or alone)")
