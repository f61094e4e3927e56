"""Packed batches: each image has the features that it has alone."""

import pytest
import torch
from support.packed_images import STRIDES, batch, cells, own
from support.relative_error import relative_error
from timm.models.vision_transformer import Block
from torch import nn

from mimdet.modeling import ImageList
from mimdet.modeling.noise import NoiseSource
from mimdet.modeling.sampling import sampling_noise, split_packed
from mimdet.modeling.sequences import Sequences
from mimdet.modeling.vit import draw_drop_path, make_blocks, run_layers
from mimdet.pos_embed import PosEmbedCache, sincos_pos_embed_2d
from mimdet.testing import fixed_noise
from mimdet.testing.small import small_model

PACKED = "model.backbone.bottom_up.batch_mode=packed"
# Multiples of 32, odd sides, a single token, the full size of the padded batch.
SIZES = [(96, 128), (75, 141), (5, 9), (160, 160), (128, 96)]


def backbone(*overrides):
    return small_model(PACKED, *overrides).backbone.bottom_up


def noise_for(images):
    """(B, L): noise of each image at its cells, -1 in the padding."""
    rows, columns = (side // 16 for side in images.tensor.shape[2:])
    noise = torch.full((len(images), rows, columns), -1.0)
    for canvas, size in zip(noise, images.image_sizes, strict=True):
        height, width = cells(size)
        canvas[:height, :width] = torch.rand(height, width, generator=torch.Generator().manual_seed(sum(size)))
    return noise.flatten(1)


def run(model, images, ratio=None):
    """Features with the tokens that ``noise_for`` selects."""
    with fixed_noise(model, noise_for(images)):
        return model(images, sample_ratio=ratio)


def step(model, images, ratio, weights=None):
    """Features cropped to each image, and gradients of a loss per image, by size."""
    features = run(model, images, ratio)
    by_size = {}
    for b, size in enumerate(images.image_sizes):
        cropped = own(features, b, size)
        draw = torch.Generator().manual_seed(sum(size))
        loss = sum((f * torch.randn(f.shape, generator=draw)).sum() for f in cropped.values())
        gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], retain_graph=True)
        by_size[size] = {name: f.detach() for name, f in cropped.items()}, torch.cat([g.flatten() for g in gradients])
    return features, by_size


@pytest.fixture(scope="module")
def alone():
    """Results of each image alone: {ratio: {size: (features, gradient)}}."""
    model = backbone().train()
    return {r: {size: step(model, batch([size]), r)[1][size] for size in SIZES} for r in (0.5, 1.0)}


@pytest.mark.parametrize("ratio", [0.5, 1.0])
@pytest.mark.parametrize("garbage", [0.0, float("nan"), 1e30], ids=["zeros", "nan", "large"])
def test_batch_mates_and_padding_do_not_matter(alone, ratio, garbage):
    model = backbone().train()
    order = SIZES if garbage == 0.0 else SIZES[::-1]
    features, by_size = step(model, batch(order, garbage), ratio)
    for size, (cropped, gradient) in by_size.items():
        expected, want_gradient = alone[ratio][size]
        for name, value in cropped.items():
            assert relative_error(value, expected[name]) <= 3e-6, (size, name)
        assert relative_error(gradient, want_gradient) <= 3e-6, size
    for name, feature in features.items():
        for value, size in zip(feature, order, strict=True):
            rows, columns = cells(size, STRIDES[name])
            assert not value[:, rows:].any(), (name, size)
            assert not value[:, :, columns:].any(), (name, size)


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_without_padding_the_same_as_on_the_canvas(ratio):
    packed, canvas = backbone().train(), small_model().backbone.bottom_up.train()
    images = batch([(96, 128), (96, 128)])
    expected = run(canvas, images, ratio)
    for name, value in run(packed, images, ratio).items():
        assert torch.equal(value, expected[name]), name


def test_alone_on_a_canvas_of_its_own_size_the_same_as_on_the_canvas(alone):
    """Images without padding have the original's features."""
    model, size = small_model().backbone.bottom_up.train(), (96, 128)
    images = batch([size])
    features = run(model, images, 0.5)
    for name, value in alone[0.5][size][0].items():
        assert torch.equal(features[name][0], value), name


@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.5, 1.0])
def test_cost_is_that_of_own_tokens(ratio):
    model, seen = backbone().eval(), []
    for layer in (model.encoder.blocks[0].mlp.fc2, model.decoder.decoder_blocks[0].mlp.fc2):
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:-1].numel()))
    images = batch(SIZES)
    with torch.no_grad():
        run(model, images, ratio)
    cropped = [rows * columns for rows, columns in map(cells, SIZES)]
    assert seen == [sum(max(1, int(n * ratio)) for n in cropped), sum(cropped)]


LENGTHS = (1, 2, 31, 32, 33, 0, 127, 128, 129, 1050)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_packed_blocks_against_a_loop_of_plain_ones(dtype):
    """Against timm's blocks, image by image: forward and all gradients."""
    torch.manual_seed(0)
    theirs = nn.ModuleList(Block(64, 2, qkv_bias=True, norm_layer=nn.LayerNorm) for _ in range(2))
    ours = make_blocks(64, 2, 4.0, [0.0, 0.0], nn.LayerNorm)
    theirs.append(nn.LayerNorm(64)), ours.append(nn.LayerNorm(64))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours.load_state_dict(theirs.state_dict())
    x, gradient = torch.randn(2, sum(LENGTHS), 64)
    gradient = gradient.bfloat16().float()  # the last norm returns, and gets the gradient in, the dtype of autocast

    def loop(x):
        return torch.cat([nn.Sequential(*theirs)(part[None])[0] for part in x.split(LENGTHS) if len(part)])

    def packed(x):
        starts = torch.tensor([0, *LENGTHS]).cumsum(0).int()
        return run_layers(ours[:-1], ours[-1], x[:, None], False, Sequences.packed(starts, len(x), max(LENGTHS)))[:, 0]

    def run(layers, function, dtype):
        rows = x.to(torch.float64 if dtype == torch.float64 else torch.float32, copy=True).requires_grad_()
        layers.to(rows.dtype).zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = function(rows)
        y.backward(gradient.to(y.dtype))
        return {"y": y.detach(), "x": rows.grad, **{n: p.grad.clone() for n, p in layers.named_parameters()}}

    exact, same, actual = run(theirs, loop, torch.float64), run(theirs, loop, dtype), run(ours, packed, dtype)
    for name, value in exact.items():
        assert relative_error(actual[name], value) <= 2 * relative_error(same[name], value) + 1e-6, name


def test_drop_path_draws_once_an_image():
    block, x = make_blocks(8, 2, 4.0, [0.25], nn.LayerNorm), torch.zeros(1)
    starts = torch.tensor([0, 3, 3, 8, 9], dtype=torch.int32)
    packed, dense = Sequences.packed(starts, 9, 5), Sequences.equal(4, 5, torch.device("cpu"))
    (factors,) = draw_drop_path(block, x, packed)
    assert [tuple(rows.shape) for rows in factors] == [(9,), (9,)]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    (expected,) = draw_drop_path(block, x, dense)
    torch.set_rng_state(state)
    (actual,) = draw_drop_path(block, x, packed)
    for rows, by_image in zip(actual, expected, strict=True):
        assert torch.equal(rows, by_image[packed.owner])


@pytest.mark.parametrize("mode", ["canvas", "packed"])
def test_grid_sampling_is_a_checkerboard(mode):
    noise = sampling_noise("grid", 2, (6, 8), 0.5, NoiseSource("tokens"), "cpu")
    split = split_packed([(6, 8), (3, 5)], (6, 8), 0.5, noise, "cpu")
    row, column = split.ids_keep[0] % 48 // 8, split.ids_keep[0] % 8
    assert ((row + column) % 2 == 0).all()
    assert split.encoder.cu_seqlens.tolist() == [0, 24, 24 + 7]
    model = small_model("model.backbone.bottom_up.sampling=grid", f"model.backbone.bottom_up.batch_mode={mode}")
    model, state = model.backbone.bottom_up.train(), torch.get_rng_state()
    first = model(batch(SIZES))["c4"]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, model(batch(SIZES))["c4"])
    assert torch.equal(model.eval()(batch(SIZES))["c4"], model(batch(SIZES), sample_ratio=1.0)["c4"])


def test_seed_decides_and_full_ratio_draws_nothing():
    model = backbone().train()
    by_size = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        by_size.append(model(batch(SIZES))["c4"])
    assert torch.equal(by_size[0], by_size[1])
    assert not torch.equal(by_size[0], by_size[2])
    state = torch.get_rng_state()
    model(batch(SIZES), sample_ratio=1.0)
    assert torch.equal(state, torch.get_rng_state())


def test_position_cache_keeps_the_grids_last_used_within_its_bytes():
    table = sincos_pos_embed_2d(16, 4)
    cache = PosEmbedCache(capacity=3 * 15 * 16 * 4)
    first, second = cache(table, (3, 5)), cache(table, (5, 3))
    cache(table, (15, 1))
    assert cache(table, (3, 5)) is first
    cache(table, (1, 15))
    assert cache(table, (3, 5)) is first
    assert cache(table, (5, 3)) is not second
    assert cache(table, (100, 100)) is cache(table, (100, 100))


def test_grid_sampling_refuses_other_ratios_and_noise():
    model = small_model("model.backbone.bottom_up.sampling=grid").backbone.bottom_up
    for ratio in (0.25, 0.75):
        with pytest.raises(ValueError, match=f"sample_ratio must be 0.5 or 1, got {ratio}"):
            model(batch([(96, 128)]), sample_ratio=ratio)
    with pytest.raises(ValueError, match="tokens cannot have fixed noise"):
        run(model, batch([(96, 128)]), 0.5)


@pytest.mark.parametrize("size", [(0, 64), (64, 0), (65, 64), (64, 97)], ids=str)
def test_image_without_tokens_or_beyond_the_canvas(size):
    with pytest.raises(ValueError, match=rf"image_sizes\[1\] is {size[0]}x{size[1]}, not within 1x1 .. 64x96"):
        ImageList(torch.zeros(2, 3, 64, 96), [(64, 96), size])
