"""Batch norm and ReLU over valid cells: the same numbers as plain PyTorch, whatever comes in."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from support.image_norm_cases import check_compiled
from support.kernels import (
    BF16,
    F16,
    F32,
    Guarded,
    here,
    native,
    needs_compiler,
    quantized,
    run_on_older_processor,
    threads,
)
from torch.utils.checkpoint import checkpoint

from mimdet.kernels import KernelUnavailableError, batch_norm, image_norm, valid_mask
from mimdet.kernels.batch_norm import ops, reference
from mimdet.testing import assert_within_budget

OP = "batch_norm"
EPS = 1e-5
NAMES = ("y", "dx", "dweight", "dbias", "running_mean", "running_var")
DTYPES = {"fp32": F32, "bf16": BF16} | here({}, {"fp16": F16})
LAYOUTS = pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
RELU = pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
pytestmark = pytest.mark.usefixtures("poisoned")


def inputs(shape, dtype=F32, nhwc=False, mean=0.5, std=1.0, affine=F32):
    """x, weight, bias and the gradient of y."""
    memory = torch.channels_last if nhwc else torch.contiguous_format
    x = quantized(*shape, dtype=dtype, mean=mean, std=std).contiguous(memory_format=memory)
    dy = quantized(*shape, dtype=dtype, seed=3).contiguous(memory_format=memory)
    weight = quantized(shape[1], dtype=affine, seed=1, mean=1.0, std=0.3)
    bias = quantized(shape[1], dtype=affine, seed=2, std=0.3)
    return x, weight, bias, dy


def forward_backward(x, weight, bias, dy, training=True, **kwargs):
    """``NAMES`` of the operation; running statistics start at 0 and 1 and take all of the batch."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight, bias)]
    wide = torch.promote_types(x.dtype, F32)
    running = [torch.full((x.shape[1],), value, dtype=wide, device=x.device) for value in (0.0, 1.0)]
    y = batch_norm(*leaves, *running, training=training, momentum=1.0, eps=EPS, **kwargs)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy), *running]


def plain(x, weight, bias, dy, relu, inside=None, training=True):
    """The same by PyTorch's batch norm of contiguous memory, of the valid cells (N, 1, H, W) alone."""
    wide = torch.promote_types(x.dtype, F32)
    inside = torch.ones_like(x[:, :1], dtype=torch.bool) if inside is None else inside
    columns = [t.permute(0, 2, 3, 1)[inside[:, 0]].T.contiguous()[None] for t in (x, dy)]
    leaves = [t.detach().clone().requires_grad_() for t in (columns[0], weight, bias)]
    running = [torch.full((x.shape[1],), value, dtype=wide) for value in (0.0, 1.0)]
    y = F.batch_norm(leaves[0], *running, *leaves[1:], training, 1.0, EPS)
    y = y.relu() if relu else y
    dx, *rest = torch.autograd.grad(y, leaves, columns[1])
    maps = []
    for cells in (y.detach(), dx):
        padded = torch.zeros(x.shape, dtype=x.dtype).permute(0, 2, 3, 1)
        padded[inside[:, 0]] = cells[0].T
        maps.append(padded.permute(0, 3, 1, 2))
    return [*maps, *rest, *running]


def judge(got, x, weight, bias, dy, relu, inside=None, training=True):
    """``got``, from ``forward_backward``, is within the error budget."""
    same = plain(x, weight, bias, dy, relu, inside, training)
    exact = plain(*(t.double() for t in (x, weight, bias, dy)), relu, inside, training)
    terms = x.numel() // x.shape[1]
    for name, g, s, e in zip(NAMES, got, same, exact, strict=True):
        assert_within_budget(g, s.to(g.dtype), e, terms if name in NAMES[2:4] and g.dtype == F32 else 1, name)


# Channels around a vector and a tile; batches of less than one tile or task, of one more, and of several parts.
SHAPES = here(
    [(2, 17, 5, 7), (2, 96, 24, 16), (1, 256, 31, 33), (40, 65, 7, 7), (3, 1000, 3, 1), (5, 24, 1, 1), (3, 1, 1, 9)],
    [(2, 17, 5, 7), (1, 70, 9, 6), (1, 12, 40, 31), (3, 5, 1, 1), (3, 1, 1, 9)],
)


@RELU
@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_forward_and_backward_stay_within_the_budget(runner, shape, dtype, nhwc, relu):
    impl, device = runner
    arguments = inputs(shape, dtype, nhwc)
    guards = [Guarded(t.to(device)) for t in arguments]
    got = [t.cpu() for t in forward_backward(*(g.tensor for g in guards), relu=relu, impl=impl)]
    for guard in guards:
        guard.check()
    judge(got, *arguments, relu)
    assert got[0].stride() == got[1].stride() == arguments[0].stride()


@RELU
@LAYOUTS
@pytest.mark.parametrize("dtype", [F32, BF16, torch.float64], ids=["fp32", "bf16", "fp64"])
def test_eager_stays_within_the_budget(dtype, nhwc, relu):
    arguments = inputs((2, 17, 5, 7), dtype, nhwc, affine=torch.promote_types(dtype, F32))
    got = forward_backward(*arguments, relu=relu, impl="eager")
    judge(got, *arguments, relu)
    assert got[0].dtype == dtype


@native
def test_large_maps_are_as_exact_as_contiguous_memory(cpp):
    """PyTorch's sums of channels_last memory err a hundred times as much."""
    arguments = inputs((1, 64, 120, 160), nhwc=True, mean=3.0, std=2.0)
    exact = plain(*(t.double() for t in arguments), False)
    got = forward_backward(*arguments, impl="cpp")
    for name, g, e in zip(NAMES, got, exact, strict=True):
        assert (g - e).abs().max() <= 5e-7 * e.abs().max(), name


@LAYOUTS
def test_small_differences_from_a_large_mean(runner, nhwc):
    impl, device = runner
    arguments = inputs((2, 33, 24, 11), nhwc=nhwc, mean=1e4, std=0.1)
    got = [t.cpu() for t in forward_backward(*(t.to(device) for t in arguments), impl=impl)]
    judge(got, *arguments, False)
    # E[x^2] - E[x]^2 would have lost all of it.
    torch.testing.assert_close(got[5], arguments[0].double().var((0, 2, 3)).float(), rtol=1e-5, atol=0)


@LAYOUTS
@pytest.mark.parametrize("sized", [False, True], ids=["whole", "sizes"])
def test_programs_that_take_several_tiles(runner, nhwc, sized, monkeypatch):
    """As they do for maps that are too large for a test; of the last images nothing is valid."""
    impl, device = runner
    if impl == "cpp":
        pytest.skip("its tasks are of a fixed size")
    module = importlib.import_module(f"mimdet.kernels.batch_norm.{impl}")
    monkeypatch.setattr(module, "_MOST_PARTS" if impl == "triton" else "_PARTS", 2)
    arguments = inputs((4, 24, 31, 23), nhwc=nhwc, mean=1e4, std=0.1)
    sizes = torch.tensor([[31, 23], [0, 0], [0, 0], [9, 20]]) if sized else None
    inside = None if sizes is None else valid_mask(sizes, arguments[0].shape[2:])[:, None]
    moved = [t.to(device) for t in arguments]
    got = forward_backward(*moved, sizes=None if sizes is None else sizes.to(device), impl=impl)
    judge([t.cpu() for t in got], *arguments, False, inside)


@native
@LAYOUTS
def test_an_outlier_first(cpp, nhwc):
    """A value far from all others costs a few bits, wherever x_centered is counted from."""
    arguments = inputs((1, 8, 40, 40), nhwc=nhwc)
    arguments[0][0, :, 0, 0] = 1e4
    judge(forward_backward(*arguments, impl="cpp"), *arguments, False)


@RELU
@LAYOUTS
def test_running_statistics_instead_of_those_of_the_batch(runner, nhwc, relu):
    impl, device = runner
    arguments = inputs((2, 17, 5, 7), nhwc=nhwc)
    got = [t.cpu() for t in forward_backward(*(t.to(device) for t in arguments), training=False, relu=relu, impl=impl)]
    judge(got, *arguments, relu, training=False)
    assert not got[4].any()


# Everything, part of the rows, one cell, nothing; the last goes over several tasks, whose bounds cut rows.
SIZES = {
    "small": ((5, 17, 5, 7), [[5, 7], [3, 7], [5, 3], [1, 1], [0, 0]]),
    "nothing last": ((2, 6, 4, 5), [[0, 5]] * 2),
}
SIZES |= here({"large": ((2, 96, 24, 30), [[23, 29], [11, 30]])}, {"parts": ((2, 6, 50, 61), [[49, 61], [3, 5]])})


def spoil(x, inside):
    return x.masked_fill(~inside, float("nan"))


@RELU
@LAYOUTS
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("shape", "sizes"), [SIZES[name] for name in SIZES if name != "nothing last"])
def test_sizes_give_what_the_valid_cells_get_alone(runner, shape, sizes, dtype, nhwc, relu):
    impl, device = runner
    sizes = torch.tensor(sizes, dtype=torch.int64 if nhwc else torch.int32)
    x, weight, bias, dy = inputs(shape, dtype, nhwc)
    inside = valid_mask(sizes, x.shape[2:])[:, None]
    x, dy = spoil(x, inside), spoil(dy, inside)
    arguments = [t.to(device) for t in (x, weight, bias, dy)]
    got = [t.cpu() for t in forward_backward(*arguments, sizes=sizes.to(device), relu=relu, impl=impl)]
    for maps in got[:2]:
        assert not maps.masked_select(~inside).any()
    judge(got, x, weight, bias, dy, relu, inside)


@RELU
@LAYOUTS
def test_maps_that_are_not_valid_are_not_looked_at(runner, nhwc, relu):
    impl, device = runner
    x, weight, bias, dy = inputs((6, 17, 3, 4), nhwc=nhwc)
    valid = torch.tensor([True, True, False, True, False, False])
    inside = valid.view(-1, 1, 1, 1).expand(6, 1, 3, 4)
    x, dy = spoil(x, inside), spoil(dy, inside)
    arguments = [t.to(device) for t in (x, weight, bias, dy)]
    got = [t.cpu() for t in forward_backward(*arguments, valid=valid.to(device), relu=relu, impl=impl)]
    for maps in got[:2]:
        assert not maps[~valid].any()
    judge(got, x, weight, bias, dy, relu, inside)


def test_valid_maps_and_sizes_together(cpp):
    x, weight, bias, dy = inputs((3, 5, 4, 4))
    sizes, valid = torch.tensor([[4, 4], [2, 3], [3, 1]]), torch.tensor([True, False, True])
    inside = valid_mask(sizes, x.shape[2:])[:, None] & valid.view(-1, 1, 1, 1)
    got = forward_backward(spoil(x, inside), weight, bias, spoil(dy, inside), sizes=sizes, valid=valid, impl="cpp")
    judge(got, x, weight, bias, dy, False, inside)


@LAYOUTS
@pytest.mark.parametrize("nothing", ["no maps", "no valid map"])
def test_nothing_valid_moves_nothing(runner, nothing, nhwc):
    impl, device = runner
    x, weight, bias, dy = (t.to(device) for t in inputs((0 if nothing == "no maps" else 3, 5, 4, 4), nhwc=nhwc))
    x = torch.full_like(x, float("nan"))
    valid = None if nothing == "no maps" else torch.zeros(3, dtype=torch.bool, device=device)
    y, dx, dweight, dbias, mean, var = forward_backward(x, weight, bias, dy, valid=valid, relu=True, impl=impl)
    assert not any(t.any() for t in (y, dx, dweight, dbias, mean))
    assert (var == 1).all()
    batches = torch.zeros((), dtype=torch.int64, device=device)
    running = torch.zeros(5, device=device), torch.ones(5, device=device)
    batch_norm(x, weight, bias, *running, batches, training=True, valid=valid, impl=impl)
    assert batches == 0
    batch_norm(torch.zeros(2, 5, 1, 1, device=device), weight, bias, *running, batches, training=True, impl=impl)
    assert batches == 1


@pytest.mark.parametrize("unbiased", [False, True])
def test_statistics_of_several_processes_are_those_of_all_their_values(runner, unbiased):
    """Of other numbers of values, one of none; each value counts alike."""
    impl, device = runner
    parts = [quantized(n, 131, 1, 1, seed=n, mean=n / 10, std=2.0) for n in (5, 1, 40)]
    moments = torch.stack([reference.moments(part) for part in parts] + [torch.zeros(263)])
    got = ops.statistics(moments.to(device), EPS, unbiased, impl).cpu()
    values = torch.cat(parts)[:, :, 0, 0].double()
    var = values.var(0, unbiased=False)
    want = [values.mean(0), (var + EPS).rsqrt(), values.var(0, unbiased=unbiased), torch.tensor([1 / 46])]
    torch.testing.assert_close(got.double(), torch.cat(want).double(), rtol=2e-6, atol=1e-6)
    assert not ops.statistics(torch.zeros(2, 263, device=device), 1.0, unbiased, impl).cpu()[[0, 262, 392]].any()


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize("sizes", [None, [[4, 5], [4, 5]]], ids=["whole", "sizes"])
def test_running_statistics_are_pytorchs(cpp, momentum, sizes):
    theirs, x = torch.nn.BatchNorm2d(6, momentum=momentum), inputs((2, 6, 4, 5), std=3.0)[0]
    ours = torch.zeros(6), torch.ones(6), torch.tensor(0)
    for i in range(3):
        theirs(x * i + 1)
        areas = None if sizes is None else torch.tensor(sizes)
        batch_norm(x * i + 1, None, None, *ours, training=True, momentum=momentum, sizes=areas, impl="cpp")
    for our, their in zip(ours, (theirs.running_mean, theirs.running_var, theirs.num_batches_tracked), strict=True):
        torch.testing.assert_close(our, their)


@LAYOUTS
def test_nan_goes_through_and_stays_in_its_channel(runner, nhwc):
    x, weight, bias, _ = inputs((2, 8, 4, 4), nhwc=nhwc)
    x[1, 2, 3, 3] = float("nan")
    y = batch_norm(*(t.to(runner[1]) for t in (x, weight, bias)), training=True, relu=True, impl=runner[0]).cpu()
    assert y[:, 2].isnan().all()
    assert torch.isfinite(y[:, [0, 1, 3, 4, 5, 6, 7]]).all()


@native
@LAYOUTS
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "sizes"])
def test_any_number_of_threads_gives_the_same_bits(cpp, nhwc, whole):
    arguments = inputs((3, 130, 40, 31), nhwc=nhwc)
    sizes = None if whole else torch.tensor([[40, 31], [39, 7], [0, 0]])
    runs = []
    for count in (1, 2, 2):
        with threads(count):
            runs.append(forward_backward(*arguments, sizes=sizes, relu=True, impl="cpp"))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("sizes", [None, torch.tensor([[2, 5], [4, 0]])], ids=["whole", "sizes"])
@LAYOUTS
def test_opcheck(cpp, nhwc, sizes):
    x, weight, bias, dy = inputs((2, 6, 4, 5), nhwc=nhwc)
    mine, mean, rstd = torch.ops.mimdet, *torch.rand(2, 6)
    parameters, rest = (weight, bias, mean, rstd), (sizes, True, "cpp")
    torch.library.opcheck(mine.batch_norm_moments.default, (x, sizes, "cpp"))
    torch.library.opcheck(mine.batch_norm_statistics.default, (torch.rand(2, 13), EPS, True, "cpp"))
    torch.library.opcheck(mine.batch_norm.default, (x, *parameters, *rest))
    torch.library.opcheck(mine.batch_norm_sums.default, (dy, x, *parameters, *rest))
    torch.library.opcheck(mine.batch_norm_backward.default, (dy, x, *parameters, torch.rand(2, 6), *rest))


@RELU
@pytest.mark.parametrize("sizes", [None, torch.tensor([[3, 2], [1, 3]])], ids=["whole", "sizes"])
def test_gradients_are_those_of_finite_differences(sizes, relu):
    x, weight, bias, _ = inputs((2, 5, 3, 3), torch.float64, affine=torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    run = lambda *a: batch_norm(*a, training=True, relu=relu, sizes=sizes, impl="eager")  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves)


def test_checkpointing_gives_the_same_gradients(cpp):
    x, weight, bias, dy = inputs((2, 8, 6, 6))

    def gradients(run):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        return torch.autograd.grad(run(*leaves, training=True, relu=True, impl="cpp"), leaves, dy)

    again = gradients(lambda *args, **kwargs: checkpoint(batch_norm, *args, use_reentrant=False, **kwargs))
    assert all(torch.equal(a, b) for a, b in zip(gradients(batch_norm), again, strict=True))


def test_only_x_is_kept_for_backward(cpp):
    x, weight, bias, _ = inputs((2, 8, 6, 6))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        batch_norm(x.requires_grad_(), weight, bias, training=True, relu=True, impl="cpp")
    assert [t.data_ptr() for t in kept if t.numel() > 8] == [x.data_ptr()]


# What a wrong kernel would give, from its inputs and what is right.
MUTATIONS = {
    "no bias": lambda got, x, w, b, dy: forward_backward(x, w, 0 * b, dy, impl="eager"),
    "no relu": lambda got, *a: forward_backward(*a, impl="eager"),
    "dropped cell": lambda got, *a: [got[0].where(got[0] < got[0].max(), 0), *got[1:]],
    "no means in dx": lambda got, *a: [got[0], got[1] + got[1].abs().mean() / 100, *got[2:]],
    "biased variance": lambda got, *a: [*got[:5], got[5] * 0.99],
    "bf16 inside": lambda got, *a: [t.bfloat16().float() for t in got],
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_caught(mutation):
    """The judgement itself: each of these must fail it, and what they are made from must not."""
    arguments = inputs((2, 17, 5, 7))
    got = forward_backward(*arguments, relu=True, impl="eager")
    judge(got, *arguments, True)
    with pytest.raises(AssertionError, match="budget"):
        judge(MUTATIONS[mutation](got, *arguments), *arguments, True)


@pytest.mark.parametrize("bad", [[[4, 5], [5, 5]], [[4, -1], [4, 5]]], ids=str)
def test_sizes_outside_of_the_map(cpp, bad, monkeypatch):
    x, weight, bias, _ = inputs((2, 6, 4, 5))
    with pytest.raises(RuntimeError, match="sizes"):
        batch_norm(x, weight, bias, training=True, sizes=torch.tensor(bad), impl="cpp")
    monkeypatch.setenv("MIMDET_DEBUG_KERNELS", "1")
    with pytest.raises(ValueError, match="batch_norm: sizes"):
        batch_norm(x, weight, bias, training=True, sizes=torch.tensor(bad), impl="eager")


EIGHT = torch.ones(8)
BAD = {
    "rank 3": ({"x": torch.ones(8, 4, 4)}, ValueError, r"x must be \(N, C, H, W\)"),
    "integers": ({"x": torch.ones(2, 8, 4, 4).long()}, TypeError, "x must be of a float dtype"),
    "weight size": ({"weight": torch.ones(7)}, ValueError, r"weight must be \(8,\)"),
    "bias rank": ({"bias": torch.ones(1, 8)}, ValueError, r"bias must be \(8,\)"),
    "weight elsewhere": ({"weight": EIGHT.to("meta")}, ValueError, "weight is on meta, x on cpu"),
    "running size": ({"running_mean": torch.ones(7), "running_var": EIGHT}, ValueError, r"running_mean must be \(8,\)"),
    "one of two": ({"running_mean": EIGHT}, ValueError, "running_mean and running_var must both be given"),
    "no statistics": ({"training": False}, ValueError, "without training, running_mean and running_var must be given"),
    "float sizes": ({"sizes": torch.ones(2, 2)}, TypeError, "sizes must be int32 or int64"),
    "sizes of one": ({"sizes": torch.tensor([4, 4])}, ValueError, r"sizes must be \(2, 2\)"),
    "valid integers": ({"valid": torch.ones(2).long()}, TypeError, "valid must be bool"),
    "valid rank": ({"valid": torch.ones(2, 1).bool()}, ValueError, r"valid must be \(2,\)"),
    "valid list": ({"valid": [True, False]}, TypeError, "valid must be a tensor"),
    "valid elsewhere": ({"valid": torch.ones(2).bool().to("meta")}, ValueError, "valid is on meta, x on cpu"),
    "weigh": ({"weigh": "rows"}, ValueError, "weigh must be one of cells, maps, processes, got 'rows'"),
    "one value": ({"x": torch.ones(1, 8, 1, 1)}, ValueError, "Expected more than 1 value per channel when training"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case):
    changed, error, message = BAD[case]
    x, weight, bias, _ = inputs((2, 8, 4, 4))
    arguments = {"x": x, "weight": weight, "bias": bias, "training": True} | changed
    with pytest.raises(error, match=message):
        batch_norm(**arguments)


@pytest.mark.parametrize("shape", [(2, image_norm.WIDEST + 1, 1, 1), (0, 1, 1, 1)], ids=["wide", "long"])
def test_what_a_gpu_cannot_take_runs_eager(shape, monkeypatch):
    monkeypatch.setattr(ops, "MOST_CELLS", -1 if shape[0] == 0 else 2**30)
    with pytest.raises(KernelUnavailableError, match="triton cannot run: it takes at most"):
        batch_norm(torch.ones(shape), None, None, training=True, impl="triton")
    assert batch_norm(torch.ones(shape), None, None, training=True, impl="eager").shape == shape


def test_the_reference_takes_any_strides():
    x = inputs((2, 6, 4, 5))[0]
    torch.testing.assert_close(reference.moments(x.transpose(2, 3)), reference.moments(x))


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_older_processors(cpp, isa):
    run_on_older_processor(isa, __file__, "(budget or alone or contiguous or differences) and not eager")


# dtype, (C, H, W), with sizes, compute capability: maps of the pyramid and of heads, odd numbers, each dtype.
TARGETS = {
    "p2": (BF16, (256, 200, 336), False, 90),
    "p3-sizes": (BF16, (256, 100, 168), True, 80),
    "box": (F32, (256, 7, 7), False, 80),
    "odd-sizes": (F32, (17, 11, 91), True, 90),
}


@needs_compiler
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@LAYOUTS
def test_compiles_within_the_budget(nhwc, target):
    def run(x, dy, sizes):
        affine = torch.empty(x.shape[1])
        forward_backward(x, affine, affine, dy, sizes=sizes, relu=True, impl="triton")

    check_compiled(OP, target, nhwc, run, (6,))
