"""The backbone's parts against recordings of the original."""

import hashlib
import json

import numpy as np
import pytest
import torch
from support.fill_weights import fill_module, gradient, image
from support.golden import Golden
from support.kernels import activation_bytes
from support.paths import RECORDINGS
from support.relative_error import relative_error

from mimdet.config import instantiate, load
from mimdet.kernels import build, sample_tokens, use, valid_mask
from mimdet.modeling import ConvStem, ImageList
from mimdet.modeling.sampling import cell_sizes
from mimdet.pos_embed import PosEmbedCache, interpolate_pos_embed, sincos_pos_embed_2d
from mimdet.testing import fixed_noise
from mimdet.testing.small import make_images, normalized, small_model


@pytest.mark.parametrize(("dim", "count"), [(96, 2), (768, 1)])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_conv_stem_golden(dim, count, checkpointing):
    golden = Golden("convstem")
    stem = ConvStem(embed_dim=dim, checkpointing=checkpointing)
    fill_module(stem)
    x = torch.stack(normalized([torch.from_numpy(image(11 + i, 64, 96)) for i in range(count)]))
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    outputs = stem(x)
    sum((o * torch.from_numpy(gradient(100 + i, o.shape))).sum() for i, o in enumerate(outputs)).backward()
    checked = 0
    for i, output in enumerate(outputs):
        golden.check(f"e{dim}_out{i}", output.detach().numpy(), rel_l2=3e-6)
    golden.check(f"e{dim}_grad_input", x.grad.numpy(), rel_l2=2e-5)
    for name, parameter in stem.named_parameters():
        if f"e{dim}_grad_{name}" in golden.meta:
            golden.check(f"e{dim}_grad_{name}", parameter.grad.numpy(), rel_l2=2e-5)
            checked += 1
    assert checked == 8


@pytest.mark.parametrize(("dim", "grid"), [(768, 50), (512, 50), (1024, 50), (192, 14), (128, 14)])
def test_sincos_table_golden(dim, grid):
    key = f"sincos_d{dim}_g{grid}"
    data = np.load(RECORDINGS / "pos_embed.npz")
    meta = json.loads((RECORDINGS / "pos_embed.json").read_text())[key]
    table = sincos_pos_embed_2d(dim, grid)[0]
    assert list(table.shape) == meta["shape"]
    rows, columns = data[f"{key}_rows"], data[f"{key}_cols"]
    np.testing.assert_allclose(table.numpy()[rows][:, columns], data[key], atol=1e-6)
    sums = [table.double().sum(), table.double().square().sum(), table.double().abs().sum()]
    np.testing.assert_allclose(sums, meta["sum_sumsq_sumabs"], rtol=1e-6)
    assert len(hashlib.sha256(table.numpy().tobytes()).hexdigest()) == len(meta["sha256_f32"])


@pytest.mark.parametrize(
    ("dim", "old", "new"),
    [
        (768, 50, (50, 84)),
        (768, 50, (38, 50)),
        (768, 50, (50, 50)),
        (768, 14, (50, 50)),
        (512, 50, (84, 50)),
        (192, 14, (14, 20)),
        (192, 14, (10, 18)),
    ],
    ids=str,
)
def test_pos_embed_interpolation_golden(dim, old, new):
    expected = np.load(RECORDINGS / "pos_embed.npz")[f"interp_d{dim}_{old}x{old}_to_{new[0]}x{new[1]}"]
    actual = interpolate_pos_embed(sincos_pos_embed_2d(dim, old), new)
    full = torch.cat([torch.zeros(1, 1, dim), actual], dim=1)[0, ::17, ::9]
    np.testing.assert_allclose(full.numpy(), expected, atol=1e-5)


def test_pos_embed_cache_follows_the_table():
    table = sincos_pos_embed_2d(16, 4)
    cache = PosEmbedCache()
    first = cache(table, (3, 5))
    assert cache(table, (3, 5)) is first
    table.mul_(2)
    torch.testing.assert_close(cache(table, (3, 5)), 2 * first)


def test_pos_embed_cache_filled_under_inference_mode_serves_training():
    table, cache = sincos_pos_embed_2d(16, 4), PosEmbedCache()
    with torch.inference_mode():
        cache(table, (3, 5))
    x = torch.ones(1, 15, 16, requires_grad=True)
    (x * cache(table, (3, 5))).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("ratio", [0.125, 0.25, 0.5, 0.75, 1.0])
def test_sampling_golden(ratio):
    data = np.load(RECORDINGS / "masking.npz")
    noise = torch.from_numpy(data["noise"])
    valid = valid_mask(cell_sizes(data["image_sizes"].tolist(), 16), tuple(data["grid"])).flatten(1)
    np.testing.assert_array_equal(~valid.numpy(), data["pad_mask"].reshape(3, -1))
    sample = sample_tokens(noise, valid, ratio)
    expected = np.sort(data[f"r{ratio}_ids_keep_stable"], axis=1)
    np.testing.assert_array_equal(sample.ids_keep.numpy(), expected)
    together = torch.cat([sample.ids_keep, sample.ids_mask], dim=1)
    everything = torch.arange(noise.shape[1]).expand(3, -1)
    assert torch.equal(together.sort(dim=1).values, everything)
    assert torch.equal(together.gather(1, sample.ids_restore), everything)


@pytest.mark.parametrize(("length", "ratio", "kept"), [(280, 0.7, 196), (247, 0.3, 74), (1, 0.5, 1), (3, 0.25, 1)])
def test_keep_count_truncates_and_is_at_least_one(length, ratio, kept):
    sample = sample_tokens(torch.rand(2, length), torch.ones(2, length, dtype=torch.bool), ratio)
    assert sample.ids_keep.shape == (2, kept)


def full_size(name, *overrides):
    with torch.device("meta"):
        return instantiate(load(f"configs/{name}_mask_rcnn.py", overrides).model)


@pytest.mark.parametrize("name", ["mimdet_b", "mimdet_l"])
def test_state_dict_golden(name):
    expected = json.loads((RECORDINGS / f"{name}.json").read_text())
    state = full_size(name).state_dict()
    actual = {k: [list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in state.items()}
    assert list(actual) == list(expected)
    assert actual == expected


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_parameter_counts_of_table_7(depth):
    parameters = list(full_size("mimdet_b", f"model.backbone.bottom_up.decoder.depth={depth}").parameters())
    expected = json.loads((RECORDINGS / "param_counts.json").read_text())[f"mimdet_b_dec{depth}"]
    assert sum(p.numel() for p in parameters) == expected["total"]
    assert sum(p.numel() for p in parameters if p.requires_grad) == expected["trainable"]


def test_norms_and_drop_path_golden():
    expected = json.loads((RECORDINGS / "norms_and_droppath.json").read_text())["mimdet_b"]
    model = full_size("mimdet_b")
    rates = {n: m.drop_prob for n, m in model.named_modules() if type(m).__name__ == "DropPath"}
    assert rates == pytest.approx(expected["drop_path"])
    for label, names in expected.items():
        if label == "drop_path":
            continue
        eps = float(label.split("eps=")[1].split()[0])
        assert {model.get_submodule(name).eps for name in names} == {eps}


def test_selective_recomputation_changes_nothing_and_saves_memory():
    """Against plain PyTorch without recomputation."""
    images = ImageList.from_tensors(normalized(make_images()), 32)
    images.tensor = images.tensor.contiguous(memory_format=torch.channels_last)
    noise, grads, kept = torch.rand(2, 280), [], []
    for kernels, recompute in (("eager", "none"), ("auto", "lean")):
        change = [f"model.backbone.bottom_up.{part}.recompute={recompute}" for part in ("encoder", "decoder")]
        model = small_model(*change).backbone.bottom_up.to(memory_format=torch.channels_last)
        with use(kernels), fixed_noise(model, noise):
            kept.append(activation_bytes(lambda model=model: model(images), model))
            features = model(images)
        # Not c5: rounding may choose the other of two nearly equal cells in its pooling.
        sum(features[name].square().mean() for name in ("c2", "c3", "c4")).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, expected in grads[0].items():
        assert relative_error(grads[1][name], expected) < 2e-5, name
    if not build.cpp_unavailable():
        assert kept[1] <= 0.7 * kept[0]


def test_full_ratio_gives_the_projection_a_zero_gradient():
    model = small_model("model.backbone.bottom_up.sample_ratio=1.0").backbone.bottom_up
    model(ImageList.from_tensors(normalized(make_images()), 32))["c5"].sum().backward()
    assert model.decoder.conv_feat_proj.weight.grad.abs().max() == 0


@pytest.fixture(scope="module")
def model():
    return small_model().backbone.bottom_up.eval()


def test_evaluation_sees_everything_unless_told_otherwise(model):
    images = ImageList.from_tensors(normalized(make_images()), 32)
    with torch.no_grad():
        full = model(images)["c4"]
        assert torch.equal(full, model(images)["c4"])
        assert torch.equal(full, model(images, sample_ratio=1.0)["c4"])
        assert not torch.equal(full, model(images, sample_ratio=0.5)["c4"])
        state = torch.get_rng_state()
        model(images)
    assert torch.equal(state, torch.get_rng_state())


def test_plain_tensor_counts_as_unpadded(model):
    x = torch.stack(normalized(make_images([(96, 128)])))
    with torch.no_grad(), fixed_noise(model, torch.rand(1, 48)):
        plain, listed = (model(images, sample_ratio=0.5) for images in (x, ImageList(x, [(96, 128)])))
    assert torch.equal(plain["c4"], listed["c4"])


def test_features_are_channels_last(model):
    x = torch.stack(normalized(make_images([(96, 128)]))).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for name, feature in model(x).items():
            assert feature.is_contiguous(memory_format=torch.channels_last), name


def test_image_smaller_than_a_patch(model):
    images = ImageList.from_tensors(normalized(make_images([(5, 9)])), 32)
    with torch.no_grad():
        features = model(images, sample_ratio=0.125)
    assert features["c4"].shape[-2:] == (2, 2)
    assert all(bool(f.isfinite().all()) for f in features.values())


@pytest.mark.parametrize(
    ("shape", "tokens", "message"),
    [((1, 3, 90, 128), 48, "multiples of 32"), ((1, 3, 96, 128), 47, r"noise of tokens must be \(1, 48\)")],
)
def test_bad_input(model, shape, tokens, message):
    with pytest.raises(ValueError, match=message), fixed_noise(model, torch.zeros(1, tokens)):
        model(torch.zeros(shape), sample_ratio=0.5)
