"""Weights are cast to 16 bits in groups: with the numbers of autocast's casts, bit for bit."""

import copy
from collections import Counter

import pytest
import torch
from support.engine_fakes import fake_config
from support.tiny_detectors import DETECTORS, detector, samples
from torch import nn
from torch.utils.checkpoint import checkpoint

from mimdet.bench.experiments.launches import Launches
from mimdet.bench.fake_gpu import fake_gpu, to_fake_gpu, train_step
from mimdet.config import apply_overrides
from mimdet.engine import weight_casts
from mimdet.engine.runtime import build_fabric
from mimdet.engine.step import TrainStep
from mimdet.engine.weight_casts import WeightCasts

SIZES = [(75, 141), (64, 96)]
aten = torch.ops.aten


@pytest.fixture
def small_groups(monkeypatch):
    """Of one or two weights of a small model."""
    monkeypatch.setattr(weight_casts, "_GROUP", 2**8)


@pytest.fixture
def autocast_alone(monkeypatch):
    """A function after which every step casts as autocast does."""
    return lambda: monkeypatch.setattr(WeightCasts, "learn", lambda *_: None)


def training(tmp_path, model, clip=None, dtype="bf16"):
    """The step of ``mimdet train``, with its model and optimizer, on the CPU."""
    cfg = apply_overrides(fake_config(tmp_path), [f"train.amp.dtype={dtype}"])
    fabric = build_fabric(cfg.train)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01, foreach=True)
    return TrainStep(fabric, *fabric.setup(model, optimizer), clip)


def state_after(tmp_path, model, batch, between=lambda step, model: None, clip=None, steps=3):
    """Losses and gradients of every step, and the last weights, moments and buffers."""
    torch.manual_seed(5)
    step, seen = training(tmp_path, model, clip), []
    for number in range(steps):
        losses = step(batch).read(0)[0]
        seen += [torch.tensor([*losses.values()]), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        between(number, model)
    moments = [v for state in step.optimizer.state.values() for v in state.values()]
    groups = step._casts._groups
    return [*seen, *model.state_dict().values(), *moments], groups


def assert_same_as_autocast(tmp_path, model, batch, autocast_alone, **options):
    """And that weights are cast in groups: the number of weights."""
    other = copy.deepcopy(model)
    ours, groups = state_after(tmp_path, model, batch, **options)
    autocast_alone()
    theirs, none = state_after(tmp_path, other, batch, **options)
    assert none is None
    assert len(ours) == len(theirs)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    return sum(len(weights) for group in groups for weights in group.weights.values())


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_trains_bit_for_bit_as_with_autocast_alone(tmp_path, autocast_alone, name):
    model = detector(name).train()
    assert assert_same_as_autocast(tmp_path, model, samples(SIZES, 2), autocast_alone, clip=1.0) > 30


@pytest.mark.parametrize(
    "options",
    [
        ["encoder.checkpointing=true"],
        ["batch_mode=packed", "encoder.recompute=none"],
    ],
    ids=["checkpointing", "packed"],
)
def test_so_do_other_backbones(tmp_path, autocast_alone, small_groups, options):
    model = detector("retinanet", *(f"model.backbone.bottom_up.{option}" for option in options)).train()
    assert assert_same_as_autocast(tmp_path, model, samples(SIZES, 2), autocast_alone, steps=2) > 30


class Net(nn.Module):
    """Two layers, of which the first runs several times, as heads do over the levels of a pyramid."""

    def __init__(self, width=16):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.shared = nn.Linear(8, 8)
        self.last = nn.Linear(8, width)

    def features(self, images):
        x = self.conv(torch.stack(images).float() / 255).flatten(2).mean(2)
        return self.shared(self.shared(x).relu()).relu()

    def forward(self, images, targets=None):
        return {"loss": self.last(self.features(images)).float().square().mean()}


def small_batch(count=2, seed=0):
    torch.manual_seed(seed)
    return [{"image": torch.randint(0, 256, (3, 8, 10)), "image_id": i} for i in range(count)]


def freeze(number, model):
    model.conv.requires_grad_(False)


def load(number, model):
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})


def edit(number, model):
    with torch.no_grad():
        model.last.weight.mul_(2)


def replace(number, model):
    if number == 0:  # as load_state_dict(assign=True); the optimizer holds the earlier one
        model.last.weight = nn.Parameter(model.last.weight.detach() * 2)


def evaluate(number, model):
    model.eval()
    with torch.no_grad():
        assert model([sample["image"] for sample in small_batch()])["loss"].dtype == torch.float32
    model.train()


def average(number, model):
    averaged = copy.deepcopy(model)
    assert all(p.dtype == torch.float32 and p.is_leaf for p in averaged.parameters())


@pytest.mark.parametrize("between", [freeze, load, edit, replace, evaluate, average])
def test_weights_that_change_between_steps_are_cast_anew(tmp_path, autocast_alone, small_groups, between):
    count = assert_same_as_autocast(tmp_path, Net(), small_batch(), autocast_alone, between=between, steps=4)
    assert count == (4 if between is freeze else 6)


def test_a_frozen_weight_is_left_to_autocast(tmp_path, autocast_alone):
    model = Net()
    model.shared.requires_grad_(False)
    assert assert_same_as_autocast(tmp_path, model, small_batch(), autocast_alone) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_that_add_up_over_batches_are_those_of_autocast(small_groups, dtype):
    def gradients(learns):
        torch.manual_seed(0)
        model = Net()
        casts = WeightCasts(model)
        for seed in range(3):
            model.zero_grad()
            with casts.step():
                for batch in (small_batch(2, seed), small_batch(3, seed + 10)):
                    with torch.autocast("cpu", dtype):
                        loss = model([sample["image"] for sample in batch])["loss"]
                    if learns:
                        casts.learn(loss)
                    loss.backward()
        assert bool(casts._groups) == learns
        return [p.grad for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False), strict=True))


class Tied(Net):
    """``last.weight`` is ``shared.weight``."""

    def __init__(self):
        super().__init__(8)
        self.last.weight = self.shared.weight


class ReadInFloat32(Net):
    def forward(self, images, targets=None):
        loss = super().forward(images)["loss"] + self.last.weight.square().sum() * 0.01
        return {"loss": loss + self.conv.weight.mul(3).float().mean()}


class CastTwice(Net):
    def forward(self, images, targets=None):
        x = self.features(images).bfloat16()
        x = [nn.functional.linear(x, self.last.weight.bfloat16()) for _ in range(2)]
        return {"loss": (x[0] + x[1].relu()).float().square().mean() + self.last.bias.sum()}


class OutsideOfItsModule(Net):
    """The weights of ``last`` are read where no ``forward`` of it runs."""

    def forward(self, images, targets=None):
        return {"loss": nn.functional.linear(self.features(images), self.last.weight, self.last.bias).float().mean()}


class FirstWithoutGradients(Net):
    """The module that casts first runs under ``no_grad`` before it runs with gradients."""

    def forward(self, images, targets=None):
        with torch.no_grad():
            scale = super().features(images).float().mean()
        return {"loss": super().forward(images)["loss"] * scale}


class Checkpointed(Net):
    def features(self, images):
        x = self.conv(torch.stack(images).float() / 255).flatten(2).mean(2)
        return checkpoint(lambda x: self.shared(self.shared(x).relu()).relu(), x, use_reentrant=False)


class Penalty(Net):
    """A second-order gradient."""

    def forward(self, images, targets=None):
        x = torch.stack(images).float().requires_grad_()
        loss = self.last(self.shared(self.conv(x / 255).flatten(2).mean(2))).float().square().mean()
        (of_weight,) = torch.autograd.grad(loss, self.last.weight, create_graph=True)
        return {"loss": loss + of_weight.square().sum()}


class HalfLinear(nn.Linear):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return nn.functional.linear(x.half(), self.weight.half(), self.bias.half())


class TwoDtypes(Net):
    """bfloat16 and float16."""

    def __init__(self):
        super().__init__()
        self.last = HalfLinear(8, 16)


class PartlyUsed(Net):
    """One layer of a group gets no gradient in the second step."""

    calls = 0

    def forward(self, images, targets=None):
        self.calls += 1
        x = self.features(images)
        return {"loss": (self.last(x) if self.calls != 2 else x).float().square().mean()}


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        (Tied, 4),
        (ReadInFloat32, 4),
        (CastTwice, 4),
        (OutsideOfItsModule, 6),
        (FirstWithoutGradients, 6),
        (Checkpointed, 6),
        (Penalty, 6),
        (TwoDtypes, 6),
        (PartlyUsed, 6),
    ],
)
def test_unusual_uses_of_weights_keep_their_numbers(tmp_path, autocast_alone, kind, count):
    assert assert_same_as_autocast(tmp_path, kind(), small_batch(), autocast_alone) == count


def test_a_weight_is_16_bit_only_while_its_module_runs(tmp_path):
    model = Net()
    seen = []
    step = training(tmp_path, model)
    step(small_batch())
    before = dict(model.named_parameters())

    def spy(module, inputs, output):
        seen.append([p.dtype for p in model.parameters()])

    model.last.register_forward_hook(spy)
    inside = nn.Linear.forward

    class Spy(nn.Linear):
        def forward(self, x):
            seen.append([self.weight.dtype, self.bias.dtype])
            return inside(self, x)

    model.last.__class__ = Spy
    step(small_batch())
    assert seen == [[torch.bfloat16] * 2, [torch.float32] * 6]
    assert all(p is before[name] and p.grad.dtype == torch.float32 for name, p in model.named_parameters())
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(not group.copies for group in step._casts._groups)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_error_in_a_step_leaves_the_model_as_it_was(tmp_path, where):
    model = Net()
    step = training(tmp_path, model)
    step(small_batch())
    before, state = dict(model.named_parameters()), vars(model.last).copy()

    def fail(*_):
        raise KeyboardInterrupt

    if where == "forward":
        model.last.weight_hook = model.last.register_forward_pre_hook(fail)
    else:
        handle = model.shared.register_forward_hook(lambda module, inputs, output: output.register_hook(fail) and None)
    with pytest.raises(KeyboardInterrupt):
        step(small_batch())
    if where == "backward":
        handle.remove()
        assert vars(model.last).keys() == state.keys()
    assert all(p is before[name] for name, p in model.named_parameters())
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_forward_that_the_user_replaced_stays_replaced(tmp_path):
    model = Net()
    calls = []
    forward = model.last.forward

    def counted(x):
        calls.append(model.last.weight.dtype)
        return forward(x)

    model.last.forward = counted
    step = training(tmp_path, model)
    for _ in range(2):
        step(small_batch())
    assert calls == [torch.float32, torch.bfloat16]
    assert model.last.forward is counted


def test_float32_casts_nothing(tmp_path):
    model = Net()
    step = training(tmp_path, model, dtype="auto")
    for _ in range(2):
        step(small_batch())
    assert step._casts._groups == []


def test_a_compiled_module_is_left_to_the_compiler(tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Net()
    model.last = torch.compile(model.last, backend="aot_eager")
    step = training(tmp_path, model)
    for _ in range(2):
        step(small_batch())
    assert sum(len(weights) for group in step._casts._groups for weights in group.weights.values()) == 4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_gradients_arrive_while_backward_goes_on(tmp_path, small_groups):
    """DDP sends those of the last layers while those of the first are computed."""
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    events = []
    for number, layer in enumerate(model):
        layer.weight.register_post_accumulate_grad_hook(lambda _, number=number: events.append(("weight", number)))
        layer.register_full_backward_hook(lambda *_, number=number: events.append(("input", number)))
    casts = WeightCasts(model)
    for _ in range(2):
        events.clear()
        with casts.step():
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(torch.randn(3, 16, requires_grad=True)).float().sum()
            casts.learn(loss)
            loss.backward()
    assert len(casts._groups) > 4
    assert events.index(("weight", 3)) < events.index(("input", 1))
    assert events.index(("weight", 2)) < events.index(("input", 0))


def casts_of(counts):
    """Casts by direction and operation."""
    total = Counter()
    for (_, direction, function), calls in counts.items():
        if function in (aten._to_copy.default, aten._foreach_copy_.default):
            total[direction, function] += calls
    return total


def test_a_step_on_a_gpu_casts_each_group_once(monkeypatch):
    monkeypatch.setattr(weight_casts, "_GROUP", 2**16)
    model = detector("retinanet", "model.backbone.bottom_up.encoder.checkpointing=true").train()
    counts = []
    with fake_gpu():
        to_fake_gpu(model)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        step = train_step(model, optimizer, dtype=torch.bfloat16)
        step(samples(SIZES, 2))
        step._casts._groups = None  # the next step learns again
        for _ in range(2):
            with Launches(model, optimizer) as launches:
                step(samples(SIZES, 2))
            counts.append(casts_of(launches.counts))
    before, after = counts
    groups = step._casts._groups
    weights = sum(len(names) for group in groups for names in group.weights.values())
    recomputed = 2 * 7 + 5  # of two blocks and of ConvStem
    single, many = aten._to_copy.default, aten._foreach_copy_.default
    assert weights == 46
    assert after["forward", many] - before["forward", many] == after["backward", many] == len(groups) > 1
    assert before["forward", single] - after["forward", single] == weights
    assert before["backward", single] - after["backward", single] == weights + recomputed
