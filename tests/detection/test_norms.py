"""Norms of the detectors as modules: running statistics, processes, and what follows a convolution."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from mimdet.detection import NaiveSyncBatchNorm
from mimdet.detection.layers import BatchNorm2d, Conv2d, get_norm
from mimdet.modeling.areas import ValidArea

# Name -> stats_mode, rows of both processes, whether rows are chosen by ``valid``, shapes of maps in each process.
RUNS = {
    "alike": ("", (3, 3), False, ((4, 5), (4, 5))),
    "alike, other canvases": ("", (2, 2), False, ((4, 5), (3, 7))),
    "by rows": ("N", (1, 5), False, ((4, 5), (4, 5))),
    "one without rows": ("N", (0, 4), False, ((4, 5), (4, 5))),
    "by valid rows": ("N", (1, 5), True, ((4, 5), (4, 5))),
    "one without valid rows": ("N", (0, 4), True, ((4, 5), (4, 5))),
    "no rows": ("N", (0, 0), False, ((4, 5), (4, 5))),
    "no valid rows": ("N", (0, 0), True, ((4, 5), (4, 5))),
    "with padding": ("", (2, 1), False, ((5, 7), (8, 1))),
}
SLOTS = 6
CPU = torch.device("cpu")
# The maps "with padding"; the second process's one has none.
AREAS = (ValidArea([(5, 3), (2, 7)], (5, 7), CPU), ValidArea([(8, 1)], (8, 1), CPU))


def maps(rank, rows, grid):
    """x and the weights of a loss, float64."""
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(2, rows, 3, *grid, generator=generator, dtype=torch.float64) * 2 + 3 * rank + 1).unbind()


def layer(mode):
    norm = NaiveSyncBatchNorm(3, stats_mode=mode)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -0.5, 2.0]))
        norm.bias.copy_(torch.tensor([0.1, 0.5, -1.0]))
    return norm


def one(rank, name):
    """What a process finds; of the rows that are valid."""
    mode, rows, by_valid, grids = RUNS[name]
    x, weight = (t.float() for t in maps(rank, rows[rank], grids[rank]))
    area = AREAS[rank] if name == "with padding" else None
    norm, valid = layer(mode), torch.ones(len(x), dtype=torch.bool)
    if by_valid:
        # In slots, of which the last hold NaN.
        valid = torch.arange(SLOTS) < rows[rank]
        x = torch.full((SLOTS, *x.shape[1:]), float("nan")).masked_scatter(valid.view(-1, 1, 1, 1), x)
        weight = torch.full_like(x, float("nan")).masked_scatter(valid.view(-1, 1, 1, 1), weight)
    x.requires_grad_()
    y = norm(x, area, valid=valid if by_valid else None, relu=True)
    y = y if area is None else area.zero_padding(y)
    (y[valid] * weight[valid]).sum().backward()
    assert not y[~valid].any()
    assert not x.grad[~valid].any()
    return {
        "y": y.detach()[valid],
        "dx": x.grad[valid],
        "dweight": norm.weight.grad,
        "dbias": norm.bias.grad,
        "mean": norm.running_mean,
        "var": norm.running_var,
        "batches": norm.num_batches_tracked,
    }


def worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    calls = []
    for function in ("all_gather_into_tensor", "all_reduce"):
        original = getattr(dist, function)
        setattr(dist, function, lambda *a, f=function, o=original, **k: (calls.append(f), o(*a, **k))[1])
    results = {}
    for name in RUNS:
        calls.clear()
        results[name] = one(rank, name) | {"calls": list(calls)}
    torch.save(results, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """{name: what each of two processes results}, from one start of them."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=2)
    parts = [torch.load(folder / str(rank)) for rank in range(2)]
    return {name: [part[name] for part in parts] for name in RUNS}


def expected(name):
    """The same in one process and float64, by differentiating through the weighted statistics."""
    mode, rows, _, grids = RUNS[name]
    weight, bias = (t.double().detach().requires_grad_() for t in (layer(mode).weight, layer(mode).bias))
    xs, losses = zip(*(maps(rank, rows[rank], grids[rank]) for rank in range(2)), strict=True)
    xs = [x.requires_grad_() for x in xs]
    masks = [torch.ones_like(x[:, :1]) for x in xs]
    shares = [float(len(x)) if mode == "N" else 1.0 for x in xs]
    if name == "with padding":
        masks = [(~area.padding).double() for area in AREAS]
        shares = [float(mask.sum()) for mask in masks]
    total = max(sum(shares), 1.0)

    def average(values):
        sums = [(v * m).sum((0, 2, 3)) / max(float(m.sum()), 1.0) for v, m in zip(values, masks, strict=True)]
        return sum(w * s for w, s in zip(shares, sums, strict=True)) / total

    mean = average(xs)
    centered = [x - mean.view(-1, 1, 1) for x in xs]
    var = average([c.square() for c in centered])
    gain = (weight * (var + 1e-5).rsqrt()).view(-1, 1, 1)
    ys = [(c * gain + bias.view(-1, 1, 1)).relu() * m for c, m in zip(centered, masks, strict=True)]
    results = []
    for rank in range(2):
        # Gradients of parameters are each process's alone: DDP adds them up.
        gradients = torch.autograd.grad((ys[rank] * losses[rank]).sum(), (weight, bias), retain_graph=True)
        results.append(
            {"y": ys[rank].detach(), "dweight": gradients[0], "dbias": gradients[1], "mean": mean, "var": var}
        )
    grads = torch.autograd.grad(sum((y * w).sum() for y, w in zip(ys, losses, strict=True)), xs)
    return [f | {"dx": g} for f, g in zip(results, grads, strict=True)], sum(rows) > 0


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_share_statistics_and_gradients(processes, name):
    correct, moved = expected(name)
    for actual, exact in zip(processes[name], correct, strict=True):
        for key in ("y", "dx", "dweight", "dbias"):
            torch.testing.assert_close(
                actual[key].double(), exact[key], rtol=1e-5, atol=1e-5, msg=lambda m, k=key: k + m
            )
        running = (0.1 * exact["mean"], 0.9 + 0.1 * exact["var"]) if moved else (torch.zeros(3), torch.ones(3))
        for key, value in zip(("mean", "var"), running, strict=True):
            torch.testing.assert_close(actual[key].double(), value.detach().double(), rtol=1e-6, atol=1e-6)
        # In several processes a batch without rows counts.
        assert actual["batches"] == 1


@pytest.mark.parametrize("name", RUNS)
def test_both_processes_have_the_same_bits_from_one_collective_each_way(processes, name):
    first, second = processes[name]
    assert torch.equal(first["mean"], second["mean"])
    assert torch.equal(first["var"], second["var"])
    assert first["calls"] == second["calls"] == ["all_gather_into_tensor", "all_reduce"]


@pytest.mark.parametrize("kind", [BatchNorm2d, NaiveSyncBatchNorm])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"momentum": 0.3, "eps": 0.1}, {"affine": False}, {"track_running_stats": False}],
    ids=str,
)
def test_one_process_is_pytorchs_batch_norm(kind, options):
    torch.manual_seed(0)
    ours, theirs = kind(6, **options), nn.BatchNorm2d(6, **options)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for training in (True, True, False):
        x = (torch.randn(3, 6, 4, 5) * 2 + 1).requires_grad_()
        ours.train(training), theirs.train(training)
        for relu in (False, True):
            runs = []
            for run in (lambda x: ours(x, relu=relu), lambda x: theirs(x).relu() if relu else theirs(x)):  # noqa: B023
                y = run(x)
                leaves = (x, *ours.parameters()) if not runs else (x, *theirs.parameters())
                runs.append([y, *torch.autograd.grad(y.square().sum() + y.sum(), leaves)])
            for actual, exact in zip(*runs, strict=True):
                torch.testing.assert_close(actual, exact, rtol=1e-5, atol=1e-4)
        for key, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], value)


def test_nothing_to_learn_from_moves_nothing():
    norm = NaiveSyncBatchNorm(3, stats_mode="N")
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    norm(torch.zeros(0, 3, 4, 5)).sum().backward()
    x = torch.full((2, 3, 4, 5), float("nan"), requires_grad=True)
    norm(x, valid=torch.zeros(2, dtype=torch.bool)).sum().backward()
    assert not x.grad.any()
    assert not norm.weight.grad.any()
    for key, value in norm.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", ["BN", "SyncBN", "naiveSyncBN_N"])
def test_one_value_a_channel_cannot_be_normalized(name):
    norm = get_norm(name, 3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        norm(torch.ones(1, 3, 1, 1))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        norm(torch.ones(1, 3, 4, 4), ValidArea([(1, 1)], (4, 4), torch.device("cpu")))
    norm.eval()(torch.ones(1, 3, 1, 1))


AREA = AREAS[0]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("area", [None, AREA], ids=["whole", "area"])
@pytest.mark.parametrize("activation", [None, F.relu, F.gelu], ids=["none", "relu", "gelu"])
@pytest.mark.parametrize("norm", ["", "BN", "naiveSyncBN_N", "GN", nn.BatchNorm2d])
def test_convolutions_give_what_their_parts_give(norm, activation, area, training):
    torch.manual_seed(0)
    conv = Conv2d(4, 32, 3, padding=1, norm=get_norm(norm, 32), activation=activation).train(training)
    x = torch.randn(2, 4, 5, 7)
    y = actual = F.conv2d(x, conv.weight, conv.bias, padding=1)
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool) if area is None else ~area.padding
    if norm == "GN":
        y = torch.stack([F.pad(F.group_norm(m[None, :, :h, :w], 32, conv.norm.weight, conv.norm.bias),
                               (0, 7 - w, 0, 5 - h))[0]
                         for m, (h, w) in zip(y, AREA.sizes if area else [(5, 7)] * 2, strict=True)])  # fmt: skip
    elif norm != "":
        cells = y.permute(0, 2, 3, 1)[mask[:, 0]]
        cells = F.batch_norm(cells, torch.zeros(32), torch.ones(32), conv.norm.weight, conv.norm.bias, training)
        y = torch.zeros(2, 5, 7, 32).masked_scatter(mask.permute(0, 2, 3, 1), cells).permute(0, 3, 1, 2)
    y = (y if activation is None else activation(y)).masked_fill(~mask, 0)
    actual = conv(x, area)
    torch.testing.assert_close(actual, y, rtol=1e-5, atol=1e-5)
    assert not actual.masked_select(~mask).any()


@pytest.mark.parametrize("norm", ["", "BN", "naiveSyncBN_N", "GN"])
def test_convolutions_of_valid_maps_give_what_those_maps_give_alone(norm):
    torch.manual_seed(0)
    valid = torch.tensor([True, False, True, False])
    x = torch.randn(4, 4, 5, 7)
    for activation in (None, F.relu, F.gelu):
        conv = Conv2d(4, 32, 3, padding=1, norm=get_norm(norm, 32), activation=activation)
        actual = conv(x, valid=valid)
        torch.testing.assert_close(actual[valid], conv(x[valid]), rtol=1e-5, atol=1e-5)
        assert not actual[~valid].any()


def test_a_batch_norm_that_does_not_know_valid_maps_is_refused():
    conv = Conv2d(4, 8, 1, norm=nn.BatchNorm2d(8))
    with pytest.raises(ValueError, match="BatchNorm2d does not know valid maps"):
        conv(torch.ones(2, 4, 3, 3), valid=torch.tensor([True, False]))


def test_a_convolution_norm_and_relu_keep_two_maps_for_backward():
    """The convolution's input and output: what is behind the ReLU is not kept for the ReLU."""
    conv = Conv2d(4, 64, 3, padding=1, bias=False, norm=get_norm("naiveSyncBN", 64), activation=F.relu)
    kept = {}
    x = torch.randn(2, 4, 16, 16)

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = conv(x)
    assert sum(n == y.numel() for n in kept.values()) == 1
    assert y.untyped_storage().data_ptr() not in kept
