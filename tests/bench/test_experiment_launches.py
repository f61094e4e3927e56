"""``mimdet bench launches``: what a training step dispatches."""

from collections import Counter
from functools import cache

import pytest
import torch
from tiny_model import CONFIG, OVERRIDES
from torch import nn
from torch.autograd.function import FunctionCtx

from mimdet.bench.experiments import launches
from mimdet.bench.experiments.launches import Launches, Options, kind_of
from mimdet.bench.fake_gpu import backward, fake_gpu, to_fake_gpu
from mimdet.bench.operations import UPDATE
from mimdet.bench.plot import plot
from mimdet.bench.row import Results
from mimdet.bench.workload import idle_optimizer
from mimdet.detection.fpn import FPN
from mimdet.kernels import bias_gelu, dispatch

# Small and fused operations of MIMDet-Base, Mask R-CNN, forward, and forward with backward: a change may lower them.
MOST = {"fp32": (600, 900), "bf16": (610, 960)}
PACKED = "model.backbone.bottom_up.batch_mode=packed"
aten = torch.ops.aten


def options(batch, **changes):
    return Options(**{"device": "cpu", "size": (800, 1344), "batch": batch} | changes)


def tiny(*overrides, **changes):
    """Counts of a small detector, by component, direction and operator."""
    chosen = {"size": (64, 96), "config": CONFIG, "overrides": (*OVERRIDES, *overrides)}
    return Counter(launches.count(options(2, **chosen | changes)))


@cache
def plain():
    """Counts of the small detector as it is."""
    return tiny()


@cache
def small_and_fused(batch, dtype="fp32"):
    """Of the Base config: forward, and forward with backward."""
    chosen = options(batch, dtype=dtype)
    rows = launches.rows_of("MIMDet", launches.count(chosen), chosen)
    rows = [row for row in rows if row["kind"] in ("small", "fused")]
    forward, behind = (sum(r["count"] for r in rows if r["direction"] == d) for d in ("forward", "backward"))
    return forward, forward + behind


@pytest.mark.parametrize("dtype", MOST)
def test_a_training_step_dispatches_no_more_than_before(dtype):
    forward, both = small_and_fused(2, dtype)
    assert forward <= MOST[dtype][0]
    assert both <= MOST[dtype][1]


def test_a_larger_batch_dispatches_no_more():
    two = small_and_fused(2)
    assert small_and_fused(4) == two
    assert all(abs(one - many) <= 5 for one, many in zip(small_and_fused(1), two, strict=True))


OPERATORS = {
    "view": (aten.view, aten.split, aten.detach, aten._unsafe_view, aten.empty_like),
    "small": (aten.add_, aten.clone, aten.native_layer_norm),
    "gemm": (aten.addmm, aten.baddbmm, aten.convolution, aten.convolution_backward),
    "fused": (aten._scaled_dot_product_flash_attention, aten._fused_adamw_, torch.ops.mimdet.bias_gelu,
              torch.ops.mimdet.attention_varlen_backward),
}  # fmt: skip


@pytest.mark.parametrize(("packet", "kind"), [(packet, kind) for kind, many in OPERATORS.items() for packet in many])
def test_kinds(packet, kind):
    assert kind_of(getattr(packet, packet.overloads()[0])) == kind


@pytest.mark.parametrize(
    ("plant", "expected"),
    [
        (lambda x: x.neg(), {("forward", aten.neg.default): 1, ("backward", aten.neg.default): 1}),
        (
            lambda x: x.unsqueeze(0).squeeze(0),
            {
                ("forward", aten.unsqueeze.default): 1,
                ("forward", aten.squeeze.dim): 1,
                ("backward", aten.unsqueeze.default): 1,
                ("backward", aten.squeeze.dim): 1,
            },
        ),
        (lambda x: (torch.ones(3) + 1, x)[1], {}),
    ],
    ids=["operation", "view", "on the host"],
)
def test_a_planted_operation_is_counted_where_it_is(monkeypatch, plant, expected):
    before = plain()
    forward = FPN.forward

    def planted(self, *args):
        features = forward(self, *args)
        return features | {"p3": plant(features["p3"])}

    monkeypatch.setattr(FPN, "forward", planted)
    assert tiny() - before == {("pyramid", *place): n for place, n in expected.items()}


def test_the_update_is_that_of_a_gpu():
    """PyTorch groups a real GPU's tensors for one norm and one optimizer step of each parameter group."""
    update = Counter({function: n for (_, direction, function), n in plain().items() if direction == UPDATE})
    assert update[aten._foreach_norm.Scalar] == 1
    assert update[aten._fused_adamw_.default] == 6
    assert update[aten.linalg_vector_norm.default] <= 1


def test_packed_batches_and_mixed_precision_are_counted():
    packed, mixed = tiny(PACKED), tiny(dtype="bf16")
    assert packed.total() > plain().total()
    casts = Counter({place: n for place, n in mixed.items() if place[2] == aten._to_copy.default})
    assert (casts - plain()).total() > 10
    for direction in ("forward", "backward"):  # of weights and of their gradients
        assert sum(n for (_, *place), n in mixed.items() if place == [direction, aten._foreach_copy_.default]) == 1


class _Scale(torch.autograd.Function):
    """Two outputs, of which one gets no gradient."""

    materialize = True

    @classmethod
    def forward(cls, ctx, x):
        ctx.set_materialize_grads(cls.materialize)
        return x * 2, x * 3

    @staticmethod
    def backward(ctx, first, second):
        gradients = [g * factor for g, factor in ((first, 2), (second, 3)) if g is not None]
        return sum(gradients[1:], gradients[0])


class _ScaleWithoutZeros(_Scale):
    materialize = False


class _Net(nn.Module):
    """A shared weight, broadcasting, a weight whose gradient has other strides, two dtypes, custom functions."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.transposed = nn.Parameter(torch.randn(8, 8).t())
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        x = self.linear(self.linear(x)) * self.scale + self.scale
        x = _Scale.apply(x)[0] + _ScaleWithoutZeros.apply(x)[1]
        left, right = (x @ self.transposed).double().chunk(2, 1)
        return (left.exp() * right.float()).sum() + (self.transposed * 2).sum() + self.linear.bias.sum()


def test_the_backward_pass_is_that_of_autograds_engine():
    """By operator and component, and so are the strides of the gradients."""

    def count(model, x, run, device):
        with Launches(model, idle_optimizer(model), device) as mode:
            run(model(x))
        return mode.counts

    torch.manual_seed(0)
    model, x = _Net(), torch.randn(4, 8)
    expected = count(model, x, torch.Tensor.backward, "cpu")
    with fake_gpu():
        fake = to_fake_gpu(_Net())
        actual = count(fake, torch.randn(4, 8, device="cuda"), backward, "cuda")
        grads = {name: p.grad if p.grad is None else tuple(p.grad.stride()) for name, p in fake.named_parameters()}
    assert sum(n for (_, direction, _), n in expected.items() if direction == "backward") > 20
    assert not any(p.grad is not None and p.grad.requires_grad for p in fake.parameters())
    assert actual == expected
    assert grads == {name: p.grad if p.grad is None else p.grad.stride() for name, p in model.named_parameters()}


def test_everything_is_restored_after_an_error():

    @fake_gpu()
    def fail():
        assert all(getattr(place, name) is not value for (place, name), value in zip(places, before, strict=True))
        bias_gelu(torch.ones(2, 8, device="cuda"), torch.ones(8, device="cuda"))
        assert dispatch._resolved
        raise RuntimeError("an error inside")

    places = ((dispatch, "no_gpu"), (FunctionCtx, "set_materialize_grads"), (torch.cuda, "Event"))
    before = [getattr(place, name) for place, name in places]
    with pytest.raises(RuntimeError, match="an error inside"):
        fail()
    assert [getattr(place, name) for place, name in places] == before
    assert not dispatch._resolved  # the choice of kernels for a GPU
    assert type(torch.ones(2) + 1) is torch.Tensor


def test_by_command(experiment, bench, tmp_path, capsys):
    words = ("launches", "--size", "64x96", "--batch", 2, "--config", CONFIG, *OVERRIDES)
    out, results, text = experiment(*words)
    assert all(word in out for word in (CONFIG, "64x96, batch 2, fp32", "MIMDet, forward, RPN", "MIMDet, update"))
    sums = Counter()
    for row in results.rows:
        assert (row["experiment"], row["model"], row["mode"], row["status"]) == ("launches", "MIMDet", "train", "ok")
        assert (row["config"], row["size"], row["batch"], row["dtype"]) == (CONFIG, "64x96", 2, "fp32")
        assert row["count"] > 0
        sums[row["direction"]] += row["count"] * (row["kind"] in ("small", "fused"))
    assert {row["component"] for row in results.rows} == {*launches.COMPONENTS, UPDATE} - {"dense head"}
    assert {row["kind"] for row in results.rows} == set(launches.KINDS)
    assert "small and fused: {forward} forward, {backward} backward, {update} update".format(**sums) in out
    assert experiment(*words, suffix=".csv")[1].rows == results.rows
    assert "| MIMDet, forward, encoder |" in text
    assert bench("compare", tmp_path / "launches.json", tmp_path / "launches.csv") == 0
    out = capsys.readouterr().out
    assert f"{len(results.rows)} rows in both" in out
    assert "launches.csv count" in out


def test_the_original_is_counted_beside_ours(tmp_path, capsys):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from support import detectron2_testing as d2

    small = {"size": (64, 96), "overrides": tuple(d2.ORIGINAL_SMALL)}
    chosen = options(1, original=d2.folder("MIMDET_ORIGINAL"), output=tmp_path / "both.json", **small)
    launches.run(chosen)
    rows = Results.read(chosen.output).rows
    sizes = {(row["model"], row["size"]) for row in rows}
    assert sizes == {("MIMDet", "64x96"), ("original", "224x320")}
    sums = Counter()
    for row in rows:
        sums[row["model"], row["direction"]] += row["count"] * (row["kind"] in ("small", "fused"))
    for direction in ("forward", "backward"):
        assert 0 < sums["MIMDet", direction] < sums["original", direction]
    assert "original, small and fused: " in capsys.readouterr().out
    plot(Results.read(chosen.output), tmp_path / "both.png")
