"""The peers are the same model as ours: keys, weights, features, gradients."""

import pytest
import torch
from small import small_model

from mimdet.bench.models import PEERS, bottom_up, random_batch, variant
from mimdet.bench.reference_model import ReferenceBackbone
from mimdet.modeling import ImageList

# Inductor takes most of a minute for one model: the compiled one is run uncompiled here.
SIZES = [(96, 128), (64, 100)]


@pytest.fixture(scope="module")
def detector():
    return small_model("model.backbone.bottom_up.encoder.dpr=0.3").to(memory_format=torch.channels_last)


def images(padded):
    sizes = SIZES if padded else [SIZES[0]] * 2
    tensors = [torch.randn(3, *size, generator=torch.Generator().manual_seed(i)) for i, size in enumerate(sizes)]
    return ImageList.from_tensors(tensors, 32)


def outcome(model, batch, training):
    model.train(training).zero_grad()
    noise = torch.rand(2, 48, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(6)
    features = model(batch, noise=noise)
    sum((f * torch.linspace(-1, 1, f.numel()).view(f.shape)).sum() for f in features.values()).backward()
    found = {name: f.detach() for name, f in features.items()}
    return found | {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("ratio", [0.25, 1.0])
@pytest.mark.parametrize("peer", [name for name in PEERS if name != "ours"])
def test_features_and_gradients_are_ours(detector, monkeypatch, peer, ratio):
    """In training with drop path: the peers draw the same numbers in the same order."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    batch = images(padded=peer != "clean")
    want = outcome(bottom_up(variant(detector, "ours", ratio, 2)), batch, training=True)
    got = outcome(bottom_up(variant(detector, peer, ratio, 2)), batch, training=True)
    assert got.keys() == want.keys()
    for name, value in want.items():
        distance = (got[name] - value).norm() / value.norm().clamp(min=1e-6)
        assert distance < 2e-5, f"{name}: {distance:.2g}"


@pytest.mark.parametrize("peer", PEERS)
def test_weights_are_shared_under_our_names(detector, peer):
    ours, theirs = bottom_up(detector), bottom_up(variant(detector, peer, 0.5, 2))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    parameters = dict(theirs.named_parameters())
    own = {name for name, p in ours.named_parameters() if parameters[name] is not p}
    stem = {f"encoder.patch_embed.proj.{i}.0.weight" for i in range(4)} | {"encoder.patch_embed.proj.3.3.weight"}
    assert own == (stem if "original" in peer else set())


def test_the_original_runs_in_nchw(detector):
    """Whatever the memory of our weights."""
    assert bottom_up(detector).encoder.patch_embed.proj[1][0].weight.is_contiguous(memory_format=torch.channels_last)
    peer = bottom_up(variant(detector, "original-kept", 0.5, 2))
    seen = {}
    for index, stage in enumerate(peer.encoder.patch_embed.proj):
        stage.register_forward_hook(lambda module, inputs, output, index=index: seen.update({index: output}))
    peer(images(padded=False))
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

    made = bottom_up(variant(detector, "ours-checkpointed", 0.125, 1))
    assert state(made) == (0.125, True, True, True)
    assert state(bottom_up(detector)) == (0.5, False, False, False)


def test_checkpointing_saves_memory(detector):
    from mimdet.bench.memory import saved_bytes

    batch = images(padded=False)
    sizes = {}
    for checkpointing in (False, True):
        peer = ReferenceBackbone(bottom_up(detector), fused_attention=False, checkpointing=checkpointing).train()
        sizes[checkpointing] = saved_bytes(lambda peer=peer: peer(batch), peer.parameters())
    assert 0 < sizes[True] < 0.5 * sizes[False]


def test_random_batch_trains_the_detector(detector):
    pictures, targets = random_batch(1, (96, 128), 80, "cpu")
    losses = variant(detector, "original", 0.5, 1).train()(pictures, targets)
    assert len(losses) == 5
    assert all(torch.isfinite(loss) for loss in losses.values())
