"""The classes and functions of Detectron2, fvcore and the original MIMDet that have a native counterpart.

One table for both directions: :mod:`mimdet.detectron2` makes a native config Detectron2's by it, and
:mod:`mimdet.config.from_detectron2` a Detectron2 config native. It imports none of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_IN_DETECTRON2 = "mimdet.detectron2"  # our classes for Detectron2's trainer
_MODEL = "detectron2.modeling"
_HEADS = "detectron2.modeling.roi_heads"
_TRANSFORMS = "detectron2.data.transforms"
_SCHEDULERS = "fvcore.common.param_scheduler"


@dataclass(frozen=True)
class Counterpart:
    """A native callable and the one of Detectron2 that does the same.

    Attributes:
        native: dotted name of the native callable.
        theirs: dotted name of the other; None if Detectron2's trainer takes the native one.
        aliases: other class names that mean the same; a class is recognized by the last part of its dotted name, as
            Detectron2 exports a class from several modules.
        native_only: arguments that only the native callable has.
        neutral: arguments that only theirs has -> the values that change nothing.
        unused: arguments that only theirs has, and that change no result, whatever their value.
        defaults: their defaults that are not native ones.
        order: names of their positional arguments, where they are others than the native ones.
        rest: dotted name of the callable that takes the native callable's ``**kwargs``.
    """

    native: str
    theirs: str | None
    aliases: tuple[str, ...] = ()
    native_only: tuple[str, ...] = ()
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    rest: str | None = None

    @property
    def name(self) -> str:
        """The native class name."""
        return self.native.rpartition(".")[2]


_SMOOTH_L1 = {"box_reg_loss_type": ("smooth_l1",)}
_NO_KEYPOINTS = {
    "keypoint_in_features": (None,),
    "keypoint_pooler": (None,),
    "keypoint_head": (None,),
    "train_on_pred_boxes": (False,),
}
_BILINEAR = {"interp": (2,)}

COUNTERPARTS = (
    # model
    Counterpart("mimdet.detection.Box2BoxTransform", f"{_MODEL}.box_regression.Box2BoxTransform"),
    Counterpart(
        "mimdet.detection.CascadeROIHeads",
        f"{_HEADS}.CascadeROIHeads",
        neutral=_NO_KEYPOINTS,
        rest="mimdet.detection.StandardROIHeads",
    ),
    Counterpart("mimdet.detection.DefaultAnchorGenerator", f"{_MODEL}.anchor_generator.DefaultAnchorGenerator"),
    Counterpart(
        "mimdet.detection.FPN",
        f"{_MODEL}.FPN",
        neutral={"fuse_type": ("sum",), "square_pad": (0,)},
        order=("bottom_up", "in_features", "out_channels", "norm", "top_block", "fuse_type", "square_pad"),
    ),
    Counterpart("mimdet.detection.FastRCNNConvFCHead", f"{_HEADS}.FastRCNNConvFCHead"),
    Counterpart(
        "mimdet.detection.FastRCNNOutputLayers",
        f"{_HEADS}.FastRCNNOutputLayers",
        neutral={
            **_SMOOTH_L1,
            "loss_weight": (1.0,),
            "use_fed_loss": (False,),
            "use_sigmoid_ce": (False,),
            "get_fed_loss_cls_weights": (None,),
        },
        unused=("fed_loss_num_classes",),
    ),
    Counterpart(
        "mimdet.detection.GeneralizedRCNN",
        f"{_IN_DETECTRON2}.GeneralizedRCNNImageListForward",
        aliases=("GeneralizedRCNN",),
        native_only=("inference",),
        unused=("vis_period",),
    ),
    Counterpart("mimdet.detection.LastLevelMaxPool", f"{_MODEL}.backbone.fpn.LastLevelMaxPool"),
    Counterpart(
        "mimdet.detection.LastLevelP6P7", f"{_MODEL}.backbone.fpn.LastLevelP6P7", defaults={"in_feature": "res5"}
    ),
    Counterpart(
        "mimdet.detection.MaskRCNNConvUpsampleHead",
        f"{_HEADS}.MaskRCNNConvUpsampleHead",
        neutral={"loss_weight": (1.0,)},
        unused=("vis_period",),
    ),
    Counterpart("mimdet.detection.Matcher", f"{_MODEL}.matcher.Matcher"),
    Counterpart("mimdet.detection.ROIPooler", f"{_MODEL}.poolers.ROIPooler"),
    Counterpart(
        "mimdet.detection.RPN",
        f"{_MODEL}.proposal_generator.RPN",
        neutral={**_SMOOTH_L1, "anchor_boundary_thresh": (-1.0,)},
    ),
    Counterpart(
        "mimdet.detection.RetinaNet",
        f"{_IN_DETECTRON2}.RetinaNetImageListForward",
        aliases=("RetinaNet",),
        native_only=("inference",),
        neutral=_SMOOTH_L1,
        unused=("vis_period",),
    ),
    Counterpart("mimdet.detection.RetinaNetHead", f"{_MODEL}.meta_arch.retinanet.RetinaNetHead"),
    Counterpart("mimdet.detection.StandardROIHeads", f"{_HEADS}.StandardROIHeads", neutral=_NO_KEYPOINTS),
    Counterpart("mimdet.detection.StandardRPNHead", f"{_MODEL}.proposal_generator.StandardRPNHead"),
    Counterpart("mimdet.modeling.BenchmarkingViTDet", f"{_IN_DETECTRON2}.BenchmarkingViTDet"),
    Counterpart("mimdet.modeling.MIMDetBackbone", f"{_IN_DETECTRON2}.MIMDetBackbone"),
    Counterpart("mimdet.modeling.MIMDetDecoder", None),
    Counterpart("mimdet.modeling.MIMDetEncoder", None),
    Counterpart("mimdet.modeling.ShapeSpec", "detectron2.layers.ShapeSpec"),
    Counterpart("mimdet.modeling.UpsampledTokens", None),
    # data
    Counterpart("mimdet.data.AugmentationList", f"{_TRANSFORMS}.AugmentationList"),
    Counterpart(
        "mimdet.data.CocoDataset",
        "detectron2.data.get_detection_dataset_dicts",
        native_only=("json_file", "image_root", "use_masks"),
        neutral={"min_keypoints": (0,), "proposal_files": (None,)},
        unused=("check_consistency",),
        order=("names", "filter_empty", "min_keypoints", "proposal_files", "check_consistency"),
    ),
    Counterpart(
        "mimdet.data.DatasetMapper",
        "detectron2.data.DatasetMapper",
        neutral={
            "use_keypoint": (False,),
            "instance_mask_format": ("polygon",),
            "keypoint_hflip_indices": (None,),
            "precomputed_proposal_topk": (None,),
        },
    ),
    Counterpart(
        "mimdet.data.FixedSizeCrop",
        f"{_TRANSFORMS}.FixedSizeCrop",
        unused=("seg_pad_value",),
        order=("crop_size", "pad", "pad_value", "seg_pad_value"),
    ),
    Counterpart("mimdet.data.RandomApply", f"{_TRANSFORMS}.RandomApply"),
    Counterpart("mimdet.data.RandomCrop", f"{_TRANSFORMS}.RandomCrop"),
    Counterpart("mimdet.data.RandomFlip", f"{_TRANSFORMS}.RandomFlip", order=("prob",)),
    Counterpart(
        "mimdet.data.ResizeScale",
        f"{_TRANSFORMS}.ResizeScale",
        neutral=_BILINEAR,
        order=("min_scale", "max_scale", "target_height", "target_width", "interp"),
    ),
    Counterpart(
        "mimdet.data.ResizeShortestEdge",
        f"{_TRANSFORMS}.ResizeShortestEdge",
        neutral=_BILINEAR,
        order=("short_edge_length", "max_size", "sample_style", "interp"),
    ),
    Counterpart(
        "mimdet.data.build_detection_test_loader",
        "detectron2.data.build_detection_test_loader",
        native_only=("batch_size",),
        neutral={"sampler": (None,), "collate_fn": (None,)},
        defaults={"num_workers": 0},
    ),
    Counterpart(
        "mimdet.data.build_detection_train_loader",
        "detectron2.data.build_detection_train_loader",
        native_only=("seed",),
        neutral={"sampler": (None,), "collate_fn": (None,)},
        defaults={"num_workers": 0},
    ),
    Counterpart(
        "mimdet.evaluation.COCOEvaluator",
        "detectron2.evaluation.COCOEvaluator",
        neutral={"tasks": (None, ["bbox", "segm"], ["segm", "bbox"]), "kpt_oks_sigmas": ([],)},
        unused=("distributed", "use_fast_impl", "allow_cached_coco"),
        order=("dataset_name", "tasks", "distributed", "output_dir"),
    ),
    # optimizer and schedule
    Counterpart("mimdet.engine.CosineParamScheduler", f"{_SCHEDULERS}.CosineParamScheduler"),
    Counterpart(
        "mimdet.engine.MultiStepParamScheduler",
        f"{_SCHEDULERS}.MultiStepParamScheduler",
        order=("values", "num_updates", "milestones"),
    ),
    Counterpart(
        "mimdet.engine.WarmupParamScheduler",
        "detectron2.solver.WarmupParamScheduler",
        neutral={"warmup_method": ("linear",), "rescale_interval": (False,)},
        order=("scheduler", "warmup_factor", "warmup_length", "warmup_method", "rescale_interval"),
    ),
    Counterpart(
        "mimdet.engine.get_default_optimizer_params",
        None,
        neutral={"bias_lr_factor": (None, 1.0), "lr_factor_func": (None,)},
        order=(
            "model",
            "base_lr",
            "weight_decay",
            "weight_decay_norm",
            "bias_lr_factor",
            "weight_decay_bias",
            "lr_factor_func",
            "overrides",
        ),
    ),
    Counterpart("mimdet.engine.get_fpn_model_parameters", None),
)

BY_NATIVE = {entry.name: entry for entry in COUNTERPARTS}
_BY_THEIRS = {
    name: entry
    for entry in COUNTERPARTS
    for name in (entry.name, *entry.aliases, *([entry.theirs.rpartition(".")[2]] if entry.theirs else []))
    if name != "CocoDataset"
}

# What the original MIMDet's package `models` exports.
ORIGINAL = ("MIMDetBackbone", "MIMDetEncoder", "MIMDetDecoder", "BenchmarkingViTDet", "_postprocess")
# What the original's config files define themselves.
ORIGINAL_IN_CONFIGS = ("GeneralizedRCNNImageListForward", "get_fpn_model_parameters")

_BACKBONES = "mimdet.modeling.MIMDetBackbone or BenchmarkingViTDet as model.backbone.bottom_up"
_NEAREST = {
    **dict.fromkeys(("ResNet", "RegNet", "SwinTransformer", "MViT", "build_resnet_backbone"), _BACKBONES),
    "ViT": "mimdet.modeling.BenchmarkingViTDet, a ViT with windows, as model.backbone.bottom_up",
    "SimpleFeaturePyramid": "mimdet.detection.FPN over mimdet.modeling.BenchmarkingViTDet",
    "Res5ROIHeads": "mimdet.detection.StandardROIHeads over an FPN",
    "KRCNNConvDeconvUpsampleHead": "none: there are no keypoints",
    "PanopticFPN": "mimdet.detection.GeneralizedRCNN, without the semantic head",
    "SemSegFPNHead": "none: there is no semantic segmentation",
    "ProposalNetwork": "mimdet.detection.GeneralizedRCNN",
    "FCOS": "mimdet.detection.RetinaNet",
    "FCOSHead": "mimdet.detection.RetinaNetHead",
    "RRPN": "mimdet.detection.RPN, for boxes without rotation",
    "LVISEvaluator": "mimdet.evaluation.COCOEvaluator",
    "COCOPanopticEvaluator": "mimdet.evaluation.COCOEvaluator",
    "SemSegEvaluator": "mimdet.evaluation.COCOEvaluator",
    "DatasetEvaluators": "one mimdet.evaluation.COCOEvaluator",
    "RepeatFactorTrainingSampler": "the loader's sampler, which draws each image equally often",
    "get_vit_lr_decay_rate": "mimdet.engine.get_fpn_model_parameters, with one rate for the encoder",
    "LinearParamScheduler": "mimdet.engine.CosineParamScheduler",
    "PolynomialDecayParamScheduler": "mimdet.engine.CosineParamScheduler",
    "ConstantParamScheduler": "mimdet.engine.MultiStepParamScheduler(values=[1.0], milestones=[], num_updates=1)",
    "StepParamScheduler": "mimdet.engine.MultiStepParamScheduler",
    "StepWithFixedGammaParamScheduler": "mimdet.engine.MultiStepParamScheduler",
    "ExponentialParamScheduler": "mimdet.engine.MultiStepParamScheduler",
    "CompositeParamScheduler": "mimdet.engine.WarmupParamScheduler",
    "Resize": "mimdet.data.ResizeShortestEdge",
    "RandomResize": "mimdet.data.ResizeShortestEdge with several lengths",
    "Augmentation": "a class called as augmentation(image, targets, rng), see mimdet.data.DatasetMapper",
}


def counterpart(target: str) -> Counterpart | None:
    """The native counterpart of a dotted name in Detectron2, fvcore, the original or ``mimdet.detectron2``."""
    return None if target.startswith("detectron2.projects.") else _BY_THEIRS.get(target.rpartition(".")[2])


def nearest(target: str) -> str:
    """The native callable that is most like a dotted name without a counterpart; "" if none is like it."""
    name = target.rpartition(".")[2]
    if hint := next((_NEAREST[part] for part in reversed(target.split(".")) if part in _NEAREST), ""):
        return hint
    # A config file's function may have any name: only the same one is like it.
    near = difflib.get_close_matches(name, _BY_THEIRS, n=1, cutoff=0.5 if "." in target else 1.0)
    return _BY_THEIRS[near[0]].native if near else ""
