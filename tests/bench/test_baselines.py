"""The baselines are the same model as ours: keys, weights, features, gradients."""

import pytest
import torch
from tiny_model import BOTTOM_UP, CONFIG, OVERRIDES

from mimdet.bench.baselines import IMPLEMENTATIONS, OriginalBackbone, bottom_up, variant
from mimdet.bench.workload import build_detector, without_drop_path
from mimdet.modeling import ImageList
from mimdet.modeling.memory import activation_bytes
from mimdet.testing import fixed_noise

# Inductor takes most of a minute per model, so CompiledBackbone runs uncompiled here.
SIZES = [(96, 128), (64, 100)]


@pytest.fixture(scope="module")
def detector():
    """Vectors, such as biases, are random, so that each has an effect."""
    deep = (f"{BOTTOM_UP}.encoder.depth=3", f"{BOTTOM_UP}.encoder.dpr=0.3")
    model = build_detector(CONFIG, (*OVERRIDES, *deep), 2, "cpu")
    with torch.no_grad():
        for parameter in bottom_up(model).parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(memory_format=torch.channels_last)


def images(padded):
    sizes = SIZES if padded else [SIZES[0]] * 2
    tensors = [torch.randn(3, *size, generator=torch.Generator().manual_seed(i)) for i, size in enumerate(sizes)]
    return ImageList.from_tensors(tensors, 32)


def outputs_of(model, batch, training):
    model.train(training).zero_grad()
    noise = torch.rand(2, 48, generator=torch.Generator().manual_seed(5))
    with fixed_noise(model, tokens=noise), without_drop_path(model):
        features = model(batch)
        sum((f * torch.linspace(-1, 1, f.numel()).view(f.shape)).sum() for f in features.values()).backward()
    outputs = {name: f.detach() for name, f in features.items()}
    return outputs | {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("ratio", [0.25, 1.0])
@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if name != "ours"])
def test_features_and_gradients_are_ours(detector, monkeypatch, name, ratio):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    batch = images(padded=name != "sdpa-compile")
    expected = outputs_of(bottom_up(variant(detector, "ours", ratio, 2)), batch, training=True)
    actual = outputs_of(bottom_up(variant(detector, name, ratio, 2)), batch, training=True)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        distance = (actual[key] - value).norm() / value.norm().clamp(min=1e-6)
        assert distance < 2e-5, f"{key}: {distance:.2g}"


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_weights_are_shared_under_our_names(detector, name):
    ours, theirs = bottom_up(detector), bottom_up(variant(detector, name, 0.5, 2))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    parameters = dict(theirs.named_parameters())
    copied = {key for key, p in ours.named_parameters() if parameters[key] is not p}
    stem = {f"encoder.patch_embed.proj.{i}.0.weight" for i in range(4)} | {"encoder.patch_embed.proj.3.3.weight"}
    assert copied == (stem if "original" in name else set())


def test_the_original_runs_in_nchw(detector):
    """For any memory format of our weights."""
    assert bottom_up(detector).encoder.patch_embed.proj[1][0].weight.is_contiguous(memory_format=torch.channels_last)
    baseline = bottom_up(variant(detector, "original-no-checkpoint", 0.5, 2))
    seen = {}
    for index, stage in enumerate(baseline.encoder.patch_embed.proj):
        stage.register_forward_hook(lambda module, inputs, output, index=index: seen.update({index: output}))
    baseline(images(padded=False))
    assert len(seen) == 4
    assert all(output.is_contiguous() for output in seen.values())


def test_a_depth_takes_the_first_blocks(detector):
    one, two = (bottom_up(variant(detector, "ours", 0.5, depth)) for depth in (1, 2))
    assert len(two.decoder.decoder_blocks) == len(bottom_up(detector).decoder.decoder_blocks) == 2
    assert list(one.decoder.decoder_blocks) == [two.decoder.decoder_blocks[0]]


def test_variants_leave_the_model_as_it_was(detector):
    def state(backbone):
        encoder, decoder = backbone.encoder, backbone.decoder
        return backbone.sample_ratio, encoder.checkpointing, encoder.patch_embed.checkpointing, decoder.checkpointing

    assert state(bottom_up(variant(detector, "ours-checkpointed", 0.125, 1))) == (0.125, True, True, True)
    assert state(bottom_up(detector)) == (0.5, False, False, False)


def test_checkpointing_saves_memory(detector):
    batch = images(padded=False)
    sizes = {}
    for checkpointing in (False, True):
        baseline = OriginalBackbone(bottom_up(detector), fused_attention=False, checkpointing=checkpointing).train()
        sizes[checkpointing] = activation_bytes(lambda baseline=baseline: baseline(batch), baseline.parameters())
    assert 0 < sizes[True] < 0.5 * sizes[False]
