"""Config files of Detectron2 and of the original MIMDet, loaded natively, against what Detectron2 loads."""

import inspect
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mimdet.config import load
from mimdet.config.counterparts import COUNTERPARTS
from mimdet.config.from_detectron2 import to_native
from mimdet.config.lazy import resolve_target
from mimdet.config.model_zoo import PARTS
from mimdet.config.write import complete

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import detectron2
from detectron2.config import LazyConfig
from detectron2.layers.batch_norm import NaiveSyncBatchNorm
from support import detectron2_testing as d2

CONFIGS = Path(detectron2.__file__).parents[1] / "configs"
VITDET = CONFIGS.parent / "projects" / "ViTDet" / "configs"
ORIGINALS = {
    "mimdet/mimdet_vit_base_mask_rcnn_fpn_sr_0p5_800_1333_4xdec_coco_3x": "mimdet_b_mask_rcnn",
    "mimdet/mimdet_vit_large_mask_rcnn_fpn_sr_0p5_800_1333_4xdec_coco_3x": "mimdet_l_mask_rcnn",
    "benchmarking/benchmarking_mask_rcnn_base_FPN_100ep_LSJ_mae": "benchmarking_b_100ep",
    "benchmarking/benchmarking_mask_rcnn_base_FPN_50ep_LSJ_mae": "benchmarking_b_50ep",
    "benchmarking/benchmarking_mask_rcnn_base_FPN_25ep_LSJ_mae": "benchmarking_b_25ep",
}
REST = """
from .common.optim import SGD as optimizer
from .common.train import train
from .common.coco_schedule import lr_multiplier_3x as lr_multiplier
from mimdet.config import load
model.backbone.bottom_up = load("mimdet_b_mask_rcnn").model.backbone.bottom_up
model.backbone.bottom_up.encoder.pretrained = None
model.backbone.in_features = {features}
"""


def differences(first, second, path=()):
    """Paths at which two trees differ."""
    if isinstance(first, dict) and isinstance(second, dict):
        for key in {**first, **second}:
            yield from differences(first.get(key, "missing"), second.get(key, "missing"), (*path, key))
    elif isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        for index, pair in enumerate(zip(first, second, strict=True)):
            yield from differences(*pair, (*path, index))
    elif first != second:
        yield ".".join(map(str, path))


def without_shapes(tree):
    """A tree whose ``ShapeSpec`` have no targets: Detectron2's are dataclasses, which omegaconf turns into sections."""
    if isinstance(tree, list):
        return [without_shapes(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    dropped = {"_target_"} if str(tree.get("_target_")).endswith(".ShapeSpec") else set()
    return {key: without_shapes(value) for key, value in tree.items() if key not in dropped}


def originals(name):
    return d2.folder("MIMDET_ORIGINAL") / "configs" / f"{name}.py"


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_originals_configs_are_the_shipped_ones(name):
    cfg, shipped = load(originals(name)), load(ORIGINALS[name])
    places = {"dataloader.evaluator.output_dir", "train.output_dir"}
    if name.startswith("benchmarking"):
        places |= {"model.backbone.bottom_up.pretrained", "mae_checkpoint.path", "mae_checkpoint"}
    assert set(differences(complete(cfg), complete(shipped))) <= places


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_originals_configs_as_detectron2_loads_them(name, caplog):
    """Detectron2 runs the files with its own classes: they have the same keys and values."""
    file = originals(name)
    native = load(file)
    d2.make_importable(d2.folder("MIMDET_ORIGINAL"))
    theirs = LazyConfig.load(str(file))
    for head in (theirs.model.roi_heads.box_head, theirs.model.roi_heads.mask_head):
        norm = head.conv_norm(8)
        assert isinstance(norm, NaiveSyncBatchNorm)
        assert norm._stats_mode == "N"
        head.conv_norm = "naiveSyncBN_N"
    assert without_shapes(complete(to_native(theirs, str(file)))) == without_shapes(complete(native))


@pytest.mark.parametrize("path", PARTS)
def test_the_model_zoos_parts_are_detectron2s(path):
    if not CONFIGS.is_dir():
        pytest.skip("this Detectron2 comes without its configs/")
    ours, theirs = PARTS[path](), LazyConfig.load(str(CONFIGS / path))
    for cfg in (ours, theirs):
        if "model" not in cfg:
            continue
        if "vitdet" in path:
            heads = cfg.model.roi_heads
            assert heads.box_head.conv_norm == heads.mask_head.conv_norm == "LN"  # there is no such norm
            heads.box_head.conv_norm = heads.mask_head.conv_norm = "GN"
            backbone = OmegaConf.to_container(cfg.model.backbone, resolve=True)
            assert set(backbone) == {
                *("_target_", "net", "in_feature", "out_channels", "scale_factors", "top_block", "norm", "square_pad")
            }
            cfg.model.backbone = None
            cfg.model.proposal_generator.head.in_channels = 256
            for head in (heads.box_head, heads.mask_head):
                head.input_shape.channels = 256
        else:
            cfg.model.backbone.bottom_up = {"out_features": list(cfg.model.backbone.in_features)}
    ours, theirs = (without_shapes(complete(to_native(cfg, path))) for cfg in (ours, theirs))
    assert set(differences(ours, theirs)) <= {"constants"}  # each file that imports them has them too


@pytest.mark.parametrize("name", ["mask_rcnn_fpn", "cascade_rcnn", "retinanet"])
def test_common_files_with_our_backbone(tmp_path, name):
    """Every argument that both classes have is the same, defaults of Detectron2's classes too."""
    features = ["c3", "c4", "c5"] if name == "retinanet" else ["c2", "c3", "c4", "c5"]
    file = d2.beside_common(tmp_path, name, REST.format(features=features))
    native, theirs = complete(load(file)), OmegaConf.to_container(LazyConfig.load(file), resolve=True)
    compared = [*compare(theirs, native, "")]
    assert len(compared) > 60
    assert {place for place, same in compared if not same} == {
        "dataloader.evaluator.output_dir",  # the run's folder
        "dataloader.test.mapper.use_instance_mask",  # only training reads it
        "lr_multiplier.scheduler.num_updates",  # the last milestone
        "model.input_format",  # Detectron2's images for drawing
        "train.device",
    }


def compare(theirs, native, path):
    """(path, whether the values are the same) of everything that both trees have."""
    if isinstance(theirs, dict) and "_target_" in theirs:
        theirs = {**defaults_of(theirs["_target_"]), **theirs}
    if isinstance(theirs, dict):
        for key in theirs:
            if key in native and key not in ("_target_", "milestones"):  # the last of them may be the length
                yield from compare(theirs[key], native[key], f"{path}.{key}".lstrip("."))
    elif isinstance(theirs, (list, tuple)):
        for index, pair in enumerate(zip(theirs, native, strict=True)):
            yield from compare(*pair, f"{path}.{index}")
    elif not callable(theirs):
        none = {"max_dets_per_image", "overrides", "max_size"}  # None, or a number without effect
        yield path, theirs == native or path.rpartition(".")[2] in none


def defaults_of(target):
    target = target.__init__ if inspect.isclass(target) else target
    parameters = inspect.signature(inspect.unwrap(target)).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


@pytest.mark.parametrize("entry", [e for e in COUNTERPARTS if e.theirs], ids=lambda entry: entry.name)
def test_the_table_names_what_detectron2_has(entry):
    theirs, ours = (resolve_target(name) for name in (entry.theirs, entry.native))
    arguments = set(parameters_of(theirs))
    assert (set(entry.neutral) | set(entry.unused)) <= arguments | {"vis_period", "loss_weight"}
    known = set(parameters_of(ours)) | set(entry.neutral) | set(entry.unused)
    known |= set(parameters_of(resolve_target(entry.rest))) if entry.rest else set()
    special = {"dataset_name", "args", "kwargs"}
    assert arguments - known <= special, arguments - known


@pytest.mark.parametrize("entry", COUNTERPARTS, ids=lambda entry: entry.name)
def test_positional_arguments_have_detectron2s_order(entry):
    names = {
        "GeneralizedRCNN": "detectron2.modeling.GeneralizedRCNN",
        "RetinaNet": "detectron2.modeling.meta_arch.retinanet.RetinaNet",
        "get_default_optimizer_params": "detectron2.solver.build.get_default_optimizer_params",
    }
    if (name := names.get(entry.name, entry.theirs)) is None:
        pytest.skip("it is ours in Detectron2 too")
    theirs = resolve_target(name)
    theirs = theirs.__init__ if inspect.isclass(theirs) else theirs
    parameters = inspect.signature(inspect.unwrap(theirs)).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]
    ours = entry.order or list(inspect.signature(resolve_target(entry.native)).parameters)
    assert list(ours)[: len(positional)] == positional or entry.name == "CascadeROIHeads"


def parameters_of(target):
    if not inspect.isclass(target):
        return inspect.signature(inspect.unwrap(target)).parameters
    classes = [
        c for c in target.__mro__ if "__init__" in vars(c) and c.__module__.split(".")[0] in ("detectron2", "mimdet")
    ]
    names = {}
    for each in classes or [target]:
        names |= inspect.signature(inspect.unwrap(each.__init__)).parameters
    return {name: p for name, p in names.items() if name != "self"}


def test_vitdets_own_config_names_what_is_missing():
    if not VITDET.is_dir():
        pytest.skip("this Detectron2 comes without its projects/")
    with pytest.raises(ValueError, match="these parts have no native counterpart") as caught:
        load(VITDET / "LVIS" / "cascade_mask_rcnn_vitdet_l_100ep.py")
    keys = {line.strip().split(":")[0] for line in str(caught.value).splitlines()[1:-1]}
    assert {
        "dataloader.train.sampler",
        "dataloader.evaluator",
        "model.backbone",
        "model.roi_heads.box_heads.2.conv_norm",
        "model.roi_heads.box_predictors.0.use_fed_loss",
        "optimizer.params.lr_factor_func",
    } <= keys
