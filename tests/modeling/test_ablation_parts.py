"""The parts that the ablations swap: windows, the pyramid of tokens, ConvNeXt's stages, the [MASK] token."""

import pytest
import torch
import torch.nn.functional as F
from support.mae_checkpoints import fake_mae, saved
from support.packed_images import STRIDES, batch, cells, own
from support.packed_images import tiny_backbone as backbone
from support.relative_error import relative_error
from timm.models.convnext import ConvNeXt

from mimdet.checkpoint.read import CheckpointError
from mimdet.modeling import ConvNeXtStem, ConvStem, ImageList, MIMDetDecoder
from mimdet.modeling.window_sequences import split_windows, window_order
from mimdet.testing import fixed_noise

MODELS = [
    f"ablations/{name}"
    for name in ("stem_layer_norm", "table5_convnext", "table6_mask_token", "table8_window", "table8_window_vit_fpn")
]
# Odd sides, a single token, the full size of the padded batch.
SIZES = [(75, 141), (5, 9), (160, 96)]


@pytest.mark.parametrize("name", MODELS)
def test_packed_images_get_what_they_get_alone(name):
    model = backbone(name, "batch_mode=packed", "encoder.dpr=0.0").train()
    images = batch(SIZES, garbage=float("nan"))
    features = model(images, sample_ratio=1.0)
    for b, size in enumerate(SIZES):
        alone = own(model(batch([size]), sample_ratio=1.0), 0, size)
        for key, value in own(features, b, size).items():
            assert relative_error(value.detach(), alone[key].detach()) <= 5e-6, (key, size)
        for key, stride in STRIDES.items():
            rows, columns = cells(size, stride)
            assert features[key][b, :, rows:].abs().sum() == features[key][b, :, :, columns:].abs().sum() == 0
    sum(f.square().mean() for f in features.values()).backward()
    for key, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad.isfinite().all(), key


@pytest.mark.parametrize(("name", "mode"), [*((name, "canvas") for name in MODELS), ("mimdet_b_mask_rcnn", "packed")])
def test_autocast(name, mode):
    model = backbone(name, f"batch_mode={mode}").eval()
    images = batch(SIZES)
    with torch.no_grad():
        plain = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            features = model(images, sample_ratio=1.0)
    for key, value in features.items():
        assert 0 < relative_error(value.float(), plain[key]) <= 3e-2, key


@pytest.mark.parametrize(("rows", "columns", "window"), [(7, 7, 7), (5, 9, 3), (1, 1, 7), (8, 4, 1)])
def test_windows_cover_a_grid_in_order(rows, columns, window):
    order, lengths = window_order(rows, columns, window)
    assert sorted(order) == list(range(rows * columns))
    across = -(-columns // window)
    number = [cell // columns // window * across + cell % columns // window for cell in order]
    assert number == sorted(number)
    assert [number.count(n) for n in range(len(lengths))] == list(lengths)


@pytest.mark.parametrize("packed", [False, True])
def test_attention_stays_inside_windows(packed):
    """Against plain attention over all tokens with everything outside of a token's window masked."""
    model = backbone("ablations/table8_window", f"batch_mode={'packed' if packed else 'canvas'}").eval()
    images, sizes = batch([(75, 141), (160, 96)]), [(75, 141), (160, 96)]
    with torch.no_grad():
        actual = model(images)["c4"]
        for b, size in enumerate(sizes):
            image = batch([size]) if packed else ImageList(images.tensor, images.image_sizes)
            encoder, mode = model.encoder, {"packed": packed}
            expected = _masked(encoder, encoder(image, 1.0, **mode), 0 if packed else b, size if packed else (160, 160))
            assert relative_error(actual[b][:, : expected.shape[1], : expected.shape[2]], expected) <= 2e-6


def _masked(encoder, encoded, b, size):
    rows, columns = cells(size)
    stem = encoded.features[-1][b : b + 1, :, :rows, :columns]
    x = stem.flatten(2).transpose(1, 2) + encoder._pos_embed_at(encoder.pos_embed, (rows, columns))
    row, column = (
        n.flatten() // encoder.window for n in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    )
    same = (row[:, None] == row) & (column[:, None] == column)
    for block in encoder.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + block.attn.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=same).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return encoder.norm(x)[0].t().unflatten(1, (rows, columns))


def test_drop_path_is_of_whole_images():
    split = split_windows([(4, 5), (2, 2)], (4, 6), 2, True, torch.device("cpu"))
    assert split.encoder.batch == split.decoder.batch == 2
    assert split.encoder.owner.tolist() == [0] * 20 + [1] * 4
    assert split.encoder.max_seqlen == 4
    assert split.encoder.cu_seqlens.tolist() == [0, 4, 8, 10, 14, 18, 20, 24]
    assert split_windows([(4, 5)] * 3, (4, 6), 2, False, torch.device("cpu")).encoder.batch == 3


def test_windows_before_a_decoder():
    """The decoder then fills nothing, and sees all tokens."""
    model = backbone("ablations/table6_mask_token", "encoder.window=3", "sample_ratio=1.0").eval()
    plain = backbone("ablations/table6_mask_token", "encoder.window=50", "sample_ratio=1.0").eval()
    images = batch([(64, 96), (96, 64)])
    with torch.no_grad():
        features, whole = model(images), plain(images)
        assert relative_error(features["c4"], whole["c4"]) > 1e-3
        plain.encoder.window = None
        assert relative_error(whole["c4"], plain(images)["c4"]) <= 2e-6


def test_pyramid_is_transposed_convolutions_of_taps():
    model = backbone("ablations/table8_window_vit_fpn").eval()
    images = batch([(64, 96)])
    with torch.no_grad():
        encoded = model.encoder(images, 1.0)
        features = model(images)
        part = model.pyramid
        first, second = (encoded.map(tokens) for tokens in encoded.tapped)
        x = F.gelu(F.group_norm(part.c2_first(first), 1, part.c2_norm.weight, part.c2_norm.bias, 1e-6))
        assert relative_error(features["c2"], part.c2_second(x)) <= 2e-6
        assert relative_error(features["c3"], part.c3(second)) <= 2e-6
        # An output at index i is that of the encoder's first i blocks, before its norm.
        model.encoder.blocks, model.encoder.taps = model.encoder.blocks[:2], ()
        last = F.layer_norm(encoded.tapped[1], (48,), model.encoder.norm.weight, model.encoder.norm.bias, 1e-5)
        assert relative_error(last, model.encoder(images, 1.0).tokens) <= 2e-6
    assert [f.shape[1:] for f in features.values()] == [(48, 16, 24), (48, 8, 12), (48, 4, 6), (48, 2, 3)]


def convnext(**changes):
    stem = ConvNeXtStem(img_size=64, embed_dim=32, depth=2, **changes)
    with torch.no_grad():
        for module in stem.modules():
            if hasattr(module, "gamma"):
                module.gamma.uniform_(-1, 1)
    return stem


def baseline_of(stem):
    """timm's ConvNeXt with the stem's weights, and weights of its own elsewhere."""
    baseline = ConvNeXt(depths=(2, 2, 1, 1), dims=(8, 16, 32, 64), num_classes=0)
    missing, unexpected = baseline.load_state_dict(stem.state_dict(), strict=False)
    assert not unexpected
    assert all(key.startswith(("stages.2.blocks.", "stages.3.", "head.")) for key in missing)
    return baseline


@pytest.mark.parametrize("recompute", ["lean", "none"])
def test_layer_norm_stem_is_its_eager_counterpart(recompute):
    torch.manual_seed(0)
    stem = ConvStem(img_size=64, embed_dim=64, norm="layer", recompute=recompute).double()
    shapes = ({key: value.shape for key, value in s.state_dict().items()} for s in (stem, ConvStem(embed_dim=64)))
    assert next(shapes) == next(shapes)
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64, requires_grad=True)
    y, expected = x, []
    for stage in stem.proj:
        y = F.conv2d(y, stage[0].weight, stage[0].bias, stride=2, padding=1).permute(0, 2, 3, 1)
        y = F.gelu(F.layer_norm(y, y.shape[-1:], stage[1].weight, stage[1].bias, 1e-6)).permute(0, 3, 1, 2)
        for module in stage[3:]:
            y = module(y)
        expected.append(y)
    features = stem(x)
    for ours, theirs in zip(features, expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    inputs = (x, *stem.parameters())
    gradients = (torch.autograd.grad(sum(f.square().sum() for f in maps), inputs) for maps in (features, expected[1:]))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_convnext_stem_is_timms(checkpointing):
    torch.manual_seed(0)
    stem = convnext(checkpointing=checkpointing)
    baseline = baseline_of(stem)
    x = torch.randn(2, 3, 64, 96)
    actual = stem(x)
    fine = baseline.stages[0](baseline.stem(x))
    middle = baseline.stages[1](fine)
    expected = [fine, middle, baseline.stages[2].downsample(middle)]
    for ours, theirs in zip(actual, expected, strict=True):
        assert relative_error(ours.detach(), theirs.detach()) <= 2e-6
    for features in (actual, expected):
        sum((f * torch.linspace(-1, 1, f.numel()).view(f.shape)).sum() for f in features).backward()
    theirs = dict(baseline.named_parameters())
    for key, parameter in stem.named_parameters():
        assert relative_error(parameter.grad, theirs[key].grad) <= 1e-5, key


def test_convnext_weights_from_a_file(tmp_path, caplog):
    torch.manual_seed(0)
    baseline = baseline_of(convnext())
    path = str(tmp_path / "convnext.pth")
    torch.save(baseline.state_dict(), path)
    with caplog.at_level("INFO", logger="mimdet"):
        stem = convnext(pretrained=path)
    assert torch.equal(stem.stages[1].blocks[1].mlp.fc2.weight, baseline.stages[1].blocks[1].mlp.fc2.weight)
    assert "ConvNeXt -> stem: 48 tensors loaded, 24 dropped" in caplog.text
    with pytest.raises(CheckpointError, match=r"is \(8, 3, 4, 4\) in the file, \(16, 3, 4, 4\) in the model"):
        ConvNeXtStem(embed_dim=64, depth=2, pretrained=path)
    torch.save(ConvStem(embed_dim=32).state_dict(), path)
    with pytest.raises(CheckpointError, match=r"stem\.0\.weight is not in the file"):
        convnext(pretrained=path)


def test_mask_token_comes_from_the_mae_file(tmp_path):
    state = fake_mae()
    sizes = {"img_size": 320, "embed_dim": 192, "decoder_embed_dim": 128, "depth": 2, "fill": "mask_token"}
    decoder = MIMDetDecoder(**sizes, pretrained=saved(tmp_path / "mae.pth", state))
    assert torch.equal(decoder.mask_token, state["mask_token"])
    assert not any("conv_feat_proj" in key for key in decoder.state_dict())
    del state["mask_token"]
    with pytest.raises(CheckpointError, match="mask_token is not in the file"):
        MIMDetDecoder(**sizes, pretrained=saved(tmp_path / "mae.pth", state))


def test_mask_token_fills_what_is_not_sampled():
    model = backbone("ablations/table6_mask_token", "decoder.depth=0").train()
    images = batch([(64, 96)])
    noise = torch.rand(1, 24)
    with fixed_noise(model, noise):
        encoded = model.encoder(images, 0.5)
    decoded = model.decoder(encoded).flatten(2).transpose(1, 2)[0]
    pos = model.decoder._pos_embed_at(model.decoder.decoder_pos_embed, (4, 6))[0]
    expected = model.decoder.decoder_norm(model.decoder.mask_token[0] + pos)
    filled = noise[0].argsort() >= 0
    filled[noise[0].argsort()[:12]] = False
    torch.testing.assert_close(decoded[filled], expected[filled], rtol=1e-5, atol=1e-5)
    assert (decoded[~filled] - expected[~filled]).abs().amax(dim=1).min() > 1e-3
    # Without rows to fill, its gradient is zero, not None (DDP).
    model(images, sample_ratio=1.0)["c4"].sum().backward()
    assert model.decoder.mask_token.grad.abs().max() == 0


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("table6_mask_token", ["decoder.fill=zeros"], "fill 'zeros' is unknown; choose from conv_stem, mask_token"),
        ("table6_mask_token", ["encoder.stem=vgg"], "stem 'vgg' is unknown; choose from conv, convnext"),
        ("table6_mask_token", ["encoder.stem_norm=batch"], "norm 'batch' is unknown; choose from group, layer"),
        ("table5_convnext", ["encoder.stem_norm=layer"], "stem_norm 'layer' needs stem 'conv'"),
        ("table6_mask_token", ["encoder.stem_pretrained=a.pth"], "stem_pretrained needs stem 'convnext'"),
        ("table5_convnext", ["encoder.embed_dim=50", "encoder.num_heads=5"], "embed_dim must be a multiple of 4"),
        ("table5_convnext", ["encoder.stem_pretrained=nowhere.pth"], "no checkpoint at nowhere.pth"),
        ("table8_window", ["encoder.window=0"], "window must be at least 1, got 0"),
        ("table8_window", ["inference_sample_ratio=0.5"], "must be 1, got 0.5"),
        ("table6_mask_token", ["decoder=null"], "without a decoder, .*must be 1, got 0.5"),
        ("table6_mask_token", ["encoder.taps=[1]"], "a pyramid and two taps of the encoder need each other"),
        ("table8_window_vit_fpn", ["encoder.taps=[2,1]"], r"taps must rise within 1 .. 2, got \[2, 1\]"),
        ("table8_window_vit_fpn", ["pyramid=null"], "a pyramid and two taps of the encoder need each other"),
        ("table6_mask_token", ["batch_mode=paked"], "batch_mode: 'paked' is unknown; choose from canvas, packed"),
        ("table6_mask_token", ["sampling=checker"], "sampling: 'checker' is unknown; choose from random, grid"),
        ("table6_mask_token", ["encoder.checkpointing=often"], "'often' is unknown; choose from true, false, auto"),
        ("table6_mask_token", ["encoder.recompute=full"], "recompute: 'full' is unknown; choose from "),
        *(("table6_mask_token", [f"sample_ratio={r}"], r"must be in \(0, 1\]") for r in ("0.0", "-0.5", "1.5", ".nan")),
    ],
)
def test_what_does_not_go_together_is_refused(name, changes, message):
    with pytest.raises((ValueError, CheckpointError), match=message):
        backbone(f"ablations/{name}", *changes)


def test_a_ratio_below_one_is_refused_where_every_token_is_seen():
    images = batch([(64, 96)])
    for name in ("ablations/table8_window", "ablations/table8_window_vit_fpn"):
        model = backbone(name)
        for call in (
            lambda model=model: model(images, sample_ratio=0.5),
            lambda model=model: model.encoder(images, 0.5),
        ):
            with pytest.raises(ValueError, match="sample_ratio"):
                call()
