"""The shipped detectors shrunk until they train on a CPU in a second: every part is there, and few channels."""

from mimdet.config import load

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
TWINS = ("mimdet_b_cascade_mask_rcnn", "mimdet_l_cascade_mask_rcnn", "mimdet_b_retinanet")


def twin_overrides(name):
    """What makes the config ``name`` small."""
    return [*_BACKBONE, *next(changes for ending, changes in _DETECTORS.items() if name.endswith(ending))]


def twin_config(name, *overrides):
    """The config ``name`` of ``configs/`` with a detector of a few thousand weights."""
    return load(f"configs/{name}.py", [*twin_overrides(name), *overrides])
