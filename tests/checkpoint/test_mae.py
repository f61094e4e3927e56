"""Loading MAE checkpoints: what goes where, and what is refused."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from support.mae_checkpoints import META, fake_mae, saved
from support.paths import RECORDINGS
from torch import nn

from mimdet.checkpoint.convnext import load_convnext
from mimdet.checkpoint.mae import load_mae
from mimdet.checkpoint.read import CheckpointError
from mimdet.modeling import MIMDetDecoder, MIMDetEncoder

NORM = partial(nn.LayerNorm, eps=1e-5)


def encoder(img_size=320, depth=3, width=192, pretrained=None):
    return MIMDetEncoder(img_size, 16, 3, width, depth, 3, norm_layer=NORM, pretrained=pretrained)


def decoder(img_size=320, depth=2, pretrained=None):
    return MIMDetDecoder(img_size, 16, 192, 128, depth, 4, norm_layer=NORM, pretrained=pretrained)


@pytest.mark.parametrize(
    ("case", "prefix", "img_size"),
    [
        ("plain_img224", "", 224),
        ("plain_img320", "", 320),
        ("prefix_encoder_img224", "encoder.", 224),
        ("prefix_module_img320", "module.", 320),
    ],
)
def test_loads_as_the_original(tmp_path, case, prefix, img_size):
    state = fake_mae()
    path = saved(tmp_path / "mae.pth", {prefix + k: v for k, v in state.items()})
    positions = np.load(RECORDINGS / "mae_load.npz")
    for make, part in ((encoder, "encoder"), (decoder, "decoder")):
        module = make(img_size)
        before = {k: v.clone() for k, v in module.state_dict().items()}
        report = load_mae(module, path, part)
        golden = META["cases"][case][part]
        name = "pos_embed" if part == "encoder" else "decoder_pos_embed"
        for key, source in golden["loaded_from"].items():
            now = module.state_dict()[key]
            if key == name:
                np.testing.assert_allclose(now[0, ::7, ::5].numpy(), positions[f"{case}_{name}"], atol=1e-5)
            elif source is None:
                assert torch.equal(now, before[key]), key
            else:
                assert torch.equal(now, state[source.removeprefix(prefix)]), key
        assert sorted(report.fresh) == sorted(golden["load_result"]["missing"])
        assert sorted(report.dropped) == sorted(golden["load_result"]["unexpected"])


def test_module_encoder_prefix_is_understood(tmp_path):
    state = fake_mae()
    path = saved(tmp_path / "mae.pth", {"module.encoder." + k: v for k, v in state.items()})
    assert torch.equal(encoder(pretrained=path).blocks[2].mlp.fc1.weight, state["blocks.2.mlp.fc1.weight"])


def test_report_is_short_and_plain(tmp_path, caplog):
    path = saved(tmp_path / "mae.pth", fake_mae())
    with caplog.at_level("INFO", logger="mimdet"):
        encoder(pretrained=path)
    assert "pos_embed 14x14 -> 20x20" in caplog.text
    assert "fresh by design: 14 (patch_embed)" in caplog.text
    assert len(caplog.text.splitlines()) <= 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(encoder, width=96), "has 3 blocks of width 192, the model 3 blocks of width 96"),
        (partial(encoder, depth=4), "blocks.3.norm1.weight is not in the file"),
        (partial(encoder, depth=2), "blocks.2.* of the file has no place"),
        (partial(decoder, depth=6), "decoder_blocks.4.norm1.weight is not in the file"),
    ],
    ids=["other-width", "deeper", "shallower", "deeper-decoder"],
)
def test_other_model_size_is_refused(tmp_path, make, message):
    path = saved(tmp_path / "mae.pth", fake_mae())
    with pytest.raises(CheckpointError, match=message.replace(".*", r"\.\S+")):
        make(pretrained=path)


def test_encoder_only_file_is_refused_for_the_decoder(tmp_path):
    path = saved(tmp_path / "mae.pth", {k: v for k, v in fake_mae().items() if "decoder" not in k})
    with pytest.raises(CheckpointError, match="encoder-only"):
        decoder(pretrained=path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a checkpoint at all", "cannot be read"),
        ([1, 2], "holds a list"),
        ({"model": {}}, "holds no weights"),
        ({"model": {"conv.weight": torch.zeros(1)}}, "not a MAE checkpoint"),
        ({"model": {}, "hook": Path("/")}, r"wants to run pathlib\.\S+ while it is read"),
    ],
    ids=["garbage", "list", "no-tensors", "not-mae", "code"],
)
def test_what_is_no_mae_file_is_named(tmp_path, content, message):
    path = tmp_path / "broken.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        encoder(pretrained=str(path))
    assert str(path) in str(caught.value)


def test_values_that_are_not_numbers_are_refused(tmp_path):
    state = fake_mae()
    state["blocks.1.mlp.fc1.weight"][0, 0] = torch.nan
    state["decoder_blocks.0.norm1.bias"][0] = torch.inf
    path = saved(tmp_path / "mae.pth", state)
    module = encoder()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    for target, part, key in (
        (module, "encoder", "blocks.1.mlp.fc1.weight"),
        (decoder(), "decoder", "decoder_blocks.0.norm1.bias"),
    ):
        with pytest.raises(CheckpointError, match=rf"mae\.pth: 1 tensor holds NaN or infinite values: {key}\."):
            load_mae(target, path, part)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    saved(tmp_path / "convnext.pth", {"weight": torch.tensor([[torch.inf]])})
    with pytest.raises(CheckpointError, match=r"convnext\.pth: 1 tensor holds NaN or infinite values: weight\."):
        load_convnext(nn.Linear(1, 1, bias=False), tmp_path / "convnext.pth")
