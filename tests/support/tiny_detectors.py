"""Detectors of every kind with few, narrow layers."""

import torch
from support.fill_weights import fill_module
from support.small_mimdet import SMALL

from mimdet.config import instantiate, load

TINY = [
    *SMALL,
    "model.backbone.bottom_up.encoder.embed_dim=64",
    "model.backbone.bottom_up.encoder.num_heads=2",
    "model.backbone.bottom_up.encoder.depth=1",
    "model.backbone.bottom_up.decoder.decoder_embed_dim=64",
    "model.backbone.bottom_up.decoder.num_heads=2",
    "model.backbone.bottom_up.decoder.depth=1",
    "model.backbone.bottom_up._out_feature_channels=[16,32,64,64]",
    "model.backbone.out_channels=64",
]
TWO_STAGES = [
    "model.proposal_generator.pre_nms_topk=[200,100]",
    "model.proposal_generator.post_nms_topk=[100,50]",
    "model.roi_heads.num_classes=4",
    "model.roi_heads.mask_head.conv_dims=[32,32]",
]
HEAD = ("conv_dims=[32]", "fc_dims=[64]")
DETECTORS = {
    "mask_rcnn": [*TWO_STAGES, *(f"model.roi_heads.box_head.{h}" for h in HEAD)],
    "cascade_mask_rcnn": [*TWO_STAGES, *(f"model.roi_heads.box_heads.{i}.{h}" for i in range(3) for h in HEAD)],
    "retinanet": [
        "model.head.conv_dims=[64,64]",
        "model.num_classes=4",
        "model.test_topk_candidates=100",
        "model.test_score_thresh=0.005",
    ],
}


def detector(name, *overrides):
    model = instantiate(load(f"configs/mimdet_b_{name}.py", [*TINY, *DETECTORS[name], *overrides]).model)
    fill_module(model)
    return model.to(memory_format=torch.channels_last)
