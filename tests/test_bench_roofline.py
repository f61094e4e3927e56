"""Counted FLOPs and bytes, and whom they belong to."""

import types

import pytest
import torch
from test_bench_backbone import OVERRIDES
from test_cli import run
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mimdet.bench import roofline
from mimdet.bench.count import OTHER, UPDATE, Counter, flops
from mimdet.bench.models import build_detector
from mimdet.bench.plot import plot
from mimdet.bench.results import Results
from mimdet.bench.roofline import COMPONENTS, STEP
from mimdet.bench.workload import Setting, idle_optimizer, workload
from mimdet.kernels.attention_varlen.api import attention_varlen_packed

LIMITS = {"copy_gb_s": 10.0, "gemm_float32_tflop_s": 0.1}


@pytest.fixture(scope="module")
def detector():
    return build_detector("mimdet_tiny_mask_rcnn", OVERRIDES, 1, "cpu")


def step_of(detector, part):
    optimizer = idle_optimizer(detector)
    work = workload(detector, optimizer, "train", (0.5, 1, "ours"), Setting(device="cpu", part=part, size=(64, 64)))
    return work, optimizer


def count(model, components, optimizer, step):
    with Counter(model, components, optimizer) as counter:
        step()
    return counter.work


@pytest.mark.parametrize("part", ["backbone", "detector"])
def test_flops_are_those_of_torchs_counter(detector, part):
    work, optimizer = step_of(detector, part)
    torch.manual_seed(0)
    with FlopCounterMode(display=False) as theirs:
        work.step()
    torch.manual_seed(0)
    ours = count(work.model, {}, optimizer, work.step)
    # Torch's counter does not know our attention, nor products that are added in place: the stem's weight gradients.
    for alone in ("mm_", "attention_varlen", "attention_varlen_backward"):
        assert sum(w.flops for (_, _, op, _), w in ours.items() if op.endswith(alone)) > 0, alone
    known = {op for _, _, op, _ in ours if not op.endswith("mm_") and "attention_varlen" not in op}
    assert sum(w.flops for (_, _, op, _), w in ours.items() if op in known) == theirs.get_total_flops() > 0


def test_flops_of_products_are_those_of_the_profiler():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Flatten(2), nn.Linear(16, 5))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad(), torch.profiler.profile(with_flops=True) as profiler:
        model(x)
    theirs = sum(event.flops for event in profiler.key_averages() if event.key in ("aten::conv2d", "aten::addmm"))
    with torch.no_grad():
        ours = count(model, {}, idle_optimizer(model), lambda: model(x))
    assert sum(w.flops for w in ours.values()) == theirs > 0


def attention_of(qkv, lengths, impl, backward):
    """Packed attention of sequences, and with ``backward`` its gradient."""
    leaf = qkv.requires_grad_(backward)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    out = attention_varlen_packed(leaf, cu_seqlens, max(lengths), impl=impl)
    if backward:
        out.backward(torch.ones_like(out))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_packed_attention(backward):
    """FLOPs: those of the dense kernel, sequence by sequence. Bytes: each tensor once."""
    heads, head_dim, lengths = 3, 8, (5, 0, 7)
    model, total = nn.Linear(1, 1), sum(lengths)
    channels = heads * head_dim

    def work_of(lengths, impl):
        qkv = torch.randn(sum(lengths), 3, heads, head_dim)
        step = lambda: attention_of(qkv, lengths, impl, backward)  # noqa: E731
        return {op: w for (_, _, op, _), w in count(model, {}, idle_optimizer(model), step).items()}

    packed = work_of(lengths, "cpp")
    dense = [sum(w.flops for w in work_of((n,), "sdpa").values()) for n in lengths if n]
    products = 4 + 10 * backward
    assert sum(w.flops for w in packed.values()) == sum(dense) == products * channels * (5**2 + 7**2)
    lse, bounds = 4 * heads * total, 4 * (len(lengths) + 1)
    forward = packed["mimdet::attention_varlen"]
    assert forward.bytes == 4 * 4 * total * channels + lse + bounds
    if backward:
        # qkv, out and its gradient in, one gradient out.
        assert packed["mimdet::attention_varlen_backward"].bytes == 8 * 4 * total * channels + lse + bounds


@pytest.mark.parametrize("place", [(0, 3), (1, 6)], ids=["forward", "backward"])
def test_packed_attention_of_pytorch_has_the_same_arguments(place):
    """q and cu_seqlens stand where ours stand; the kernels need a GPU."""
    from torch.nn.attention import varlen

    name = "_varlen_attn_backward" if place[0] else "_varlen_attn"
    theirs = getattr(torch.ops.torch_attn, name).default._schema
    assert varlen.varlen_attn
    assert f"torch_attn::{name}" == theirs.name
    assert [theirs.arguments[i].name for i in place] == ["query", "cu_seq_q"]
    q, bounds = torch.zeros(12, 3, 8), torch.tensor([0, 5, 12], dtype=torch.int32)
    arguments = [None] * 7
    arguments[place[0]], arguments[place[1]] = q, bounds
    call = types.SimpleNamespace(_schema=theirs, overloadpacket=None)
    assert flops(call, tuple(arguments), {}, None) == (10 if place[0] else 4) * 24 * (5**2 + 7**2)


BYTES = {
    "each tensor once": (lambda a: a + a.t(), 3 * 64),
    "expanded rows are read once": (lambda a: a + a[:1].expand(4, 4), 2 * 64 + 16),
    "views move nothing": (lambda a: a.view(-1)[2:].unsqueeze(0), 0),
    "in place is read and written": (lambda a: a.mul_(2), 2 * 64),
    "out is written": (lambda a: torch.exp(a, out=torch.empty(4, 4)), 2 * 64),
    "fresh memory moves nothing": (lambda a: a.new_empty(3), 0),
}


@pytest.mark.parametrize("case", BYTES)
def test_bytes(case):
    operation, want = BYTES[case]
    model, square = nn.Linear(1, 1), torch.ones(4, 4)
    with torch.no_grad():
        found = count(model, {}, idle_optimizer(model), lambda: operation(square))
    assert sum(w.bytes for w in found.values()) == want


def test_work_belongs_to_the_module_that_called_it_and_backward_to_its_forward():
    model = nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(6, 2)})
    optimizer = torch.optim.AdamW(model.parameters())

    def step():
        model["b"](model["a"](torch.ones(3, 4))).exp().sum().backward()
        optimizer.step()

    found = count(model, {"first": ["a"], "second": ["b"]}, optimizer, step)
    sums = {}
    for (component, direction, _, _), work in found.items():
        sums[component, direction] = sums.get((component, direction), 0) + work.flops
    assert sums["first", "forward"] == 2 * 3 * 4 * 6
    assert sums["first", "backward"] == 2 * 3 * 4 * 6  # the input needs no gradient
    assert sums["second", "forward"] == 2 * 3 * 6 * 2
    assert sums["second", "backward"] == 2 * 2 * 3 * 6 * 2
    where = {op: {c for c, _, o, _ in found if o == op} for _, _, op, _ in found}
    assert where["aten::exp"] == {OTHER}
    assert UPDATE in {component for component, *_ in found}


def test_hooks_are_gone_afterwards(detector):
    work, optimizer = step_of(detector, "backbone")
    count(work.model, {"all": [""]}, optimizer, work.forward)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in work.model.modules())
    assert not optimizer._optimizer_step_pre_hooks


def test_by_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(roofline, "measure_limits", lambda device, dtypes: LIMITS)
    path = tmp_path / "roofline.csv"
    status = run(
        monkeypatch, "bench", "roofline", "--config", "mimdet_tiny_mask_rcnn", "--size", "64x64", "--rounds", 3,
        "--device", "cpu", "--depth", 1, "--output", path, *OVERRIDES,
    )  # fmt: skip
    assert status == 0
    out = capsys.readouterr().out
    for word in ("encoder blocks forward", "mask head backward", UPDATE, STEP, "Largest gaps"):
        assert word in out
    rows = Results.read(path).rows
    assert {row["component"] for row in rows} == {*COMPONENTS, OTHER, UPDATE, STEP}
    picture = tmp_path / "roofline.png"
    plot(Results.read(path), picture)
    assert picture.stat().st_size > 20_000
    whole, *others = rows
    assert whole["floor_ms"] == pytest.approx(sum(row["floor_ms"] for row in others), rel=1e-3)
    for row in others:
        assert row["floor_ms"] >= row["gflop"] / 0.1 * 0.999
        assert row["floor_ms"] >= row["mib"] * 2**20 / 10e9 * 1e3 * 0.999


def test_a_compiled_model_is_refused(monkeypatch, capsys):
    assert run(monkeypatch, "bench", "roofline", "--model", "clean") != 0
    assert "no clean to measure" in capsys.readouterr().err
