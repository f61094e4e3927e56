"""What backward recomputes is chosen by the memory that a batch needs and the device has."""

import logging

import pytest
import torch
from support.packed_images import batch
from support.packed_images import tiny_backbone as backbone
from torch import nn

from mimdet.modeling.memory import AutoRecompute, activation_bytes, free_bytes
from mimdet.testing import fixed_noise

BASE = "mimdet_b_mask_rcnn"


def test_activation_bytes_count_each_memory_once_and_no_parameters():
    layer = torch.nn.Linear(8, 8, bias=False)
    x = torch.randn(4, 8, requires_grad=True)
    assert activation_bytes(lambda: layer(x), layer.parameters()) == x.nbytes
    assert activation_bytes(lambda: (x * x.detach()).view(-1) * x.view(-1).detach(), ()) == x.nbytes


def modes(model):
    encoder = model.encoder
    return encoder.checkpointing, encoder.blocks[0].recompute


@pytest.mark.parametrize("name", [BASE, "ablations/table5_convnext", "ablations/table8_window_vit_fpn"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_the_prediction_is_what_a_step_saves(name, autocast, monkeypatch):
    """Not of checkpointing, whose inputs of blocks no hook sees; it is the last resort."""
    monkeypatch.setattr("mimdet.modeling.memory.free_bytes", lambda parts, device: 2**60)
    model = backbone(name)
    images = torch.rand(2, 3, 160, 224)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(images)
        (constant, slope), *_ = model._recomputation._bytes
        counted = activation_bytes(lambda: model(images), [*model.parameters(), *model.buffers()])
    assert constant + slope * 2 * 160 * 224 == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("auto", "auto"), [(False, False), (False, True), (True, True)]),
        ((True, "auto"), [(True, False), (True, True)]),
        ((False, "auto"), [(False, False), (False, True)]),
        (("auto", "lean"), [(False, True), (True, True)]),
        (("auto", "none"), [(False, False), (True, False)]),
    ],
)
def test_what_is_not_auto_does_not_change(words, expected):
    assert AutoRecompute(*words).modes == expected


def test_more_is_recomputed_for_a_larger_batch_and_never_less_again(monkeypatch, caplog):
    model = backbone(BASE)
    model(torch.zeros(1, 3, 32, 32))
    (constant, slope), (_, selective_slope), _ = model._recomputation._bytes
    pixels = 160 * 160
    room = constant + (slope + selective_slope) * pixels  # between "nothing" for one image and for two
    monkeypatch.setattr("mimdet.modeling.memory.free_bytes", lambda parts, device: room)
    seen = []
    with caplog.at_level(logging.INFO, "mimdet"):
        for batch in (1, 2, 1, 64, 1):
            model._make_room(torch.zeros(batch, 3, 160, 160), 0.5)
            seen.append(modes(model))
    assert seen == [(False, False), (False, True), (False, True), (True, True), (True, True)]
    assert "backward recomputes outputs of norms and GELU: otherwise 2 x 160x160 pixels" in caplog.text
    assert "backward recomputes blocks, and" in caplog.text


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        (BASE, "canvas"),
        (BASE, "packed"),
        ("ablations/stem_layer_norm", "canvas"),
        ("ablations/table5_convnext", "canvas"),
        ("ablations/table6_mask_token", "canvas"),
        ("ablations/table8_window", "canvas"),
        ("ablations/table8_window_vit_fpn", "canvas"),
    ],
)
def test_what_backward_recomputes_changes_no_number(name, mode):
    """Counting uses up no draws of the step, drop path's among them; checkpointing alone rounds differently."""
    results = []
    for checkpointing, recompute in (("auto", "auto"), ("false", "none"), ("false", "lean"), ("true", "lean")):
        changes = f"encoder.checkpointing={checkpointing}", f"encoder.recompute={recompute}", "encoder.dpr=0.5"
        model = backbone(name, f"batch_mode={mode}", *changes)
        torch.manual_seed(3)
        features = model(batch([(96, 64), (75, 41)]))
        sum(f.square().mean() for f in features.values()).backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        results.append([*features.values(), *gradients, torch.rand(4)])
    for first, none, selective, checkpointing in zip(*results, strict=True):
        assert torch.equal(first, none)
        assert torch.equal(first, selective)
        torch.testing.assert_close(first, checkpointing, rtol=1e-4, atol=1e-5)


def test_choosing_uses_no_fixed_noise():
    model = backbone(BASE)
    with fixed_noise(model, torch.rand(2, 24)):
        model(torch.rand(2, 3, 96, 64))


def test_free_memory_excludes_gradients_and_moments():
    layer = nn.Linear(2**12, 2**12)
    without = free_bytes([], torch.device("cpu"))
    difference = without - free_bytes([layer], torch.device("cpu"))
    assert difference == pytest.approx(6 * sum(p.numel() for p in layer.parameters()), abs=2**26)
    assert without > 0


def test_evaluation_and_fixed_words_choose_nothing():
    model = backbone(BASE).eval()
    with torch.no_grad():
        model(torch.rand(1, 3, 64, 64))
    assert model._recomputation.level == -1
    fixed = backbone(BASE, "encoder.checkpointing=true", "encoder.recompute=lean")
    assert fixed._recomputation is None
