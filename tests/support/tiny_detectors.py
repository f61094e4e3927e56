"""Detectors of every kind with few, narrow layers."""

import torch
from support.fill_weights import fill_module

from mimdet.config import instantiate, load
from mimdet.testing.small import SMALL, make_images, target

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


def targets_of(sizes, counts):
    """Ground truth of ``counts[i]`` objects, of the detectors' four classes, for each image."""
    every = [target(7 + i, size, count) for i, (size, count) in enumerate(zip(sizes, counts, strict=True))]
    return [each | {"labels": each["labels"] % 4} for each in every]


def samples(sizes, count):
    """A training batch, as from the loader, of images with ``count`` objects each."""
    pairs = zip(make_images(sizes), targets_of(sizes, [count] * len(sizes)), strict=True)
    return [{"image": image.byte(), "image_id": i, "targets": truth} for i, (image, truth) in enumerate(pairs)]
