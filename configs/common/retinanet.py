"""RetinaNet over FPN's p3 to p7; ``model.backbone.bottom_up`` is left to each config."""

from mimdet.config import LazyCall as L
from mimdet.detection import (
    FPN,
    Box2BoxTransform,
    DefaultAnchorGenerator,
    InferencePasses,
    LastLevelP6P7,
    Matcher,
    RetinaNet,
    RetinaNetHead,
)
from mimdet.modeling import ShapeSpec

model = L(RetinaNet)(
    backbone=L(FPN)(
        bottom_up=None,
        in_features=["c3", "c4", "c5"],
        out_channels=256,
        norm="SyncBN",
        top_block=L(LastLevelP6P7)(
            in_channels="${..bottom_up._out_feature_channels[3]}", out_channels="${..out_channels}", in_feature="c5"
        ),
    ),
    head=L(RetinaNetHead)(
        input_shape=[L(ShapeSpec)(channels="${....backbone.out_channels}") for _ in range(5)],
        num_classes="${..num_classes}",
        conv_dims=[256, 256, 256, 256],
        prior_prob=0.01,
        num_anchors=9,
    ),
    anchor_generator=L(DefaultAnchorGenerator)(
        sizes=[[x, x * 2 ** (1 / 3), x * 2 ** (2 / 3)] for x in (32, 64, 128, 256, 512)],
        aspect_ratios=[0.5, 1.0, 2.0],
        strides=[8, 16, 32, 64, 128],
        offset=0.0,
    ),
    box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
    anchor_matcher=L(Matcher)(thresholds=[0.4, 0.5], labels=[0, -1, 1], allow_low_quality_matches=True),
    num_classes=80,
    head_in_features=["p3", "p4", "p5", "p6", "p7"],
    focal_loss_alpha=0.25,
    focal_loss_gamma=2.0,
    test_score_thresh=0.05,
    pixel_mean=[123.675, 116.28, 103.53],
    pixel_std=[58.395, 57.12, 57.375],
    input_format="RGB",
    inference=L(InferencePasses)(passes=1, ratio=None),
)
