"""batch_norm: statistics of several processes, of the past and of some of the maps; exactness; bad arguments."""

import importlib

import pytest
import torch
from support.image_norm_cases import check_compiled
from support.kernel_cases import changed
from support.kernels import BF16, F32, native, needs_compiler, quantized

from mimdet.kernels import KernelUnavailableError, batch_norm, image_norm, valid_mask
from mimdet.kernels.batch_norm import ops, reference
from mimdet.testing.op_cases import Case, case, differentiate, judge

OP = "batch_norm"
EPS = 1e-5
LAYOUTS = pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
RELU = pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
pytestmark = pytest.mark.usefixtures("poisoned")


def maps(*shape, nhwc=False, relu=False, mean=0.5, std=1.0, device="cpu", **others):
    """A case of maps of this shape."""
    memory = torch.channels_last if nhwc else torch.contiguous_format
    x = quantized(*shape, mean=mean, std=std).to(device, memory_format=memory)
    inputs = {"x": x, **{k: v for k, v in case(OP, channels=shape[1], device=device).inputs.items() if k != "x"}}
    return Case(OP, inputs, {"training": True, "relu": relu, "eps": EPS, **others})


@native
def test_large_maps_are_as_exact_as_contiguous_memory(cpp):
    """PyTorch's sums of channels_last memory err a hundred times as much."""
    example = maps(1, 64, 120, 160, nhwc=True, mean=3.0, std=2.0)
    double = example.on_cpu(torch.float64)

    def upstream(outputs):
        return [quantized(*o.shape, seed=3).to(o) for o in outputs]

    exact = differentiate(double, None, upstream, double.plain)
    for name, value in differentiate(example, "cpp", upstream).items():
        assert (value - exact[name]).abs().max() <= 5e-7 * exact[name].abs().max(), name


@LAYOUTS
@pytest.mark.parametrize("sized", [False, True], ids=["whole", "sizes"])
def test_programs_that_take_several_tiles(runner, nhwc, sized, monkeypatch):
    """As they do for maps that are too large for a test; of the last images nothing is valid."""
    impl, device = runner
    if impl == "cpp":
        pytest.skip("its tasks are of a fixed size")
    module = importlib.import_module(f"mimdet.kernels.batch_norm.{impl}")
    monkeypatch.setattr(module, "_MOST_PARTS" if impl == "triton" else "_PARTS", 2)
    sizes = {"sizes": torch.tensor([[31, 23], [0, 0], [0, 0], [9, 20]], device=device)} if sized else {}
    example = maps(4, 24, 31, 23, nhwc=nhwc, mean=1e4, std=0.1, device=device, **sizes)
    judge(example, differentiate(example, impl))


@native
@LAYOUTS
def test_an_outlier_first(cpp, nhwc):
    """A value far from all others costs a few bits, wherever x_centered is counted from."""
    example = maps(1, 8, 40, 40, nhwc=nhwc)
    example.inputs["x"][0, :, 0, 0] = 1e4
    judge(example, differentiate(example, "cpp"))


@RELU
@LAYOUTS
def test_running_statistics_instead_of_those_of_the_batch(runner, nhwc, relu):
    impl, device = runner
    mean, var = quantized(17, seed=8).to(device), quantized(17, seed=9).abs().to(device) + 0.5
    example = maps(2, 17, 5, 7, nhwc=nhwc, relu=relu, device=device, running_mean=mean, running_var=var)
    example = changed(example, training=False)
    before = mean.clone()
    judge(example, differentiate(example, impl))
    assert torch.equal(mean, before)


# Some maps are valid at all, parts of them too; of an empty area nothing is.
AREAS = {
    "maps": (None, [True, True, False, True, False, False]),
    "maps and sizes": ([[3, 4], [2, 3], [3, 1], [1, 1], [3, 4], [0, 4]], [True, False, True, True, True, True]),
    "sizes": ([[3, 4], [2, 4], [3, 1], [1, 1], [0, 0], [0, 3]], None),
}


@RELU
@LAYOUTS
@pytest.mark.parametrize(("sizes", "valid"), AREAS.values(), ids=AREAS)
def test_what_is_not_valid_is_not_looked_at(runner, sizes, valid, nhwc, relu):
    impl, device = runner
    arguments = {"sizes": sizes and torch.tensor(sizes, device=device), "valid": valid and torch.tensor(valid)}
    arguments = {k: None if v is None else v.to(device) for k, v in arguments.items()}
    areas = torch.tensor(sizes or [[3, 4]] * 6) * torch.tensor(valid or [True] * 6)[:, None]
    outside = ~valid_mask(areas, (3, 4))[:, None].to(device)
    example = maps(6, 17, 3, 4, nhwc=nhwc, relu=relu, device=device, sizes=areas.to(device))
    example.inputs["x"].masked_fill_(outside, float("nan"))

    def upstream(outputs):
        (y,) = outputs
        return [quantized(*y.shape, seed=3).to(y).masked_fill(outside.to(y.device), torch.nan)]

    def function(x, weight, bias):
        return batch_norm(x, weight, bias, training=True, relu=relu, eps=EPS, **arguments, impl=impl)

    actual = differentiate(example, None, upstream, function)
    judge(example, actual, upstream)
    for name in ("output0", "grad_x"):
        assert not actual[name].masked_select(outside).any()


@LAYOUTS
@pytest.mark.parametrize("nothing", ["no maps", "no valid map"])
def test_nothing_valid_moves_nothing(runner, nothing, nhwc):
    impl, device = runner
    example = maps(0 if nothing == "no maps" else 3, 5, 4, 4, nhwc=nhwc, relu=True, device=device)
    example.inputs["x"].fill_(float("nan"))
    valid = None if nothing == "no maps" else torch.zeros(3, dtype=torch.bool, device=device)
    running = torch.zeros(5, device=device), torch.ones(5, device=device)
    batches = torch.zeros((), dtype=torch.int64, device=device)

    def function(x, weight, bias):
        return batch_norm(x, weight, bias, *running, batches, training=True, relu=True, valid=valid, impl=impl)

    assert not any(t.any() for t in differentiate(example, None, function=function).values())
    assert not running[0].any()
    assert (running[1] == 1).all()
    assert batches == 0
    batch_norm(torch.zeros(2, 5, 1, 1, device=device), None, None, *running, batches, training=True, impl=impl)
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
def test_running_statistics_are_pytorchs(runner, momentum, sizes):
    impl, device = runner
    theirs, x = torch.nn.BatchNorm2d(6, momentum=momentum, device=device), quantized(2, 6, 4, 5, std=3.0).to(device)
    ours = torch.zeros(6, device=device), torch.ones(6, device=device), torch.tensor(0, device=device)
    for i in range(3):
        theirs(x * i + 1)
        areas = None if sizes is None else torch.tensor(sizes, device=device)
        batch_norm(x * i + 1, None, None, *ours, training=True, momentum=momentum, sizes=areas, impl=impl)
    for our, their in zip(ours, (theirs.running_mean, theirs.running_var, theirs.num_batches_tracked), strict=True):
        torch.testing.assert_close(our, their)


@LAYOUTS
def test_nan_goes_through_and_stays_in_its_channel(runner, nhwc):
    example = maps(2, 8, 4, 4, nhwc=nhwc, relu=True, device=runner[1])
    example.inputs["x"][1, 2, 3, 3] = float("nan")
    y = example(runner[0])
    assert y[:, 2].isnan().all()
    assert torch.isfinite(y[:, [0, 1, 3, 4, 5, 6, 7]]).all()


def test_only_x_is_kept_for_backward(cpp):
    x, kept = quantized(2, 8, 6, 6), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        batch_norm(x.requires_grad_(), EIGHT, EIGHT, training=True, relu=True, impl="cpp")
    assert [t.data_ptr() for t in kept if t.numel() > 8] == [x.data_ptr()]


EIGHT = torch.ones(8)
BAD = {
    "rank 3": ({"x": torch.ones(8, 4, 4)}, ValueError, r"x must be \(N, C, H, W\)"),
    "integers": ({"x": torch.ones(2, 8, 4, 4).long()}, TypeError, "x must be of a float dtype"),
    "weight size": ({"weight": torch.ones(7)}, ValueError, r"weight must be \(8,\)"),
    "bias rank": ({"bias": torch.ones(1, 8)}, ValueError, r"bias must be \(8,\)"),
    "running size": ({"running_mean": torch.ones(7), "running_var": EIGHT}, ValueError, r"running_mean must be \(8,\)"),
    "one of two": ({"running_mean": EIGHT}, ValueError, "running_mean and running_var must both be given"),
    "no statistics": ({"training": False}, ValueError, "without training, running_mean and running_var must be given"),
    "float sizes": ({"sizes": torch.ones(2, 2)}, TypeError, "sizes must be int32 or int64"),
    "sizes of one": ({"sizes": torch.tensor([4, 4])}, ValueError, r"sizes must be \(2, 2\)"),
    "valid integers": ({"valid": torch.ones(2).long()}, TypeError, "valid must be bool"),
    "valid rank": ({"valid": torch.ones(2, 1).bool()}, ValueError, r"valid must be \(2,\)"),
    "weigh": ({"weigh": "rows"}, ValueError, "weigh must be one of cells, maps, processes, got 'rows'"),
    "one value": ({"x": torch.ones(1, 8, 1, 1)}, ValueError, "Expected more than 1 value per channel when training"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_names_the_argument(bad):
    change, error, message = BAD[bad]
    arguments = {"x": torch.ones(2, 8, 4, 4), "weight": EIGHT, "bias": EIGHT, "training": True} | change
    with pytest.raises(error, match=message):
        batch_norm(**arguments)


@pytest.mark.parametrize("shape", [(2, image_norm.WIDEST + 1, 1, 1), (0, 1, 1, 1)], ids=["wide", "long"])
def test_what_a_gpu_cannot_take_runs_eager(shape, monkeypatch):
    monkeypatch.setattr(ops, "MOST_CELLS", -1 if shape[0] == 0 else 2**30)
    with pytest.raises(KernelUnavailableError, match="triton cannot run: it takes at most"):
        batch_norm(torch.ones(shape), None, None, training=True, impl="triton")
    assert batch_norm(torch.ones(shape), None, None, training=True, impl="eager").shape == shape


def test_the_reference_takes_any_strides():
    x = quantized(2, 6, 4, 5)
    torch.testing.assert_close(reference.moments(x.transpose(2, 3)), reference.moments(x))


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
        weight, bias = torch.empty(2, x.shape[1])
        others = {"training": True, "relu": True, "eps": EPS, "sizes": sizes}
        differentiate(Case(OP, {"x": x, "weight": weight, "bias": bias}, others), "triton", lambda _: [dy])

    check_compiled(OP, target, nhwc, run, (6,))
