"""Transformer blocks against timm's, and how they are run."""

import pytest
import torch
from support.kernels import activation_bytes
from support.relative_error import relative_error
from timm.models.vision_transformer import Block
from torch import nn

from mimdet.kernels import build, use
from mimdet.modeling.sequences import Sequences
from mimdet.modeling.vit import TransformerBlock, make_blocks, run_layers


def make_pair(depth=3, rate=0.5, eps=1e-6, recompute="lean"):
    """timm's blocks and norm, and ours with the same weights."""
    torch.manual_seed(0)

    def norm(dim, **_):
        return nn.LayerNorm(dim, eps=eps)

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
    """Also the same draws from the generator."""
    theirs, ours = make_pair(rate=rate)
    (expected, state), (actual, own_state) = step(theirs.train(train), run_theirs), step(ours.train(train), run_ours)
    assert torch.equal(state, own_state)
    for name, value in expected.items():
        if value is not None and value.norm() > 0:
            assert relative_error(actual[name], value) <= 5e-6, name


def test_same_as_timm_under_autocast():
    theirs, ours = make_pair()
    (exact, _), (expected, _), (actual, _) = (
        step(theirs, run_theirs),
        step(theirs, run_theirs, True),
        step(ours, run_ours, True),
    )
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


def test_unknown_recomputation():
    with pytest.raises(ValueError, match="'full' is unknown; choose from "):
        make_blocks(8, 2, 4.0, [0.0], nn.LayerNorm, "full")


def test_blocks_compile_whole():
    _, ours = make_pair(depth=1, rate=0.0)
    compiled = torch.compile(run_ours, fullgraph=True, backend="aot_eager")
    (actual, _), (expected, _) = step(ours, compiled), step(ours, run_ours)
    for name, value in expected.items():
        assert relative_error(actual[name], value) <= 1e-6, name


def test_each_sample_is_dropped_alone_and_kept_ones_are_scaled():
    torch.manual_seed(0)
    block = TransformerBlock(8, 2, drop_path=0.25)
    scale = block.drop_path1(torch.zeros(4000, 1, 8), Sequences.equal(4000, 1, torch.device("cpu")))
    assert set(scale.tolist()) == {0.0, float(torch.tensor(1.0) / 0.75)}
    assert scale.mean().item() == pytest.approx(1.0, abs=0.05)


def test_norm_must_be_a_layer_norm():
    with pytest.raises(TypeError, match="LayerNorm"):
        make_blocks(8, 2, 4.0, [0.0], nn.RMSNorm)
