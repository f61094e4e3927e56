"""The fused norms of feature maps against plain PyTorch, for any input."""

import pytest
import torch
from support.image_norm_cases import (
    EPS,
    OPS,
    api,
    check_compiled,
    check_sizes,
    cropped,
    forward_backward,
    inputs,
    judge,
    reference,
)
from support.kernels import (
    BF16,
    F16,
    F32,
    Guarded,
    here,
    native,
    needs_compiler,
    run_on_older_processor,
)
from torch.utils.checkpoint import checkpoint

from mimdet.kernels import KernelUnavailableError, image_norm

OP = "group_norm_gelu"
DTYPES = {"fp32": F32, "bf16": BF16} | here({}, {"fp16": F16})
LAYOUTS = pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(params=OPS)
def op(request):
    return request.param


# Channels around powers of two and of the model; samples of less than one tile, of one more, and of several parts.
SHAPES = here(
    [(2, 17, 5, 7), (2, 96, 24, 16), (1, 192, 31, 33), (3, 384, 8, 8), (1, 1000, 3, 5), (2, 3, 64, 65), (1, 1, 1, 9)],
    [(2, 17, 5, 7), (1, 96, 6, 7), (1, 96, 9, 6), (1, 5, 40, 41), (1, 260, 2, 3), (1, 1, 1, 9), (2, 32, 8, 8)],
)


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_forward_and_backward_stay_within_the_budget(runner, op, shape, dtype, nhwc):
    impl, device = runner
    arguments = inputs(shape, dtype, nhwc)
    guards = [Guarded(t.to(device)) for t in arguments]
    actual = [t.cpu() for t in forward_backward(api(op), *(g.tensor for g in guards), impl=impl)]
    for guard in guards:
        guard.check()
    judge(op, actual, *arguments)
    assert actual[0].stride() == actual[1].stride() == arguments[0].stride()


@LAYOUTS
@native
@pytest.mark.parametrize("positions", [31, 32, 33, 1023, 1024, 1025])
def test_sizes_around_a_tile_touch_nothing_else(cpp, op, positions, nhwc):
    x, weight, bias, dy = inputs((2, 33, 1, positions), nhwc=nhwc)
    guards = [Guarded(t) for t in (x, weight, bias, dy)]
    actual = forward_backward(api(op), *(g.tensor for g in guards), impl="cpp")
    for guard in guards:
        guard.check()
    judge(op, actual, x, weight, bias, dy)


def test_nan_goes_through_and_stays_in_its_sample(runner, op):
    x, weight, bias, _ = inputs((2, 8, 4, 4))
    x[1, 2, 3, 3] = float("nan")
    y = api(op)(*(t.to(runner[1]) for t in (x, weight, bias)), EPS, impl=runner[0])
    assert y[1, :, 3, 3].isnan().all()
    assert torch.isfinite(y[0]).all()


@pytest.mark.parametrize("sizes", [None, torch.tensor([[2, 5], [4, 1]])], ids=["whole", "sizes"])
@LAYOUTS
def test_opcheck(cpp, op, nhwc, sizes):
    x, weight, bias, dy = inputs((2, 6, 4, 5), nhwc=nhwc)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    ops = torch.ops.mimdet
    torch.library.opcheck(getattr(ops, op).default, (*leaves, sizes, EPS, "cpp"))
    plain = [t.detach() for t in leaves]
    _, mean, rstd = getattr(ops, op)(*plain, sizes, EPS, "cpp")
    torch.library.opcheck(getattr(ops, f"{op}_backward").default, (dy, *plain, sizes, mean, rstd, "cpp"))


@native
@pytest.mark.parametrize("impl", ["cpp", "eager", "eager with sizes"])
def test_compiles_whole_with_equal_results(cpp, op, impl):
    run = api(op)

    def function(x, weight, bias):
        sizes = x.new_full((x.shape[0], 2), 3, dtype=torch.int64) if "sizes" in impl else None
        return run(x * 2, weight, bias, EPS, sizes=sizes, impl=impl.split()[0]) + 1

    # Inductor chooses the strides of our operation's input; eager has no operation of ours.
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


def test_checkpointing_gives_the_same_gradients(cpp, op):
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
    # A large eps: for one position alone, gradients grow with 1 / sqrt(eps).
    assert torch.autograd.gradcheck(lambda *a: reference(op)(*a, 1e-2, sizes), leaves)


def test_reference_with_sizes_is_the_reference_of_each_crop(op):
    x, weight, bias, dy = inputs((3, 5, 4, 6), torch.float64)
    sizes = torch.tensor([[4, 6], [1, 1], [3, 2]])
    x[1, :, 2:], dy[2, :, :, 2:] = float("nan"), float("nan")
    actual = forward_backward(reference(op), x, weight, bias, dy, sizes=sizes)
    for g, e in zip(actual, cropped(reference(op), x, weight, bias, dy, sizes), strict=True):
        torch.testing.assert_close(g, e)


# All of the map, one position, full rows, parts of rows; the last spans several tasks, whose bounds cut rows.
SIZES = {"small": ((4, 17, 5, 7), [[5, 7], [1, 1], [3, 7], [5, 3]])} | here(
    {"large": ((2, 96, 24, 30), [[23, 29], [11, 30]])}, {"several parts": ((2, 40, 12, 20), [[11, 19], [3, 5]])}
)


@LAYOUTS
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("shape", "sizes"), SIZES.values(), ids=SIZES)
def test_sizes_equal_the_valid_area_alone(runner, op, shape, sizes, dtype, nhwc):
    impl, device = runner
    if device != "cpu":
        pytest.skip("judged on the CPU")
    check_sizes(impl, op, shape, sizes, dtype, nhwc, torch.int64 if nhwc else torch.int32)


def test_sizes_of_everything_change_nothing(cpp, op):
    x, weight, bias, dy = inputs((2, 6, 4, 5))
    whole = forward_backward(api(op), x, weight, bias, dy, impl="cpp")
    sized = forward_backward(api(op), x, weight, bias, dy, sizes=torch.tensor([[4, 5], [4, 5]]), impl="cpp")
    assert all(torch.equal(a, b) for a, b in zip(whole, sized, strict=True))


@pytest.mark.parametrize("bad", [[[4, 5], [5, 5]], [[4, 0], [4, 5]], [[4, 5], [-1, 5]]], ids=str)
def test_sizes_outside_of_the_map(cpp, op, bad, monkeypatch):
    x, weight, bias, _ = inputs((2, 6, 4, 5))
    with pytest.raises(RuntimeError, match="sizes"):
        api(op)(x, weight, bias, EPS, sizes=torch.tensor(bad), impl="cpp")
    monkeypatch.setenv("MIMDET_DEBUG_KERNELS", "1")
    with pytest.raises(ValueError, match=f"{op}: sizes"):
        api(op)(x, weight, bias, EPS, sizes=torch.tensor(bad), impl="eager")


def _tail(actual):
    actual[0][-1, -1, -1, -1] = 0
    return actual


def _one_sample(actual, x, weight, bias, dy):
    return [*actual[:2], *forward_backward(api("group_norm_gelu"), x[:1], weight, bias, dy[:1], impl="cpp")[2:]]


# (function, right result, its inputs) -> result of a wrong kernel.
MUTATIONS = {
    "eps": lambda f, actual, *a: forward_backward(f, *a, eps=3 * EPS),
    "no bias": lambda f, actual, x, w, b, dy: forward_backward(f, x, w, 0 * b, dy),
    "dropped tail": lambda f, actual, *a: _tail(actual),
    "one sample's weight gradient": lambda f, actual, *a: _one_sample(actual, *a),
    "no mean in dx": lambda f, actual, *a: [actual[0], actual[1] + actual[1].abs().mean() / 10, *actual[2:]],
    "bf16 inside": lambda f, actual, *a: [t.bfloat16().float() for t in actual],
}


@pytest.mark.parametrize("mutation", [*MUTATIONS, "tanh"])
def test_mutations_are_caught(cpp, op, mutation, monkeypatch):
    """The check itself: it must pass the right result and fail each of these."""
    arguments = inputs((2, 17, 5, 7), mean=0.0, std=1e-3)
    actual = forward_backward(reference(op), *arguments)
    judge(op, actual, *arguments)
    with monkeypatch.context() as patch:
        if mutation == "tanh":
            gelu = torch.nn.functional.gelu
            patch.setattr(torch.nn.functional, "gelu", lambda z: gelu(z, approximate="tanh"))
            actual = forward_backward(reference(op), *arguments)
        else:
            actual = MUTATIONS[mutation](reference(op), actual, *arguments)
    with pytest.raises(AssertionError, match="budget"):
        judge(op, actual, *arguments)


@pytest.mark.parametrize("sizes", [None, [[5, 7], [5, 3]]], ids=["ignored", "off by one"])
def test_faulty_sizes_are_caught(op, sizes):
    arguments = inputs((2, 17, 5, 7))
    right = torch.tensor([[5, 7], [5, 2]])
    actual = forward_backward(reference(op), *arguments, sizes=None if sizes is None else torch.tensor(sizes))
    with pytest.raises(AssertionError, match="budget"):
        judge(op, actual, *arguments, right)


BAD = {
    "rank 3": (lambda x, w, b: (x[0], w, b), ValueError, r"x must be \(B, C, H, W\)"),
    "rank 2": (lambda x, w, b: (x[0, 0], w, b), ValueError, r"x must be \(B, C, H, W\)"),
    "integers": (lambda x, w, b: (x.long(), w, b), TypeError, "x must be of a float dtype"),
    "weight size": (lambda x, w, b: (x, w[:-1], b), ValueError, r"weight must be \(8,\)"),
    "bias rank": (lambda x, w, b: (x, w, b[None]), ValueError, r"bias must be \(8,\)"),
    "no bias": (lambda x, w, b: (x, w, None), TypeError, "bias must be a tensor"),
    "device": (lambda x, w, b: (x, w.to("meta"), b), ValueError, "weight is on meta, x on cpu"),
    "float sizes": (lambda x, w, b: (x, w, b, torch.ones(2, 2)), TypeError, "sizes must be int32 or int64"),
    "sizes of one": (lambda x, w, b: (x, w, b, torch.tensor([4, 4])), ValueError, r"sizes must be \(2, 2\)"),
    "sizes elsewhere": (
        lambda x, w, b: (x, w, b, torch.ones(2, 2, dtype=torch.int64, device="meta")),
        ValueError,
        "sizes is on meta, x on cpu",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(cpp, op, case):
    spoil, error, message = BAD[case]
    x, weight, bias, *sizes = spoil(*inputs((2, 8, 4, 4))[:3])
    with pytest.raises(error, match=message):
        api(op)(x, weight, bias, EPS, sizes=sizes[0] if sizes else None, impl="cpp")


@pytest.mark.parametrize("shape", [(1, image_norm.WIDEST + 1, 1, 1), (0, 1, 2**15, 2**15 + 1)], ids=["wide", "long"])
def test_what_a_gpu_cannot_take_runs_eager(op, shape):
    x, affine = torch.ones(shape), torch.ones(shape[1])
    with pytest.raises(KernelUnavailableError, match="triton cannot run: it takes at most"):
        api(op)(x, affine, affine, EPS, impl="triton")
    assert api(op)(x, affine, affine, EPS, impl="eager").shape == shape


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_older_processors(cpp, op, isa):
    run_on_older_processor(isa, __file__, f"{op} and (budget or around_a_tile or alone)")


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
    ("op", "kernels"), [("group_norm_gelu", (6, 7)), ("layer_norm_gelu", (2,))], ids=["group", "layer"]
)
def test_compiles_within_the_budget(op, kernels, nhwc, target):
    def run(x, dy, sizes):
        affine = torch.empty(x.shape[1], dtype=x.dtype)
        forward_backward(api(op), x, affine, affine, dy, sizes=sizes, impl="triton")

    check_compiled(op, target, nhwc, run, kernels)


@needs_compiler
def test_maps_of_other_sizes_compile_nothing():
    """A size that is 1, or a multiple of 16, would compile a kernel again."""
    from support.aot import launches, target
    from support.kernel_cases import pretend
    from triton import knobs

    keys = {}

    def note(*, fn, compile, **_):
        keys.setdefault(fn.name, set()).add(compile["key"])
        return True  # nothing is compiled

    with pretend("triton", OP), launches() as recorded:
        for height, width in ((30, 44), (31, 43), (32, 48), (96, 112)):
            x, weight, bias, dy = inputs((1, 96, height, width), BF16, nhwc=True)
            forward_backward(api(OP), x, weight, bias, dy, impl="triton")
    # Triton asks the hook about what it has not compiled yet: no other test compiles for this target.
    with pytest.MonkeyPatch.context() as patch, target(89):
        patch.setattr(knobs.runtime, "jit_cache_hook", note)
        for one in recorded:
            one.kernel.warmup(*one.arguments, grid=one.grid, **one.constants)
    assert len(keys) == 7
    assert all(len(of_kernel) == 1 for of_kernel in keys.values()), keys
