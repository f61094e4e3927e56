"""Configs of Detectron2 and of the original MIMDet as native ones; neither is installed for these tests."""

import logging
import re
import sys
import textwrap
import types

import pytest
import torch
from omegaconf import OmegaConf
from support.command import run
from support.paths import CONFIGS, ROOT

from mimdet.config import instantiate, load, to_yaml
from mimdet.config.counterparts import BY_NATIVE, COUNTERPARTS, nearest
from mimdet.config.lazy import resolve_target
from mimdet.config.stand_ins import imports_detectron2
from mimdet.config.write import complete, convert_config
from mimdet.data import CocoDataset, DataError

# The styles of the original MIMDet's configs: a class and a function in a config, dicts that are used as configs.
COMMON = """
from fvcore.common.param_scheduler import MultiStepParamScheduler
from omegaconf import DictConfig
from detectron2.config import LazyCall as L
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.solver import WarmupParamScheduler
from detectron2.structures import Instances
from models.modeling import _postprocess

class GeneralizedRCNNImageListForward(GeneralizedRCNN):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)

    def forward(self, batch: list[Instances] | None = None):
        return _postprocess(batch)

def get_fpn_model_parameters(
    model, weight_decay=1e-5, weight_decay_norm=0.0, base_lr=4e-5, skip_list=(), multiplier=1.5
):
    return []

train = dict(
    output_dir="output", init_checkpoint="", max_iter=90, amp=dict(enabled=True), eval_period=5, log_period=20,
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=True),
    checkpointer=dict(period=5, max_to_keep=100), device="cuda",
)
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1, 0.01], milestones=[1, 2], num_updates=train["max_iter"]),
    warmup_length=0.1,
    warmup_factor=0.5,
)
mae_checkpoint = DictConfig(content={"path": None}, flags={"allow_objects": True})
"""
COCO = """
import detectron2.data.transforms as T
from detectron2 import model_zoo

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.update(total_batch_size=64)
dataloader.train.mapper.image_format = "RGB"
dataloader.train.mapper.augmentations = [
    T.RandomFlip(horizontal=True),
    T.RandomApply(T.AugmentationList([T.ResizeShortestEdge((400, 500, 600), sample_style="choice"),
                                      T.RandomCrop("absolute_range", (384, 600))]), prob=0.5),
    T.ResizeShortestEdge((480, 512, 544, 576, 608, 640, 736, 768, 800), max_size=1333, sample_style="choice"),
]
"""
BASE = """
from functools import partial
import torch
from torch import nn
from detectron2.config.lazy import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.layers.batch_norm import NaiveSyncBatchNorm
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from detectron2.config import LazyConfig
from detectron2 import model_zoo
from models import MIMDetBackbone, MIMDetDecoder, MIMDetEncoder
from .coco import dataloader
from .common import (
    GeneralizedRCNNImageListForward, get_fpn_model_parameters, lr_multiplier, mae_checkpoint, train
)

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
model._target_ = GeneralizedRCNNImageListForward
model.lsj_postprocess = False
model.vis_period = 0
model.backbone.bottom_up = L(MIMDetBackbone)(
    encoder=L(MIMDetEncoder)(
        img_size=800, patch_size=16, in_chans=3, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0, dpr=0.1,
        norm_layer=partial(nn.LayerNorm, eps=1e-5), pretrained="${mae_checkpoint.path}", checkpointing=True,
    ),
    decoder=L(MIMDetDecoder)(
        img_size="${..encoder.img_size}", patch_size="${..encoder.patch_size}", embed_dim=768, decoder_embed_dim=512,
        depth=4, num_heads=16, mlp_ratio=4.0, pretrained="${..encoder.pretrained}", checkpointing=True,
    ),
    sample_ratio=0.5,
    size_divisibility=32,
    _out_feature_channels=[192, 384, 512, 512],
)
model.backbone.update(in_features=["c2", "c3", "c4", "c5"], norm="SyncBN")
model.update(pixel_mean=[123.675, 116.28, 103.53], pixel_std=[58.395, 57.12, 57.375], input_format="RGB")
model.proposal_generator.head.conv_dims = [-1, -1]
model.roi_heads.box_head = L(FastRCNNConvFCHead)(
    input_shape=ShapeSpec(256, height=7, width=7), conv_dims=[256] * 4, fc_dims=[1024]
)
model.roi_heads.box_head.conv_norm = model.roi_heads.mask_head.conv_norm = (
    lambda c: NaiveSyncBatchNorm(c, stats_mode="N")
)
optimizer = L(torch.optim.AdamW)(
    params=L(get_fpn_model_parameters)(
        weight_decay=0.1, base_lr="${..lr}", skip_list=("pos_embed", "decoder_pos_embed"), multiplier=2.0
    ),
    lr=8e-5, betas=(0.9, 0.999), weight_decay=0.1,
)
train.checkpointer.period = train.eval_period = 1875
train.max_iter = lr_multiplier.scheduler.num_updates = 67500
lr_multiplier.scheduler.milestones = [50625, 61875]
lr_multiplier.warmup_length = 0.25 / 36
lr_multiplier.warmup_factor = 0.0
train.output_dir = "output/mimdet_b_mask_rcnn"
"""
HEADER = """
import torch
import detectron2.data.transforms as T
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from mimdet.config import load
from mimdet.detectron2 import MIMDetBackbone

_ours = load("mimdet_b_mask_rcnn")
dataloader, lr_multiplier, mae_checkpoint, model, optimizer, train = (_ours[key] for key in sorted(_ours))
"""


@pytest.fixture(autouse=True)
def not_installed(monkeypatch):
    """Detectron2, fvcore and the original cannot be imported, even where they are installed."""
    for root in ("detectron2", "fvcore", "models"):
        for name in [name for name in sys.modules if name.split(".")[0] == root]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, root, None)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if "d2" not in p.split("/")[-1] and "orig" not in p])


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
    return folder / f"{name}.py"


@pytest.fixture
def base(tmp_path):
    """A config in the original's style."""
    return write(tmp_path, common=COMMON, coco=COCO, base=BASE)


def problems(file):
    """The lines of the error."""
    with pytest.raises(ValueError, match="these parts have no native counterpart") as caught:
        load(file)
    first, *lines, last = str(caught.value).splitlines()
    assert first == f"config {file}: these parts have no native counterpart:"
    assert last.startswith("change them in the config, or train it with python -m mimdet.detectron2")
    return dict(line.strip().split(": ", 1) for line in lines)


def test_a_config_in_the_originals_style_is_the_shipped_one(base):
    assert complete(load(base)) == complete(load("mimdet_b_mask_rcnn"))


def test_what_changes_without_an_error_is_said_once_each(base, caplog):
    load(base)
    lines = sorted(record.getMessage().removeprefix("config base.py: ") for record in caplog.records)
    encoder, decoder = (f"model.backbone.bottom_up.{part}.checkpointing is 'auto'" for part in ("encoder", "decoder"))
    expected = [
        "model.vis_period is left out: it changes no result",
        decoder,
        encoder,
        "model: GeneralizedRCNNImageListForward of the config file is replaced by mimdet.detection.GeneralizedRCNN",
        "optimizer.params: get_fpn_model_parameters of the config file is replaced by "
        "mimdet.engine.get_fpn_model_parameters",
        "train.device is 'auto'",
        "train.reference_batch_size is 64",
    ]
    assert len(lines) == len(expected)
    assert all(any(line.startswith(start) for line in lines) for start in expected), lines


def test_other_ranks_log_nothing(base, caplog, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    load(base)
    assert not caplog.records


def test_overrides_and_yaml(base, tmp_path):
    """The keys are Detectron2's, and the config that a run saves is native."""
    cfg = load(base, ["model.roi_heads.num_classes=3", "model.inference.passes=2", "dataloader.train.dataset.names=x"])
    text = to_yaml(cfg)
    assert "detectron2" not in text.replace("detectron2_", "")
    (tmp_path / "saved.yaml").write_text(text)
    assert complete(load(tmp_path / "saved.yaml")) == complete(cfg)
    with pytest.raises(KeyError, match=r"did you mean 'model\.roi_heads\.num_classes'"):
        load(base, ["model.roi_heads.num_clases=3"])


def test_nothing_but_the_config_sees_the_stand_ins(tmp_path, monkeypatch):
    """A Detectron2 that is imported already stays, and the config does not use it."""
    real = types.ModuleType("detectron2")
    monkeypatch.setitem(sys.modules, "detectron2", real)
    finders, modules = list(sys.meta_path), set(sys.modules)
    cfg = load(write(tmp_path, mine="from detectron2 import model_zoo\n" + HEADER))
    assert complete(cfg) == complete(load("mimdet_b_mask_rcnn"))
    assert sys.modules["detectron2"] is real
    assert sys.meta_path == finders
    assert not {name for name in set(sys.modules) - modules if name.startswith(("detectron2", "fvcore", "models"))}


@pytest.mark.parametrize(
    "line",
    [
        "import detectron2.data.transforms as T",
        "from detectron2.data import transforms as T",
        "from detectron2 import data; T = data.transforms",
        "import detectron2; T = detectron2.data.transforms",
        "import detectron2.data.transforms; T = detectron2.data.transforms",
        "def f():\n    from detectron2.data import transforms\n    return transforms\nT = f()",
    ],
)
@pytest.mark.parametrize("flip", ["L(T.RandomFlip)(horizontal=True)", "T.RandomFlip(1.0)", "L('RandomFlip')()"])
def test_every_way_to_import(tmp_path, line, flip):
    flip = flip.replace("'RandomFlip'", "'detectron2.data.transforms.transform.RandomFlip'")
    text = f"{HEADER}\n{line}\ndataloader.train.mapper.augmentations = [{flip}]"
    (augmentation,) = instantiate(load(write(tmp_path, mine=text)).dataloader.train.mapper).augmentations.augs
    assert (augmentation.prob, augmentation.axis) == (1.0 if "1.0" in flip else 0.5, 0)
    assert type(augmentation).__module__ == "mimdet.data.transforms"


def test_every_import_of_a_config_file_runs_it_anew(tmp_path):
    """As in Detectron2: what one file changes, another does not see. Dicts become configs."""
    cfg = load(
        write(
            tmp_path,
            part="import detectron2\ntrain = dict(max_iter=1, amp=dict(enabled=True))",
            first="from .part import train\ntrain.max_iter = 5\nfirst = dict(n=train.max_iter)",
            mine="from .first import first\nfrom .part import train\ntrain.amp.enabled = train.max_iter == 1",
        )
    )
    assert cfg.first.n == 5
    assert cfg.train.max_iter == 1
    assert cfg.train.amp.enabled


def test_lazy_config_load_and_load_rel(tmp_path):
    (tmp_path / "sub").mkdir()
    write(
        tmp_path / "sub", other="import detectron2\ntrain = dict(max_iter=7)\nextra = dict(a=1)\n_private = dict(b=2)"
    )
    text = """
    from detectron2.config import LazyConfig
    from mimdet.config import find_config
    train, extra = LazyConfig.load_rel("sub/other.py", ("train", "extra"))
    all = LazyConfig.load("%s")
    model, mae_checkpoint = LazyConfig.load(
        str(find_config("detectron2/mimdet_b_mask_rcnn")), ("model", "mae_checkpoint")
    )
    """
    cfg = load(write(tmp_path, mine=text % (tmp_path / "sub" / "other.py")))
    assert (cfg.train.max_iter, cfg.extra.a) == (7, 1)
    assert set(cfg["all"]) == {"train", "extra"}
    assert complete(cfg)["model"] == complete(load("mimdet_b_mask_rcnn"))["model"]


def test_our_configs_for_detectron2_are_the_native_ones(tmp_path):
    assert complete(load("detectron2/ablations/table3_grid")) == complete(load("ablations/table3_grid"))


ZOO = """
from detectron2 import model_zoo
from mimdet.detectron2 import MIMDetBackbone
from mimdet.config import load
model = model_zoo.get_config("common/models/{name}.py").model
dataloader = model_zoo.get_config("common/data/coco.py").dataloader
optimizer = model_zoo.get_config("common/optim.py").{optimizer}
train = model_zoo.get_config("common/train.py").train
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_3x
model.backbone.bottom_up = load("mimdet_b_mask_rcnn").model.backbone.bottom_up
model.backbone.bottom_up._target_ = MIMDetBackbone
model.backbone.bottom_up.encoder.pretrained = None
model.backbone.in_features = {features}
"""


@pytest.mark.parametrize(
    ("name", "native", "features", "more", "same"),
    [
        ("mask_rcnn_fpn", "mimdet_b_mask_rcnn", ["c2", "c3", "c4", "c5"], "", {"proposal_matcher", "box_pooler"}),
        ("cascade_rcnn", "mimdet_b_cascade_mask_rcnn", ["c2", "c3", "c4", "c5"], "", {"box_predictors", "mask_pooler"}),
        (
            "retinanet",
            "mimdet_b_retinanet",
            ["c3", "c4", "c5"],
            "model.backbone.top_block.update(in_channels=512, in_feature='c5')",
            {"anchor_matcher"},
        ),
    ],
)
def test_common_detectors_with_our_backbone(tmp_path, name, native, features, more, same):
    file = write(tmp_path, mine=ZOO.format(name=name, optimizer="SGD", features=features) + more)
    cfg, shipped = load(file), load(native)
    theirs, ours = (complete(c)["model"] for c in (cfg, shipped))
    assert theirs["_target_"] == ours["_target_"]
    heads = [node.get("roi_heads", node) for node in (theirs, ours)]
    assert all(heads[0][key] == heads[1][key] for key in same)
    with torch.device("meta"):
        model = instantiate(cfg.model)
    cfg.optimizer.params.model = model
    assert {g["weight_decay"] for g in instantiate(cfg.optimizer).param_groups} == {0.0, 1e-4}
    assert cfg.dataloader.test.dataset.use_masks == (name != "retinanet")
    assert instantiate(cfg.dataloader.train.mapper).image_format == "BGR"
    schedule = instantiate(cfg.lr_multiplier)
    assert [round(schedule(n / 27), 3) for n in (0, 12, 21, 22, 25, 26)] == [0.001, 1, 0.1, 0.1, 0.01, 0.01]
    assert cfg.lr_multiplier.scheduler.num_updates == 270_000


def test_the_config_of_the_documentation(tmp_path):
    page = (ROOT / "docs" / "detectron2.md").read_text(encoding="utf-8")
    cfg = load(write(tmp_path, mine=page.split("# mine.py\n")[1].split("```")[0]))
    with torch.device("meta"):
        model = instantiate(cfg.model)
    assert model.backbone.bottom_up.output_shape().keys() == {"s0", "s1", "s2", "s3"}
    assert set(cfg) == {"dataloader", "lr_multiplier", "model", "optimizer", "train"}


def test_model_zoo_names_what_it_has_without_detectron2(tmp_path):
    file = write(
        tmp_path,
        mine="from detectron2.model_zoo import get_config\nmodel = get_config('COCO-Detection/fcos.py').model",
    )
    with pytest.raises(ImportError, match=r"mine\.py, line 2: model_zoo\.get_config\('COCO-.*copy that file beside"):
        load(file)


def test_model_zoo_reads_the_files_of_an_installed_detectron2(tmp_path, monkeypatch):
    """Without importing it."""
    package = tmp_path / "site" / "detectron2"
    (package / "model_zoo" / "configs" / "common").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model_zoo" / "configs" / "common" / "mine.py").write_text("import detectron2\ntrain = dict(max_iter=3)")
    monkeypatch.syspath_prepend(tmp_path / "site")
    file = write(
        tmp_path, mine="from detectron2.model_zoo import get_config\ntrain = get_config('common/mine.py').train"
    )
    assert load(file).train.max_iter == 3


def test_everything_without_a_counterpart_is_in_one_error(tmp_path):
    text = f"""
from functools import partial
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.evaluation.lvis_evaluation import LVISEvaluator
from detectron2.modeling import SwinTransformer, Novelty
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.solver.build import get_default_optimizer_params
{HEADER}
model.backbone.bottom_up = L(SwinTransformer)(depths=[2, 2], norm=L(Novelty)())
model.backbone.norm = "LN"
model.backbone.fuse_type = "sum"
model.backbone.square_pad = 1024
model.proposal_generator = L(Novelty)(head=1)
model.roi_heads.mask_head.conv_norm = lambda c: torch.nn.GroupNorm(16, c)
model.roi_heads.box_predictor = L(FastRCNNOutputLayers)(
    input_shape=None, box2box_transform=None, use_fed_loss=True, use_sigmoid_ce=False, loss_weight=1.0
)
optimizer.params = L(get_default_optimizer_params)(
    lr_factor_func=partial(get_vit_lr_decay_rate, num_layers=12), base_lr=1e-5
)
dataloader.train.sampler = L(RepeatFactorTrainingSampler)()
dataloader.evaluator = L(LVISEvaluator)(dataset_name="coco_2017_val")
train.model_ema = dict(enabled=True)
"""
    lines = problems(write(tmp_path, mine=text))
    assert set(lines) == {
        "model.backbone.bottom_up",
        "model.backbone.norm",
        "model.backbone.square_pad",
        "model.proposal_generator",
        "model.roi_heads.mask_head.conv_norm",
        "model.roi_heads.box_predictor.num_classes",
        "model.roi_heads.box_predictor.use_fed_loss",
        "optimizer.params.lr_factor_func",
        "optimizer.params.base_lr",
        "dataloader.train.sampler",
        "dataloader.evaluator",
        "train.model_ema.enabled",
    }
    swin = lines["model.backbone.bottom_up"]
    assert swin.startswith("detectron2.modeling.SwinTransformer (nearest: mimdet.modeling.MIMDetBackbone or")
    assert lines["model.backbone.norm"].startswith("'LN' (nearest: GN; norms: BN")
    assert "FPN has no such argument" in lines["model.backbone.square_pad"]
    assert lines["model.proposal_generator"] == "detectron2.modeling.Novelty"
    assert (
        "missing (mimdet.detection.FastRCNNOutputLayers needs it)" in lines["model.roi_heads.box_predictor.num_classes"]
    )
    assert "get_vit_lr_decay_rate" in lines["optimizer.params.lr_factor_func"]
    assert "nearest: mimdet.evaluation.COCOEvaluator" in lines["dataloader.evaluator"]


def test_the_nearest_name_is_suggested():
    assert nearest("detectron2.modeling.poolers.ROIPoler") == "mimdet.detection.ROIPooler"
    assert nearest("detectron2.zzz") == ""


@pytest.mark.parametrize(
    ("lines", "key", "what"),
    [
        ("model.backbone = 'build_resnet_fpn_backbone'", "model.backbone", "a registry's name is not enough"),
        ("model._target_ = 'GeneralizedRCNN'", "model", "a registry's name is not enough"),
        ("class Mine(T.Augmentation): pass\nA.append(L(Mine)())", "A.3", "augmentation(image, targets, rng)"),
        ("A.append(L(T.RandomContrast)(a=1))", "A.3", "augmentation(image, targets, rng)"),
        ("A.append(T.RandomContrast(0.5, 1))", "A.3", "augmentation(image, targets, rng)"),
        ("import needs_it\nA.append(L(needs_it.Mine)())", "A.3", "augmentation(image, targets, rng)"),
        ("from needs_it import Mine\nA.append(L(Mine)())", "A.3", "needs_it.Mine (a native augmentation is"),
        ("from needs_it import Mine\nmodel = L(Mine)()", "model", "needs_it.Mine (a native class has another"),
        ("from needs_it import m\ndataloader.train.mapper = L(m)()", "dataloader.train.mapper", "mapper(record, rng)"),
        ("class Mine(T.Augmentation): pass\nmodel = L(Mine)()", "model", "Mine (a native class has another interface"),
        ("optimizer.params.model = lambda: 1", "optimizer.params.model", "an importable module"),
        (
            "def get_fpn_model_parameters(model, layers): pass\noptimizer.params = L(get_fpn_model_parameters)()",
            "optimizer.params",
            "get_fpn_model_parameters (nearest",
        ),
        (
            "dataloader.evaluator = L('detectron2.evaluation.COCOEvaluator')(dataset_name='other')",
            "dataloader.evaluator.dataset_name",
            "'other' (the evaluator tests on dataloader.test.dataset, 'coco_2017_val')",
        ),
        (
            "dataloader.train.dataset = L('detectron2.data.get_detection_dataset_dicts')(names=['a', 'b'])",
            "dataloader.train.dataset.names",
            "merge the annotation files",
        ),
        ("from needs_it import make\nmodel = make()", "model", "needs_it.make() (a native class"),
        ("dataloader.evaluator = [dataloader.evaluator] * 2", "dataloader.evaluator", "2 evaluators (a test has one"),
        ("model.detectron2 = L('detectron2.projects.x.RPN')()", "model.detectron2", "detectron2.projects.x.RPN"),
    ],
)  # fmt: skip
def test_what_has_no_counterpart(tmp_path, monkeypatch, lines, key, what):
    write(tmp_path, needs_it="from detectron2.data.transforms import Augmentation\nclass Mine(Augmentation): pass")
    monkeypatch.syspath_prepend(tmp_path)
    text = f"{HEADER}\nA = dataloader.train.mapper.augmentations\n{lines}\ndel A"
    lines_by_key = problems(write(tmp_path, mine=text))
    key = key.replace("A.", "dataloader.train.mapper.augmentations.")
    assert list(lines_by_key) == [key]
    assert what in lines_by_key[key]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "_BASE_: b.yaml\nMODEL: {MASK_ON: true}", r"a\.yaml is of Detectron2's YAML configs.*LazyConfig"),
        ("a.py", "from detectron2.config import get_cfg\ncfg = get_cfg()", r"line 1: .*get_cfg is of .*YAML"),
        (
            "a.py",
            "from detectron2.data import MetadataCatalog\nn = len(MetadataCatalog.get('x').thing_classes)",
            r"a\.py, line 2: TypeError: detectron2\.data\.MetadataCatalog\.get\(\)\.thing_classes has no value",
        ),
        ("a.py", "import detectron2\nfrom .b import x", r"a\.py, line 2: cannot import \.b: a relative import takes"),
        ("a.py", "import detectron2\nfrom . import x", r"a\.py, line 2: cannot import"),
        ("a.py", "from detectron2.config import *\n", r"a\.py, line 1: from detectron2\.config import \*: name what"),
        ("a.py", "import detectron2\n1 / 0", r"a\.py, line 2: ZeroDivisionError"),
        ("a.py", "import detectron2\nfrom .c import y", r"a\.py, line 2: cannot import name 'y'"),
    ],
)
def test_files_that_do_not_load(tmp_path, name, text, message):
    write(tmp_path, c="import detectron2\nx = dict()")
    (tmp_path / name).write_text(text)
    with pytest.raises((ValueError, ImportError), match=message):
        load(tmp_path / name)


def test_every_counterpart_in_a_saved_config(tmp_path):
    """A native config with Detectron2's names, as Detectron2's LazyConfig saves it, is that native config again."""

    def theirs(node):
        if isinstance(node, list):
            return [theirs(item) for item in node]
        if not isinstance(node, dict):
            return node
        known = BY_NATIVE.get(str(node.get("_target_")).rpartition(".")[2])
        dropped = known.native_only if known else ()
        node = {key: theirs(value) for key, value in node.items() if key not in dropped}
        return node | ({"_target_": known.theirs} if known and known.theirs else {})

    native = load("mimdet_b_cascade_mask_rcnn")
    file = tmp_path / "saved.yaml"
    file.write_text(to_yaml(OmegaConf.create(theirs(complete(native)))))
    assert "detectron2.modeling" in file.read_text()
    assert complete(load(file)) == complete(native)


@pytest.mark.parametrize("entry", COUNTERPARTS, ids=lambda entry: entry.name)
def test_the_table_names_arguments_that_exist(entry):
    import inspect

    arguments = set(inspect.signature(resolve_target(entry.native)).parameters)
    assert set(entry.native_only) <= arguments
    assert not (set(entry.neutral) | set(entry.unused)) & arguments
    assert entry.rest or set(entry.defaults) <= arguments


def test_registered_datasets(tmp_path):
    text = """
    from detectron2.data.datasets import register_coco_instances
    from detectron2.data import DatasetCatalog, build_detection_test_loader, get_detection_dataset_dicts as dicts
    from detectron2.config import LazyCall as L
    register_coco_instances("cells", {}, "cells.json", "cells")
    DatasetCatalog.register("other", lambda: [])
    dataloader = dict(
        train=dict(dataset=L(dicts)(names="cells", filter_empty=False)), test=dict(dataset=L(dicts)(names=["other"]))
    )
    """
    cfg = load(write(tmp_path, mine=text))
    assert complete(cfg)["dataloader"]["train"]["dataset"] == {
        "_target_": "mimdet.data.CocoDataset",
        "names": "cells",
        "json_file": "cells.json",
        "image_root": "cells",
        "filter_empty": False,
        "use_masks": True,
    }
    with pytest.raises(DataError, match=r"unknown dataset 'other'.*mimdet\.data\.register.*--train-json"):
        CocoDataset(cfg.dataloader.test.dataset.names)
    cfg = load(tmp_path / "mine.py", ["dataloader.test.dataset.names=null", "dataloader.test.dataset.json_file=a.json"])
    assert cfg.dataloader.test.dataset.json_file == "a.json"


def test_references_to_what_is_left_out(tmp_path):
    """They become the values that they had."""
    text = f"""{HEADER}
model.input_format = "BGR"
dataloader.train.mapper.image_format = "${{model.input_format}}"
model.vis_period = "${{train.no_such_key}}"
train.max_iter = "${{lr_multiplier.scheduler.num_updates}}"
"""
    cfg = load(write(tmp_path, mine=text))
    assert cfg.dataloader.test.mapper.image_format == "BGR"
    assert OmegaConf.is_interpolation(cfg.train, "max_iter")
    assert "input_format" not in cfg.model


def test_one_evaluator_in_a_list(tmp_path):
    text = f"{HEADER}\ndataloader.evaluator = [L('detectron2.evaluation.COCOEvaluator')(dataset_name='coco_2017_val')]"
    cfg = load(write(tmp_path, mine=text))
    assert type(instantiate(cfg.dataloader.evaluator)).__module__ == "mimdet.evaluation.coco_evaluator"


def test_calls_that_do_nothing_are_said(tmp_path, caplog):
    text = "from detectron2.data import DatasetCatalog\nDatasetCatalog.register('x', None)\ntrain = dict(wandb=1, init_checkpoint='https://a/b.pth')"
    load(write(tmp_path, mine=text))
    lines = [record.getMessage() for record in caplog.records]
    assert any(re.search(r"DatasetCatalog\.register\(\) in .*mine\.py, line 2 is not called", line) for line in lines)
    assert any("no part of the training reads train.wandb" in line for line in lines)
    assert any("train.init_checkpoint: download https://a/b.pth" in line for line in lines)


def test_modules_that_need_detectron2_are_said(tmp_path, monkeypatch, caplog):
    """Their import may be all that a config does with them: to register datasets."""
    write(tmp_path, needs_it="import fvcore.common\n")
    monkeypatch.syspath_prepend(tmp_path)
    load(write(tmp_path, mine="import detectron2\nimport needs_it\nimport needs_it\ntrain = dict(max_iter=1)"))
    assert [record.getMessage() for record in caplog.records] == [
        "config mine.py: module needs_it is not run: it imports Detectron2"
    ]


@pytest.mark.parametrize(
    ("arguments", "milestones", "updates"),
    [
        ("milestones=[60, 80, 90]", [60, 80], 90),
        ("num_updates=90", [30, 60], 90),
        ("milestones=[60, 80], num_updates=90", [60, 80], 90),
    ],
)
def test_milestones(tmp_path, arguments, milestones, updates):
    text = f"""
    from fvcore.common.param_scheduler import MultiStepParamScheduler
    from detectron2.config import LazyCall as L
    lr_multiplier = L(MultiStepParamScheduler)(values=[1.0, 0.1, 0.01], {arguments})
    """
    schedule = instantiate(load(write(tmp_path, mine=text)).lr_multiplier)
    assert (schedule.milestones, schedule.num_updates) == (milestones, updates)


def test_objects_that_are_built_at_once(tmp_path):
    """In place of ``LazyCall``, anywhere, with arguments by position."""
    text = f"""
from detectron2.data import DatasetMapper
from detectron2.evaluation import COCOEvaluator
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler
{HEADER}
lr_multiplier = WarmupParamScheduler(MultiStepParamScheduler([1.0, 0.1, 0.01], 9, [6, 8]), 0.5, 0.1)
dataloader.train.mapper = DatasetMapper(True, augmentations=[T.RandomFlip(0.3)], image_format="RGB")
dataloader.evaluator = COCOEvaluator("coco_2017_val")
"""
    cfg = load(write(tmp_path, mine=text))
    schedule = instantiate(cfg.lr_multiplier)
    assert (schedule.scheduler.milestones, schedule.scheduler.num_updates, schedule.warmup_factor) == ([6, 8], 9, 0.5)
    mapper = instantiate(cfg.dataloader.train.mapper)
    assert (mapper.use_instance_mask, mapper.augmentations.augs[0].prob) == (False, 0.3)
    assert set(cfg.dataloader.evaluator) == {"_target_", "output_dir"}
    lines = problems(
        write(tmp_path, mine=f"{HEADER}\ndataloader.train.mapper.augmentations = [T.RandomFlip(0.3, True)]")
    )
    assert "has no such argument" in lines["dataloader.train.mapper.augmentations.0.argument 2"]


def test_optimizer_parameters(tmp_path):
    """The rate and decay that the optimizer has anyway, and the decay of biases as Detectron2 writes it."""
    text = """
    import torch
    from detectron2 import model_zoo
    optimizer = model_zoo.get_config("common/optim.py").AdamW
    optimizer.params.update(weight_decay=0.1, weight_decay_bias=0.0, bias_lr_factor=1.0, overrides=dict(q=dict(lr=1)))
    """
    params = load(write(tmp_path, mine=text)).optimizer.params
    assert dict(params) == {
        "_target_": "mimdet.engine.get_default_optimizer_params",
        "weight_decay_norm": 0.0,
        "overrides": {"q": {"lr": 1}, "bias": {"weight_decay": 0.0}},
    }


def test_a_users_models_package_stays(tmp_path, monkeypatch):
    """Configs for it are native; a folder of weights that is called models is no package."""
    monkeypatch.delitem(sys.modules, "models")
    (tmp_path / "models").mkdir()
    original = write(tmp_path, a="from models import MIMDetBackbone")
    monkeypatch.syspath_prepend(tmp_path)
    assert imports_detectron2(original)
    (tmp_path / "models" / "__init__.py").write_text("from torch.nn import Linear as MIMDetBackbone, Linear as Net")
    for name in ("Net", "MIMDetBackbone"):
        file = write(
            tmp_path,
            mine=f"from models import {name} as N\nfrom mimdet.config import LazyCall as L\nmodel = L(N)(bias=1)",
        )
        assert not imports_detectron2(file)
        assert load(file).model._target_ is torch.nn.Linear
    file.write_text("import detectron2\n" + file.read_text())
    assert load(file).model._target_ is torch.nn.Linear
    sys.modules.pop("models")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_native_configs_are_not_detectron2s(path):
    assert not imports_detectron2(path)


def test_convert_config_in_the_originals_style(base, tmp_path):
    (line,) = convert_config(base, tmp_path / "ours.py")
    assert line.endswith(f"mimdet_b_mask_rcnn with 0 changed keys; loads to the same config as {base}")
    text = (tmp_path / "ours.py").read_text()
    assert text.splitlines()[2:] == [
        "from mimdet.config import load",
        "",
        '_base = load("mimdet_b_mask_rcnn")',
        "dataloader, lr_multiplier, mae_checkpoint, model, optimizer, train = (_base[key] for key in sorted(_base))",
    ]


def test_convert_config_writes_what_differs(tmp_path):
    text = f"""{HEADER}
from functools import partial
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
dataloader.train.mapper.augmentations = [L(T.RandomFlip)(horizontal=True), T.ResizeScale(0.5, 2.0, 64, 32)]
model.roi_heads.num_classes = 3
model.roi_heads.box_predictor.test_score_thresh = 0.1
model.roi_heads.box_predictor.test_nms_thresh = 0.6
model.backbone.out_channels = 128
model.backbone.bottom_up.encoder.norm_layer = partial(torch.nn.LayerNorm, eps=1e-4)
optimizer.params.skip_list = ("pos_embed",)
optimizer.betas = (0.9, 0.95)
train.pop("clip_grad_norm")
train.notes = {{"a": 1, "b c": None}}
del mae_checkpoint.path
model.backbone.bottom_up.encoder.pretrained = "it's \\"there\\""
"""
    source, target = write(tmp_path, mine=text), tmp_path / "ours.py"
    convert_config(source, target)
    text = target.read_text()
    assert complete(load(target)) == complete(load(source))
    assert "model.roi_heads.box_predictor.update(test_score_thresh=0.1, test_nms_thresh=0.6)" in text
    assert "model.backbone.out_channels = 128" in text
    assert "in_channels" not in text  # it refers to the line above
    assert "partial(LayerNorm, eps=0.0001)" in text
    assert max(map(len, text.splitlines())) <= 120
    assert len(text.splitlines()) < 40
    assert not imports_detectron2(target)
    compile(text, str(target), "exec")


def test_convert_config_of_a_shipped_config(tmp_path):
    """The nearest detector and what an ablation changes."""
    convert_config("ablations/table3_grid", tmp_path / "ours.py")
    assert (tmp_path / "ours.py").read_text().splitlines()[7:] == [
        'model.backbone.bottom_up.sampling = "grid"',
        'model.backbone.bottom_up.decoder.fill = "mask_token"',
        'train.output_dir = "output/ablations/table3_grid"',
    ]


def test_convert_config_keeps_files(base, tmp_path):
    target = tmp_path / "ours.py"
    target.write_text("mine = 1")
    with pytest.raises(FileExistsError, match=r"ours\.py exists: .*--force"):
        convert_config(base, target)
    assert target.read_text() == "mine = 1"
    bad = write(tmp_path, bad=f"{HEADER}\nmodel.backbone.norm = 'LN'")
    with pytest.raises(ValueError, match="'LN'"):
        convert_config(bad, target, force=True)
    assert target.read_text() == "mine = 1"
    convert_config(base, target, force=True)
    assert "_base" in target.read_text()
    for wrong, error in ((tmp_path / "ours.yaml", ValueError), (tmp_path / "none" / "ours.py", FileNotFoundError)):
        with pytest.raises(error):
            convert_config(base, wrong)
    names = [path.name for path in tmp_path.glob("*") if path.suffix]
    assert sorted(names) == ["bad.py", "base.py", "coco.py", "common.py", "ours.py"]


def test_the_command(base, tmp_path, monkeypatch, capsys, caplog):
    with caplog.at_level(logging.ERROR):
        assert run(monkeypatch, "convert-config", base, tmp_path / "ours.py") == 0
        assert run(monkeypatch, "convert-config", base, tmp_path / "ours.py") == 1
        captured = capsys.readouterr()
        assert "exists" in captured.err
        assert run(monkeypatch, "check-data", "--config-file", base) == 1
    assert "annotation file not found: datasets/coco/annotations/instances_train2017.json" in capsys.readouterr().out
