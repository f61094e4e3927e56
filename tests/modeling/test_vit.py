"""Transformer blocks against timm's, and how they are run."""

from itertools import combinations

import pytest
import torch
from support.kernels import activation_bytes
from support.relative_error import relative_error
from timm.layers import drop_path as timm_drop_path
from timm.models.vision_transformer import Block
from torch import nn

from mimdet.kernels import build, use
from mimdet.modeling.sequences import Sequences
from mimdet.modeling.vit import TransformerBlock, add, draw_drop_path, make_blocks, run_layers


def make_pair(depth=3, rate=0.5, recompute="lean"):
    """timm's blocks and norm, and ours with the same weights."""
    torch.manual_seed(0)

    def norm(dim, **_):
        return nn.LayerNorm(dim, eps=1e-6)

    theirs = nn.ModuleList(Block(48, 3, 4.0, qkv_bias=True, drop_path=rate, norm_layer=norm) for _ in range(depth))
    theirs.append(norm(48))
    ours = make_blocks(48, 3, 4.0, [rate] * depth, norm, recompute)
    ours.append(norm(48))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def run_theirs(layers, x):
    for layer in layers:
        x = layer(x)
    return x


class Scaled(nn.Module):
    """In place of timm's DropPath: the branch times drawn factors."""

    def __init__(self, factors):
        super().__init__()
        self.factors = factors

    def forward(self, branch):
        return branch * self.factors.view(-1, 1, 1).to(branch.dtype)


def with_draws_of(ours):
    """``run_theirs`` with the factors that ``run_ours`` draws at this state of the generator."""

    def run(theirs, x):
        drawn = draw_drop_path(ours[:-1], x, Sequences.equal(*x.shape[:2], x.device))
        for block, factors in zip(theirs[:-1], drawn, strict=True):
            block.drop_path1, block.drop_path2 = (nn.Identity() if f is None else Scaled(f) for f in factors)
        return run_theirs(theirs, x)

    return run


def run_ours(layers, x, checkpointing=False):
    return run_layers(layers[:-1], layers[-1], x, checkpointing)


def step(layers, run, autocast=False):
    """Output, input gradient, parameter gradients and the generator's state after a step from seed 3."""
    torch.manual_seed(3)
    x = torch.randn(6, 11, 48).requires_grad_()
    layers.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = run(layers, x)
    state = torch.get_rng_state()
    y.float().square().mean().backward()
    return {"y": y.detach().float(), "x": x.grad, **{n: p.grad for n, p in layers.named_parameters()}}, state


@pytest.mark.parametrize("train", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_same_as_timm(rate, train):
    theirs, ours = make_pair(rate=rate)
    run = run_theirs if rate == 0 or not train else with_draws_of(ours)
    (expected, _), (actual, _) = step(theirs.train(train), run), step(ours.train(train), run_ours)
    for name, value in expected.items():
        if value is not None and value.norm() > 0:
            assert relative_error(actual[name], value) <= 5e-6, name


def test_same_as_timm_under_autocast():
    theirs, ours = make_pair()
    run = with_draws_of(ours)
    (exact, _), (expected, _), (actual, _) = step(theirs, run), step(theirs, run, True), step(ours, run_ours, True)
    for name, value in exact.items():
        assert relative_error(actual[name], value) <= 2 * relative_error(expected[name], value) + 1e-3, name


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_checkpointing_draws_the_same_paths_again(autocast):
    _, ours = make_pair()
    plain, state = step(ours, run_ours, autocast)
    again, state_again = step(ours, lambda layers, x: run_ours(layers, x, checkpointing=True), autocast)
    assert torch.equal(state, state_again)
    for name, value in plain.items():
        assert relative_error(again[name], value) <= (5e-2 if autocast else 1e-5), name


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["alone", "checkpointing"])
def test_selective_recomputation_changes_nothing(checkpointing, autocast):
    """Bitwise equal numbers and equal draws: backward recomputes the same activations."""
    results = []
    for recompute in ("lean", "none"):
        _, ours = make_pair(recompute=recompute)
        results.append(step(ours, lambda layers, x: run_ours(layers, x, checkpointing), autocast))
    (selective, state), (none, other_state) = results
    assert torch.equal(state, other_state)
    for name, value in none.items():
        assert torch.equal(selective[name], value), name


def test_selective_recomputation_saves_ten_of_sixteen_widths():
    if build.cpp_unavailable():
        pytest.skip("needs the C++ kernels")
    theirs, selective = make_pair()
    _, none = make_pair(recompute="none")
    x = torch.randn(2, 40, 48, requires_grad=True)
    with use("cpp"):
        plain = activation_bytes(lambda: run_theirs(theirs, x), theirs)
        assert activation_bytes(lambda: run_ours(selective, x), selective) <= 0.66 * plain
        sequences = 4 * (len(x) + 1)  # cu_seqlens
        assert 0.9 * plain <= activation_bytes(lambda: run_ours(none, x), none) <= plain + sequences


def test_frozen_parameters():
    _, ours = make_pair()
    expected, _ = step(ours, run_ours)
    frozen = ["0.attn.qkv.weight", "0.mlp.fc2.bias", "1.mlp.fc1.weight", "1.norm2.weight", "2.mlp.fc2.weight"]
    for name in frozen:
        ours.get_parameter(name).requires_grad_(False).grad = None
    actual, _ = step(ours, run_ours)
    for name, value in expected.items():
        assert (actual[name] is None) if name in frozen else torch.equal(actual[name], value), name


def test_blocks_compile_whole():
    _, ours = make_pair(depth=1)
    compiled = torch.compile(run_ours, fullgraph=True, backend="aot_eager")
    (actual, _), (expected, _) = step(ours, compiled), step(ours, run_ours)
    for name, value in expected.items():
        assert relative_error(actual[name], value) <= 1e-6, name


@pytest.mark.parametrize("rate", [0.25, 1.0])
def test_factors_have_the_values_and_the_share_of_timms(rate):
    """A draw for each sample and branch."""
    torch.manual_seed(0)
    blocks = make_blocks(8, 2, 4.0, [0.0, rate, rate], nn.LayerNorm)
    samples = Sequences.equal(4000, 1, torch.device("cpu"))
    nothing, *drawn = draw_drop_path(blocks, torch.zeros(1), samples)
    assert nothing == (None, None)
    theirs = timm_drop_path(torch.ones(4000, 1), rate, training=True)
    rows = [row for pair in drawn for row in pair]
    for row in rows:
        assert set(row.tolist()) == set(theirs.flatten().tolist())
        # Factors are 0 or 1 / keep; five standard deviations.
        assert abs(row.mean() - float(rate < 1)) <= 5 * (rate * (1 - rate) / 4000) ** 0.5 / max(1 - rate, 0.1)
    assert rate == 1 or not any(torch.equal(a, b) for a, b in combinations(rows, 2))
    assert draw_drop_path(blocks.eval(), torch.zeros(1), samples) == [(None, None)] * 3


def test_a_block_alone_draws_for_itself():
    block = TransformerBlock(8, 2, drop_path=1.0)
    x = torch.randn(3, 2, 8)
    assert torch.equal(add(*block(x)), x)
    assert not torch.equal(add(*block.eval()(x)), x)


def test_norm_must_be_a_layer_norm():
    with pytest.raises(TypeError, match="LayerNorm"):
        make_blocks(8, 2, 4.0, [0.0], nn.RMSNorm)
