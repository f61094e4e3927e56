import pytest
import torch
from torch import nn

from mimdet.checkpoint.read import CheckpointError
from mimdet.engine import load_model_weights


def block(width):
    return nn.ModuleDict({"norm1": nn.LayerNorm(width)})


def detector(classes=80, width=8, depth=2, decoder_depth=1):
    """A module with a detector's key names."""
    modules = {
        "backbone.bottom_up.encoder.blocks": nn.ModuleList(block(width) for _ in range(depth)),
        "backbone.bottom_up.decoder.decoder_blocks": nn.ModuleList(block(4) for _ in range(decoder_depth)),
        "roi_heads.box_predictor.cls_score": nn.Linear(4, classes + 1),
        "roi_heads.box_predictor.bbox_pred": nn.Linear(4, 4 * classes),
        "roi_heads.mask_head.predictor": nn.Conv2d(4, classes, 1),
    }
    root = nn.Module()
    for name, module in modules.items():
        parent = root
        *path, leaf = name.split(".")
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        parent.add_module(leaf, module)
    return root


def same(a, b):
    b = b.state_dict()
    return all(torch.equal(value, b[key]) for key, value in a.state_dict().items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "iteration": 5},
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
    ],
    ids=["bare", "under-model", "module-prefix"],
)
def test_every_form_loads(tmp_path, wrap):
    source, model = detector(), detector()
    torch.save(wrap(source.state_dict()), tmp_path / "w.pth")
    load_model_weights(model, tmp_path / "w.pth")
    assert same(model, source)


def refusal(tmp_path, model, state):
    torch.save({"model": state}, tmp_path / "w.pth")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_model_weights(model, tmp_path / "w.pth")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "nothing may be loaded"
    assert str(tmp_path / "w.pth") in str(caught.value)
    return str(caught.value)


def test_the_advice_for_other_classes_works(tmp_path):
    source, model = detector(classes=80), detector(classes=4)
    torch.save({"model": source.state_dict()}, tmp_path / "w.pth")
    load_model_weights(model, tmp_path / "w.pth", ["roi_heads.box_predictor.*", "roi_heads.mask_head.predictor.*"])
    key = "backbone.bottom_up.encoder.blocks.0.norm1.weight"
    assert torch.equal(model.state_dict()[key], source.state_dict()[key])
    assert model.state_dict()["roi_heads.mask_head.predictor.weight"].shape[0] == 4


def test_ignored_keys_keep_the_models_values_even_where_they_fit(tmp_path):
    source, model = detector(), detector()
    before = model.roi_heads.box_predictor.cls_score.weight.clone()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    load_model_weights(model, tmp_path / "w.pth", ["roi_heads.box_predictor.*"])
    assert torch.equal(model.roi_heads.box_predictor.cls_score.weight, before)


def test_a_pattern_that_matches_nothing_is_an_error(tmp_path):
    torch.save(detector().state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"'roi_head\.\*' matches no key"):
        load_model_weights(detector(), tmp_path / "w.pth", ["roi_head.*"])


def retinanet(classes):
    root = nn.Module()
    root.head = nn.ModuleDict({"cls_score": nn.Conv2d(4, 9 * classes, 1), "bbox_pred": nn.Conv2d(4, 36, 1)})
    return root


@pytest.mark.parametrize(
    ("model", "source", "parts"),
    [
        (
            detector(classes=4),
            detector(classes=80),
            [
                "6 of another shape: roi_heads.box_predictor.cls_score.weight: checkpoint (81, 4), model (5, 4)",
                "... and 1 more",
                "80 classes, the model 4",
                "init_checkpoint_ignore=[roi_heads.box_predictor.*,roi_heads.mask_head.predictor.*]",
            ],
        ),
        (retinanet(4), retinanet(80), ["80 classes, the model 4", "init_checkpoint_ignore=[head.cls_score.*]"]),
        (detector(), detector(width=16), ["encoder width is 16, the model's 8: another model size"]),
        (detector(), detector(depth=3), ["checkpoint's encoder depth is 3, the model's 2"]),
        (detector(), detector(decoder_depth=2), ["checkpoint's decoder depth is 2, the model's 1"]),
        (retinanet(4), detector(), ["the checkpoint is of a Mask R-CNN, the model is a RetinaNet"]),
        (detector(), nn.ModuleDict({"blocks": nn.ModuleList([block(8)])}), ["pass it as mae_checkpoint.path"]),
        (detector(), nn.ModuleDict({"layer1": nn.LayerNorm(3)}), ["no key is the same"]),
    ],
    ids=["classes", "retinanet-classes", "width", "depth", "decoder-depth", "detector", "mae", "foreign"],
)
def test_the_cause_is_recognized(tmp_path, model, source, parts):
    message = refusal(tmp_path, model, source.state_dict())
    assert all(part in message for part in parts), message


def test_missing_and_unexpected_are_listed(tmp_path):
    state = detector().state_dict()
    state["surprise"] = state.pop("roi_heads.mask_head.predictor.bias")
    message = refusal(tmp_path, detector(), state)
    assert "1 missing in the checkpoint: roi_heads.mask_head.predictor.bias" in message
    assert "1 unexpected in the checkpoint: surprise" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_weights_that_are_not_numbers_are_named(tmp_path, value, dtype):
    state = {key: tensor.to(dtype) for key, tensor in detector().state_dict().items()}
    keys = sorted(state)[:7]
    for key in keys:
        state[key].view(-1)[-1] = value
    message = refusal(tmp_path, detector(), state)
    assert "7 tensors hold NaN or infinite values: " in message
    assert "and 2 more" in message
    assert sum(key in message for key in keys) == 5
    load_model_weights(detector(), tmp_path / "w.pth", ["*"])  # what is not loaded does not matter
