"""Transformer blocks against timm's, and how they are run."""

import pytest
import torch
from support.kernels import kept_bytes
from timm.models.vision_transformer import Block
from torch import nn

from mimdet.kernels import build, use
from mimdet.modeling.sequences import Sequences
from mimdet.modeling.vit import TransformerBlock, make_blocks, run_layers


def twins(depth=3, rate=0.5, eps=1e-6, recompute="lean"):
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


def distance(got, want):
    return float((got - want).double().norm() / want.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize("train", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_same_as_timm(rate, train):
    """Also the same draws from the generator: seeds mean what they meant."""
    theirs, ours = twins(rate=rate)
    (want, state), (got, own_state) = step(theirs.train(train), run_theirs), step(ours.train(train), run_ours)
    assert torch.equal(state, own_state)
    for name, value in want.items():
        if value is not None and value.norm() > 0:
            assert distance(got[name], value) <= 5e-6, name


def test_same_as_timm_under_autocast():
    theirs, ours = twins()
    (exact, _), (want, _), (got, _) = (
        step(theirs, run_theirs),
        step(theirs, run_theirs, True),
        step(ours, run_ours, True),
    )
    for name, value in exact.items():
        assert distance(got[name], value) <= 2 * distance(want[name], value) + 1e-3, name


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_checkpointing_draws_the_same_paths_again(autocast):
    _, ours = twins()
    plain, state = step(ours, run_ours, autocast)
    again, state_again = step(ours, lambda layers, x: run_ours(layers, x, checkpointing=True), autocast)
    assert torch.equal(state, state_again)
    for name, value in plain.items():
        assert distance(again[name], value) <= (5e-2 if autocast else 1e-5), name


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["alone", "checkpointing"])
def test_lean_changes_nothing(checkpointing, autocast):
    """Neither a number nor a draw: what is made again in backward has the bits that it had."""
    results = []
    for recompute in ("lean", "none"):
        _, ours = twins(recompute=recompute)
        results.append(step(ours, lambda layers, x: run_ours(layers, x, checkpointing), autocast))
    (lean, state), (none, other_state) = results
    assert torch.equal(state, other_state)
    for name, value in none.items():
        assert torch.equal(lean[name], value), name


def test_lean_keeps_ten_of_sixteen_widths():
    if build.cpp_unavailable():
        pytest.skip("needs the C++ kernels")
    theirs, lean = twins()
    _, none = twins(recompute="none")
    x = torch.randn(2, 40, 48, requires_grad=True)
    with use("cpp"):
        plain = kept_bytes(theirs, lambda: run_theirs(theirs, x))
        assert kept_bytes(lean, lambda: run_ours(lean, x)) <= 0.66 * plain
        sequences = 4 * (len(x) + 1)  # where they begin
        assert 0.9 * plain <= kept_bytes(none, lambda: run_ours(none, x)) <= plain + sequences


def test_frozen_parameters():
    _, ours = twins()
    want, _ = step(ours, run_ours)
    frozen = ["0.attn.qkv.weight", "0.mlp.fc2.bias", "1.mlp.fc1.weight", "1.norm2.weight", "2.mlp.fc2.weight"]
    for name in frozen:
        ours.get_parameter(name).requires_grad_(False).grad = None
    got, _ = step(ours, run_ours)
    for name, value in want.items():
        assert (got[name] is None) if name in frozen else torch.equal(got[name], value), name


def test_unknown_recomputation():
    with pytest.raises(ValueError, match="'full' is unknown; choose from lean, none"):
        make_blocks(8, 2, 4.0, [0.0], nn.LayerNorm, "full")


def test_blocks_compile_whole():
    _, ours = twins(depth=1, rate=0.0)
    compiled = torch.compile(run_ours, fullgraph=True, backend="aot_eager")
    (got, _), (want, _) = step(ours, compiled), step(ours, run_ours)
    for name, value in want.items():
        assert distance(got[name], value) <= 1e-6, name


def test_each_sample_is_dropped_alone_and_kept_ones_are_scaled():
    torch.manual_seed(0)
    block = TransformerBlock(8, 2, drop_path=0.25)
    scale = block.drop_path1(torch.zeros(4000, 1, 8), Sequences.equal(4000, 1, torch.device("cpu")))
    assert set(scale.tolist()) == {0.0, float(torch.tensor(1.0) / 0.75)}
    assert scale.mean().item() == pytest.approx(1.0, abs=0.05)


def test_norm_must_be_a_layer_norm():
    with pytest.raises(TypeError, match="LayerNorm"):
        make_blocks(8, 2, 4.0, [0.0], nn.RMSNorm)
