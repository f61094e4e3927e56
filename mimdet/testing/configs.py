"""Tiny versions of the shipped detectors, with all parts and few channels: they train on a CPU in a second."""

from __future__ import annotations

from omegaconf import DictConfig

from ..config import load

_BACKBONE = [
    "model.backbone.bottom_up.encoder.embed_dim=48",
    "model.backbone.bottom_up.encoder.depth=2",
    "model.backbone.bottom_up.encoder.num_heads=2",
    "model.backbone.bottom_up.encoder.img_size=128",
    "model.backbone.bottom_up.decoder.decoder_embed_dim=32",
    "model.backbone.bottom_up.decoder.depth=1",
    "model.backbone.bottom_up.decoder.num_heads=2",
    "model.backbone.bottom_up._out_feature_channels=[12,24,32,32]",
    "model.backbone.out_channels=16",
]
_TWO_STAGES = [
    "model.proposal_generator.head.conv_dims=[-1]",
    "model.proposal_generator.pre_nms_topk=[60,40]",
    "model.proposal_generator.post_nms_topk=[40,20]",
    "model.roi_heads.batch_size_per_image=32",
    "model.roi_heads.mask_head.conv_dims=[16,16]",
]
_BOX_HEAD = ["conv_dims=[16]", "fc_dims=[32]"]
_DETECTORS = {
    "_cascade_mask_rcnn": _TWO_STAGES
    + [f"model.roi_heads.box_heads.{stage}.{change}" for stage in range(3) for change in _BOX_HEAD],
    "_mask_rcnn": _TWO_STAGES + [f"model.roi_heads.box_head.{change}" for change in _BOX_HEAD],
    "_retinanet": ["model.head.conv_dims=[16]"],
}
# Without a decoder c4 is as wide as the encoder. A small image must have several windows.
_WINDOWS = [
    *(change for change in _BACKBONE if ".decoder." not in change and "_out_feature_channels" not in change),
    "model.backbone.bottom_up.encoder.window=3",
]
_BACKBONES = {
    "ablations/table8_window": [*_WINDOWS, "model.backbone.bottom_up._out_feature_channels=[12,24,48,48]"],
    "ablations/table8_window_vit_fpn": [
        *_WINDOWS,
        "model.backbone.bottom_up._out_feature_channels=[48,48,48,48]",
        "model.backbone.bottom_up.encoder.depth=3",
        "model.backbone.bottom_up.encoder.taps=[1,2]",
    ],
}


def tiny_overrides(name: str) -> list[str]:
    """The ``key=value`` overrides that make the shipped config ``name`` tiny."""
    ending = next((ending for ending in _DETECTORS if name.endswith(ending)), "_mask_rcnn")
    return [*_BACKBONES.get(name, _BACKBONE), *_DETECTORS[ending]]


def tiny_config(name: str, *overrides: str) -> DictConfig:
    """The shipped config ``name`` with a detector of a few thousand weights, and ``key=value`` overrides."""
    return load(name, [*tiny_overrides(name), *overrides])
