"""Benchmarking-ViT: its parts, its configs against the original's, and a small model from training to prediction.

``recordings/benchmarking_small.npz`` holds every 13th value of the original's features and gradients, for the size and
the loss of ``mimdet.testing.small_benchmarking`` and the weights of ``fill_weights.py``.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.kernels import activation_bytes
from support.paths import RECORDINGS
from support.relative_error import relative_error
from support.slots import detections_of

from mimdet.checkpoint.convert import convert_checkpoint
from mimdet.checkpoint.read import CheckpointError, read_checkpoint
from mimdet.config import instantiate, load
from mimdet.data.synthetic import generate_shapes
from mimdet.detection import GeneralizedRCNN
from mimdet.engine import evaluate_only, train
from mimdet.kernels import use
from mimdet.modeling import BenchmarkingViTDet, ImageList
from mimdet.modeling.benchmarking.block import RelativePositionBias, window_partition, window_reverse
from mimdet.modeling.vit import add
from mimdet.predict import Predictor
from mimdet.testing import Recording, fixed_noise
from mimdet.testing.small_benchmarking import SMALL, loss, small_backbone, small_input

COUNTERPART = [
    *(f"model.backbone.bottom_up.{key}={json.dumps(value)}" for key, value in SMALL.items()),
    "model.backbone.bottom_up.with_cp=true",
    "model.backbone.out_channels=32",
    "model.proposal_generator.pre_nms_topk=[50,50]",
    "model.proposal_generator.post_nms_topk=[20,20]",
    "model.roi_heads.batch_size_per_image=16",
    "model.roi_heads.box_head.conv_dims=[32]",
    "model.roi_heads.box_head.fc_dims=[32]",
    "model.roi_heads.mask_head.conv_dims=[32]",
    "dataloader.train.total_batch_size=2",
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
    "train.reference_batch_size=2",
    "train.max_iter=2",
    "train.eval_period=2",
    "train.device=cpu",
]


@pytest.mark.parametrize(("height", "width", "size"), [(8, 12, 4), (7, 5, 4), (3, 2, 7)], ids=str)
def test_windows_and_back(height, width, size):
    x = torch.randn(2, height, width, 3)
    windows = window_partition(x, size)
    rows, columns = -(-height // size), -(-width // size)
    assert windows.shape == (2 * rows * columns, size * size, 3)
    padded = torch.zeros(2, rows * size, columns * size, 3)
    padded[:, :height, :width] = x
    for sample, row, column in np.ndindex(2, rows, columns):
        expected = padded[sample, row * size : (row + 1) * size, column * size : (column + 1) * size].flatten(0, 1)
        assert torch.equal(windows[(sample * rows + row) * columns + column], expected)
    assert torch.equal(window_reverse(windows, size, height, width), x)


def test_windows_refuse():
    with pytest.raises(ValueError, match="must be"):
        window_partition(torch.zeros(2, 16, 3), 4)
    with pytest.raises(ValueError, match="size positive"):
        window_partition(torch.zeros(2, 4, 4, 3), 0)
    with pytest.raises(ValueError, match="8x9 map has 6 windows of 16 cells"):
        window_reverse(torch.zeros(4, 16, 3), 4, 8, 9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_position_bias_is_the_tables_rows_by_the_index(dtype):
    module = RelativePositionBias((3, 5), num_heads=2)
    table = module.relative_position_bias_table
    torch.nn.init.normal_(table)
    bias = module(dtype)
    computed = table[module.relative_position_index].permute(2, 0, 1)[None].to(dtype)
    assert torch.equal(bias, computed)
    upstream = torch.randn(bias.shape).to(dtype)
    actual, expected = (torch.autograd.grad(x, table, upstream)[0] for x in (bias, computed))
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_features_and_gradients_of_the_original():
    golden = Recording("benchmarking_small").data
    model = small_backbone()
    features = model(ImageList(small_input(), [(128, 100), (50, 128)]))
    assert {name: f.shape[1:] for name, f in features.items()} == {
        name: (shape.channels, 128 // shape.stride, 128 // shape.stride) for name, shape in model.output_shape().items()
    }
    loss(features).backward()
    actual = {**features, **{f"grad.{n}": p.grad for n, p in model.named_parameters()}}
    assert set(golden) == set(actual)
    for name, value in actual.items():
        limit = 2e-5 if name.startswith("grad.") else 3e-6
        assert relative_error(value.detach().flatten()[::13], golden[name]) <= limit, name


def test_checkpointing_and_selective_recomputation_change_nothing():
    grads, kept, x = [], [], small_input()
    for kernels, options in (("eager", {"recompute": "none"}), ("auto", {}), ("auto", {"with_cp": True})):
        model = small_backbone(**options)
        with use(kernels):
            kept.append(activation_bytes(lambda model=model: model(x), model))
            loss(model(x)).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for other in grads[1:]:
        for name, expected in grads[0].items():
            assert relative_error(other[name], expected) <= 2e-5, name
    assert kept[2] < 0.8 * kept[1]
    assert kept[1] < kept[0]


def test_attention_runs_what_has_a_gradient_of_the_bias(monkeypatch):
    attention, allowed = torch.nn.functional.scaled_dot_product_attention, []

    def recorded(*arguments, **options):
        allowed.append((torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()))
        return attention(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    small_backbone()(small_input(1))
    assert allowed == [(False, True)] * 8
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_drop_path_leaves_out_windows():
    """At rate 1 only the last block is dropped; its quarter's window blocks have a lower rate."""
    model = small_backbone(drop_path_rate=1.0).train()
    blocks = list(model.blocks)
    assert [b.drop_path1.drop_prob if b.drop_path1 else 0 for b in blocks] == pytest.approx([i / 7 for i in range(8)])
    x, bias = torch.randn(8, 16, 64), model.windowed_rel_pos_bias()
    assert torch.equal(add(*blocks[7](x, bias=bias)), x)
    changed = (add(*blocks[4](x.repeat(8, 1, 1), bias=bias)) != x.repeat(8, 1, 1)).flatten(1).any(1)
    assert 0 < changed.sum() < 64


def test_autocast():
    model, x = small_backbone(), small_input()
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            actual = model(x)
    for name, feature in expected.items():
        assert relative_error(actual[name].float(), feature) <= 2e-2, name


def mae_file(path, grid=14, decoder=True):
    """A file with the keys of MAE's, and its weights."""
    donor, width = small_backbone().state_dict(), SMALL["embed_dim"]
    state = {key: value for key, value in donor.items() if key.startswith(("patch_embed.", "blocks."))}
    state |= {"cls_token": torch.zeros(1, 1, width), "pos_embed": torch.randn(1, grid * grid + 1, width)}
    state |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    if decoder:
        state |= {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, width)}
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}}, path)
    return state


@pytest.mark.parametrize("decoder", [False, True], ids=["encoder-only", "full"])
def test_mae_weights(tmp_path, caplog, decoder):
    state = mae_file(tmp_path / "mae.pth", decoder=decoder)
    with caplog.at_level("INFO", logger="mimdet"):
        model = BenchmarkingViTDet(**SMALL, pretrained=str(tmp_path / "mae.pth"))
    for key, value in model.state_dict().items():
        if key.startswith(("patch_embed.", "blocks.")):
            assert torch.equal(value, state[key]), key
    assert "MAE -> benchmarking: 98 tensors loaded" in caplog.text
    torch.testing.assert_close(model.pos_embed, BenchmarkingViTDet(**SMALL).pos_embed)


@pytest.mark.parametrize(("grid", "exact"), [(8, True), (14, False)])
def test_position_table_of_the_mae_file(tmp_path, grid, exact):
    state = mae_file(tmp_path / "mae.pth", grid=grid)
    model = BenchmarkingViTDet(**{**SMALL, "sincos_pos_embed": False}, pretrained=str(tmp_path / "mae.pth"))
    table = state["pos_embed"][:, 1:]
    assert torch.equal(model.pos_embed, table) == exact
    expected = torch.nn.functional.interpolate(table.mT.unflatten(2, (grid, grid)), (8, 8), mode="bicubic")
    torch.testing.assert_close(model.pos_embed, expected.flatten(2).mT)
    assert model.pos_embed.requires_grad


@pytest.mark.parametrize("changes", [{"embed_dim": 96}, {"depth": 4}, {"beit_qkv_bias": True}], ids=str)
def test_mae_file_of_another_model_is_refused(tmp_path, changes):
    mae_file(tmp_path / "mae.pth")
    with pytest.raises(CheckpointError, match="does not fit the benchmarking"):
        BenchmarkingViTDet(**{**SMALL, **changes}, pretrained=str(tmp_path / "mae.pth"))


def test_frozen_patches_and_zero_positions():
    model = small_backbone(stop_grad_conv1=True, zero_pos_embed=True)
    assert model.pos_embed.abs().max() == 0
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["patch_embed.proj.weight", "patch_embed.proj.bias"]


def test_initial_weights():
    model = BenchmarkingViTDet(**{**SMALL, "embed_dim": 128, "sincos_pos_embed": False})
    # a normal variable truncated at one std has 0.54 of its std; truncated at two, and rescaled, all of it
    spread = 0.02 * 0.5396
    assert model.blocks[5].mlp.fc1.weight.std().item() == pytest.approx(spread, rel=0.03)
    assert model.blocks[5].mlp.fc2.weight.std().item() == pytest.approx(spread / 12**0.5, rel=0.03)
    assert model.pos_embed.std().item() == pytest.approx(spread, rel=0.05)
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(768**-0.5, rel=0.03)
    assert model.ms_adaptor[1].weight.std().item() == pytest.approx((4 * 128) ** -0.5, rel=0.03)
    assert model.ms_adaptor[1].bias.abs().max() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"img_size": 120}, "img_size 120 must be a multiple"),
        ({"window_size": 5}, "window_size 5"),
        ({"depth": 6}, "depth must be a multiple of 4, got 6"),
        ({"num_heads": 3}, "embed_dim 64 must be a multiple of num_heads 3"),
        ({"recompute": "some"}, "recompute: 'some' is unknown"),
    ],
    ids=["image", "window", "depth", "heads", "recompute"],
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        BenchmarkingViTDet(**{**SMALL, **changes})


def test_bad_input():
    model = small_backbone()
    with pytest.raises(ValueError, match=r"must be 128x128, got 96x128: let FixedSizeCrop"):
        model(torch.zeros(1, 3, 96, 128))
    with pytest.raises(ValueError, match="draws no numbers for tokens"), fixed_noise(model, torch.zeros(1, 64)):
        pass


def test_lsj_postprocess():
    """Both axes by the larger ratio; what is in the padding is dropped."""
    detection = {
        "boxes": torch.tensor([[10.0, 5.0, 60.0, 30.0], [20.0, 40.0, 80.0, 90.0], [20.0, 55.0, 80.0, 90.0]]),
        "scores": torch.tensor([0.9, 0.8, 0.7]),
        "labels": torch.tensor([1, 2, 3]),
        "mask_probabilities": torch.ones(3, 28, 28),
    }
    model = SimpleNamespace(lsj_postprocess=True, device=torch.device("cpu"))
    (result,) = GeneralizedRCNN._resize(model, detections_of([detection]), [(100, 100)], [(100, 200)]).tolist()
    result = GeneralizedRCNN._paste(result, (100, 200))
    assert result["boxes"].tolist() == [[20, 10, 120, 60], [40, 80, 160, 100]]
    assert result["labels"].tolist() == [1, 2]
    assert result["masks"].sum((1, 2)).tolist() == pytest.approx([100 * 50, 120 * 20], abs=8)  # blurred corners


@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        return instantiate(load("configs/benchmarking_b_100ep.py").model)


def test_state_dict_golden(full_size):
    expected = json.loads((RECORDINGS / "benchmarking_b.json").read_text())
    actual = {k: [list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in full_size.state_dict().items()}
    assert list(actual) == list(expected)
    assert actual == expected


def test_parameters_norms_and_drop_path_golden(full_size):
    expected = json.loads((RECORDINGS / "param_counts.json").read_text())["benchmarking_b"]
    assert expected["total"] == 118_674_184
    assert sum(p.numel() for p in full_size.parameters()) == expected["total"]
    assert sum(p.numel() for p in full_size.parameters() if p.requires_grad) == expected["trainable"]
    norms = json.loads((RECORDINGS / "norms_and_droppath.json").read_text())["benchmarking_b"]
    for name, rate in norms.pop("drop_path").items():
        for branch in "12":
            assert full_size.get_submodule(name + branch).drop_prob == pytest.approx(rate)
    for label, names in norms.items():
        eps = float(label.split("eps=")[1].split()[0])
        assert {full_size.get_submodule(name).eps for name in names} == {eps}, label
    assert full_size.backbone.bottom_up.ms_adaptor[0][1].num_groups == 32


def test_parameter_groups_golden(full_size):
    expected = json.loads((RECORDINGS / "optim_benchmarking_b.json").read_text())
    cfg = load("configs/benchmarking_b_100ep.py")
    groups = instantiate(cfg.optimizer, params=instantiate(cfg.optimizer.params, model=full_size)).param_groups
    assert [len(group["params"]) for group in groups] == expected["group_sizes"]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert {group["lr"] for group in groups} == {8e-5}
    names = {parameter: name for name, parameter in full_size.named_parameters()}
    assert {names[parameter] for parameter in groups[1]["params"]} == set(expected["undecayed"])


@pytest.mark.parametrize("epochs", [25, 50, 100])
def test_schedules_golden(epochs):
    expected = json.loads((RECORDINGS / "lr_schedule.json").read_text())[f"benchmarking_b_{epochs}ep"]
    cfg = load(f"configs/benchmarking_b_{epochs}ep.py")
    assert cfg.train.max_iter == expected["max_iter"]
    schedule = instantiate(cfg.lr_multiplier)
    computed = {i: schedule(int(i) / cfg.train.max_iter) for i in expected["multiplier"]}
    assert computed == pytest.approx(expected["multiplier"], rel=1e-12, abs=1e-15)
    assert cfg.train.output_dir.endswith(f"_{epochs}ep")


def test_a_shrunken_counterpart_trains_saves_loads_and_evaluates(tmp_path):
    shapes = generate_shapes(tmp_path / "shapes", 4, 2, image_size=(96, 128))
    data = [
        f"dataloader.{split}.dataset.{key}={json.dumps(value)}"
        for split, part in (("train", "train"), ("test", "val"))
        for key, value in {
            "names": None,
            "json_file": str(shapes / f"annotations/instances_{part}.json"),
            "image_root": str(shapes / part),
        }.items()
    ]
    overrides = [*COUNTERPART, *data, f"train.output_dir={json.dumps(str(tmp_path / 'out'))}"]
    metrics = train(load("configs/benchmarking_b_25ep.py", overrides), overrides=overrides)
    steps = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(step["total_loss"]) for step in steps if "total_loss" in step)
    weights = tmp_path / "out/model_final.pth"
    assert "backbone.bottom_up.global_rel_pos_bias.relative_position_bias_table" in read_checkpoint(weights)["model"]
    convert_checkpoint(weights, tmp_path / "detector.pth", "detector")
    again = load(tmp_path / "out/config.yaml", [f"train.init_checkpoint={json.dumps(str(tmp_path / 'detector.pth'))}"])
    assert evaluate_only(again)["bbox"] == pytest.approx(metrics["bbox"], nan_ok=True)
    image = torch.randint(256, (3, 40, 100), dtype=torch.uint8)
    detections = Predictor(None, tmp_path / "detector.pth", device="cpu", score_threshold=0)(image)
    assert len(detections["boxes"]) > 0
    assert detections["masks"].shape[1:] == (40, 100)
    assert (detections["boxes"].amax(0) <= torch.tensor([100, 40, 100, 40])).all()
    with pytest.raises(CheckpointError, match=r"no backbone\.bottom_up\.encoder\.\* weights"):
        convert_checkpoint(weights, tmp_path / "mae.pth", "mae")
