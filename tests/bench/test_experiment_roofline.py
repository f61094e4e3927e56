"""Counted FLOPs and bytes, and their components."""

import pytest
import torch
from tiny_model import CONFIG, OVERRIDES
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from mimdet.bench import workload
from mimdet.bench.experiments.roofline import COMPONENTS, STEP
from mimdet.bench.operations import OTHER, UPDATE, Counter, register_flops
from mimdet.bench.workload import Setting, build_detector, idle_optimizer
from mimdet.kernels import attention_varlen_packed


@pytest.fixture(scope="module")
def detector():
    return build_detector(CONFIG, OVERRIDES, 1, "cpu")


def step_of(detector, part):
    optimizer = idle_optimizer(detector)
    return workload.step_of(detector, optimizer, "train", Setting(device="cpu", part=part, size=(64, 64))), optimizer


def count(model, components, optimizer, step):
    with Counter(model, components, optimizer) as counter:
        step()
    return counter.work


@pytest.mark.parametrize("part", ["backbone", "detector"])
def test_flops_are_those_of_torchs_counter(detector, part):
    """flop_counter with our formulas of packed attention and of in-place products (the stem's weight gradients)."""
    work, optimizer = step_of(detector, part)
    torch.manual_seed(0)
    counted = count(work.model, {}, optimizer, work.step)
    torch.manual_seed(0)
    with FlopCounterMode(display=False) as theirs:
        work.step()
    for name in ("mm_", "attention_varlen", "attention_varlen_backward"):
        assert sum(w.flops for (_, _, op, _), w in counted.items() if op.endswith(name)) > 0, name
    assert sum(w.flops for w in counted.values()) == theirs.get_total_flops()


def attention_of(qkv, lengths, impl, backward):
    """Packed attention, and with ``backward`` its gradient."""
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
        # reads qkv, out, dout; writes dqkv
        assert packed["mimdet::attention_varlen_backward"].bytes == 8 * 4 * total * channels + lse + bounds


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_packed_attention_of_pytorch(backward):
    """varlen_attn needs a GPU, its formula only arguments; ours is for versions of PyTorch without one."""
    register_flops()
    packet = getattr(torch.ops.torch_attn, "_varlen_attn_backward" if backward else "_varlen_attn")
    q, bounds = torch.zeros(12, 3, 8), torch.tensor([0, 5, 12], dtype=torch.int32)
    values = dict.fromkeys(("query", "key", "value", "out", "grad_out"), q)
    values |= {"cu_seq_q": bounds, "cu_seq_k": bounds, "max_q": 7, "max_k": 7}
    arguments = [values.get(argument.name) for argument in packet.default._schema.arguments]
    assert flop_registry[packet](*arguments, out_val=None) == (10 if backward else 4) * 24 * (5**2 + 7**2)


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
    operation, expected = BYTES[case]
    model, square = nn.Linear(1, 1), torch.ones(4, 4)
    with torch.no_grad():
        counted = count(model, {}, idle_optimizer(model), lambda: operation(square))
    assert sum(w.bytes for w in counted.values()) == expected


def test_work_belongs_to_the_module_that_called_it_and_backward_to_its_forward():
    model = nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(6, 2)})
    optimizer = torch.optim.AdamW(model.parameters())

    def step():
        model["b"](model["a"](torch.ones(3, 4))).exp().sum().backward()
        optimizer.step()

    counted = count(model, {"first": ["a"], "second": ["b"]}, optimizer, step)
    sums = {}
    for (component, direction, _, _), work in counted.items():
        sums[component, direction] = sums.get((component, direction), 0) + work.flops
    assert sums["first", "forward"] == 2 * 3 * 4 * 6
    assert sums["first", "backward"] == 2 * 3 * 4 * 6  # the input needs no gradient
    assert sums["second", "forward"] == 2 * 3 * 6 * 2
    assert sums["second", "backward"] == 2 * 2 * 3 * 6 * 2
    where = {op: {c for c, _, o, _ in counted if o == op} for _, _, op, _ in counted}
    assert where["aten::exp"] == {OTHER}
    assert UPDATE in {component for component, *_ in counted}


def test_hooks_are_gone_afterwards(detector):
    work, optimizer = step_of(detector, "backbone")
    count(work.model, {"all": [""]}, optimizer, work.forward)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in work.model.modules())
    assert not optimizer._optimizer_step_pre_hooks


def test_by_command(experiment):
    words = ("--config", CONFIG, "--size", "64x64", "--rounds", 3, "--device", "cpu", "--depth", 1)
    out, results, text = experiment("roofline", *words, *OVERRIDES, suffix=".csv")
    for word in ("encoder blocks, forward", "mask head, backward", UPDATE, STEP, "Largest gaps"):
        assert word in out
    assert {row["component"] for row in results.rows} == {*COMPONENTS, OTHER, UPDATE, STEP}
    assert "| whole step |" in text
    whole, *others = results.rows
    assert whole["floor_ms"] == pytest.approx(sum(row["floor_ms"] for row in others), rel=1e-3)
    for row in others:
        assert row["floor_ms"] >= row["gflop"] / 0.1 * 0.999
        assert row["floor_ms"] >= row["mib"] * 2**20 / 10e9 * 1e3 * 0.999
