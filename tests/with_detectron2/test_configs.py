"""The model in Detectron2 against the native one: the same weights, numbers and kernels."""

import logging

import pytest
import torch
from support.paths import CONFIGS

from mimdet.config import load
from mimdet.config.write import complete
from mimdet.kernels import library, table
from mimdet.testing.small import small_model

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import Backbone, GeneralizedRCNN
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import EventStorage
from support import detectron2_testing as d2

import mimdet.detectron2 as ours
from mimdet.detectron2.config import load_config

FIVE_LINES = """
from detectron2.config import LazyConfig
from mimdet.config import find_config
ours = LazyConfig.load(str(find_config("detectron2/mimdet_b_mask_rcnn")))
model.update({k: ours.model[k] for k in ("_target_", "backbone", "pixel_mean", "pixel_std", "input_format")})
mae_checkpoint, optimizer, dataloader.train.mapper.image_format = ours.mae_checkpoint, ours.optimizer, "RGB"
"""


@pytest.fixture(scope="module")
def built():
    return d2.small(load_config(d2.BASE))


@pytest.fixture
def model(built):
    d2.fill_module(built)  # statistics of norms move in training
    d2.set_ratio(built, 1.0)
    return built


def test_backbone_is_a_detectron2_backbone(model):
    bottom_up = model.backbone.bottom_up
    assert isinstance(bottom_up, Backbone)
    assert bottom_up.size_divisibility == 32
    assert bottom_up.padding_constraints == {"size_divisibility": 32}
    shapes = bottom_up.output_shape()
    sizes = {name: (s.channels, s.stride) for name, s in shapes.items()}
    assert sizes == {"c2": (48, 4), "c3": (96, 8), "c4": (128, 16), "c5": (128, 32)}
    assert all(type(shape).__module__.startswith("detectron2") for shape in shapes.values())


def test_native_weights_give_the_same_detections(model):
    """The state_dict loads in both directions."""
    native = small_model().eval()
    native.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(native.state_dict(), strict=True)
    d2.set_ratio(model, 0.5)
    native.backbone.bottom_up.inference_sample_ratio = 0.5
    batch = d2.inputs()
    with torch.no_grad():
        torch.manual_seed(0)
        expected = native([x["image"] for x in batch])
        torch.manual_seed(0)
        results = model.eval()(batch)
    d2.assert_same_detections([x["instances"] for x in results], expected)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("[!b]*.py")), ids=lambda f: f.stem)
def test_native_configs_load_with_detectron2s_lazy_config(file):
    cfg = LazyConfig.load(str(file))
    assert complete(cfg) == complete(load(file))
    samples = "sample_ratio" in cfg.model.backbone.bottom_up
    LazyConfig.apply_overrides(cfg, ["model.backbone.bottom_up.sample_ratio=1.0"] if samples else [])
    with torch.device("meta"):
        model = instantiate(cfg.model)
    assert type(model).__module__.startswith("mimdet.detection.")
    assert not samples or model.backbone.bottom_up.sample_ratio == 1.0
    cfg.optimizer.params.model = model
    assert len(instantiate(cfg.optimizer).param_groups) > 1
    assert instantiate(cfg.lr_multiplier)(0.5) > 0
    assert len(instantiate(cfg.dataloader.train.mapper).augmentations.augs) > 1


def test_channels_last_throughout(model):
    """Backbone, pyramid and heads, in training."""
    layouts, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            hooks.append(module.register_forward_hook(lambda m, a, out, name=name: layouts.update({name: out})))
    with EventStorage(0):
        model.train()(d2.inputs())
    for hook in hooks:
        hook.remove()
    wrong = [n for n, out in layouts.items() if not out.is_contiguous(memory_format=torch.channels_last)]
    assert not wrong
    parts = ("backbone.bottom_up", "backbone.fpn_", "proposal_generator", "roi_heads.box_head", "roi_heads.mask_head")
    assert all(any(name.startswith(part) for name in layouts) for part in parts)


def test_every_operation_takes_the_implementation_of_the_table(model, monkeypatch):
    """A training step inside Detectron2 runs the implementations that ``mimdet info`` names."""
    called, original = set(), library.launch

    def launch(name, impl, *arguments, **options):
        if impl == "cpp":
            called.add(name)
        return original(name, impl, *arguments, **options)

    monkeypatch.setattr(library, "launch", launch)
    d2.set_ratio(model, 0.5)
    with EventStorage(0):
        sum(model.train()(d2.inputs()).values()).backward()
    model.zero_grad()
    used = {"add_layer_norm", "bias_gelu", "gather_add_pos", "group_norm_gelu", "scatter_fill"}
    chosen = {row.op: row.impl for row in table("cpu") if row.chosen}
    print({op: (chosen[op], sorted(n for n in called if n.startswith(op))) for op in chosen})
    assert used <= set(chosen)
    for op in used:
        calls = [name for name in called if name.startswith(op)]
        assert bool(calls) == (chosen[op] == "cpp"), (op, chosen[op], calls)


def test_autocast_trains(model):
    d2.set_ratio(model, 0.5)
    d2.assert_autocast_trains(model, d2.inputs(), rel=0.05)


def test_plain_tensor_counts_as_unpadded_and_says_so(model, caplog):
    images = ImageList.from_tensors([x["image"] for x in d2.inputs()[:1]], 32)
    bottom_up = model.eval().backbone.bottom_up
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        actual, expected = bottom_up(images.tensor), bottom_up(images)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert "got a plain tensor instead of an ImageList" in caplog.text
    with pytest.raises(TypeError, match=r"takes an ImageList, not list"):
        bottom_up([images.tensor])


def test_detectron2s_own_rcnn_takes_the_backbone():
    """Its R-CNN passes the plain tensor to the backbone."""
    cfg = load_config(d2.BASE)
    cfg.model._target_ = GeneralizedRCNN
    model = d2.small(cfg).eval()
    with torch.no_grad():
        assert len(model(d2.inputs()[:1])[0]["instances"]) > 0


def test_five_lines_in_a_config_of_detectron2(tmp_path):
    """Those of the docs, without the fast step."""
    cfg = LazyConfig.load(d2.beside_common(tmp_path, "mask_rcnn_fpn", FIVE_LINES))
    assert cfg.dataloader.test.mapper.image_format == "RGB"
    results = d2.small(cfg).eval()(d2.inputs()[:1])
    assert len(results[0]["instances"]) > 0


def test_inference_from_given_boxes_and_without_postprocessing(model):
    batch = d2.inputs()
    with torch.no_grad():
        raw = model.eval().inference(batch, do_postprocess=False)
        boxes_only = [Instances(r.image_size, pred_boxes=r.pred_boxes, pred_classes=r.pred_classes) for r in raw]
        again = model.inference(batch, boxes_only, do_postprocess=False)
    for one, other in zip(raw, again, strict=True):
        torch.testing.assert_close(one.pred_masks, other.pred_masks)
    with pytest.raises(RuntimeError, match="eval mode"):
        model.train().inference(batch)


def test_large_scale_jitter_postprocess():
    """One factor for both axes; what is in the square's padding is dropped."""
    from detectron2.structures import Boxes

    boxes = torch.tensor([[10.0, 10, 50, 40], [0, 70, 40, 90], [60, 10, 120, 70]])
    results = Instances((100, 100), pred_boxes=Boxes(boxes), scores=torch.tensor([0.9, 0.8, 0.7]))
    results.pred_masks = torch.ones(3, 1, 28, 28)
    (result,) = ours._postprocess([results], [{"height": 120, "width": 200}], [(100, 100)])
    result = result["instances"]
    assert result.image_size == (120, 200)
    assert result.pred_boxes.tensor.tolist() == [[20, 20, 100, 80], [120, 20, 200, 120]]
    assert result.pred_masks.shape == (2, 120, 200)
    assert result.pred_masks[0].sum() == pytest.approx(80 * 60, rel=0.05)
    assert torch.equal(results.pred_boxes.tensor, boxes)


def test_the_optimizer_is_fused_as_in_native_training(model):
    cfg = load_config(d2.BASE)
    cfg.optimizer.params.model = model
    assert instantiate(cfg.optimizer).defaults["fused"] is True


def test_overridden_mae_path_is_read(tmp_path):
    with pytest.raises(RuntimeError, match=r"no checkpoint at .*mae\.pth"):
        instantiate(load_config(d2.BASE, [f"mae_checkpoint.path='{tmp_path}/mae.pth'"]).model)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.py", "from models import MIMDetBackbone\nmodel = dict()"),
        ("a.py", "from models.modeling import _postprocess\nmodel = dict()"),
        ("a.yaml", "model: {_target_: models.mimdet.MIMDetBackbone}"),
    ],
)
def test_config_of_the_original_is_told_the_import(tmp_path, monkeypatch, name, text):
    d2.hide_the_original(monkeypatch)
    (tmp_path / name).write_text(text)
    with pytest.raises(ImportError, match=r"names the original MIMDet's models\S*: import from mimdet\.detectron2"):
        load_config(str(tmp_path / name))


def test_parts_without_a_counterpart_are_named():
    cfg = load_config(d2.BASE)
    cfg.model.proposal_generator._target_ = "mimdet.detection.Novelty"
    with pytest.raises(ValueError, match=r"no counterpart of mimdet\.detection\.Novelty"):
        ours.use_detectron2(cfg.model, cfg.dataloader, cfg.lr_multiplier, cfg.train)


SHELL = "{_target_: os.system, command: touch RAN}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: !!python/object/apply:os.system ['touch RAN']", "not valid YAML"),
        ("model: {a: !!python/name:os.system ''}", "os.system is no part of the shipped configs"),
        ("model: !!python/object/apply:functools.partial {state: [print, [], {}, {}]}", "no functools.partial"),
        (
            "model: !!python/object/apply:functools.partial {state: [!!python/name:os.system '', [], {}, {}]}",
            "os.system",
        ),
        (f"model: {SHELL}", "model names 'os.system' to be called"),
        ("model: {_target_: detectron2.utils.env.os.system, command: touch RAN}", "to be called"),
        (f"model: {{_target_: detectron2.modeling.FPN, norm: {SHELL}}}", "model.norm names 'os.system'"),
        ("model: '${oc.create:{_target_:os.system,command:x}}'", "interpolations may be references"),
    ],
)
def test_a_yaml_config_runs_no_code(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"(?s)config .*evil\.yaml.*{message}"):
        load_config(str(tmp_path / "evil.yaml"))
    assert not (tmp_path / "RAN").exists()


def test_a_yaml_config_that_detectron2_saved_is_the_config(tmp_path):
    cfg = load_config(d2.BASE)
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    again = load_config(str(tmp_path / "config.yaml"), ["train.max_iter=7"])
    assert again.train.max_iter == 7
    assert set(instantiate(again.model).state_dict()) == set(instantiate(cfg.model).state_dict())
