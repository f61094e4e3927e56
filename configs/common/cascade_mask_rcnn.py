"""Cascade Mask R-CNN: the Mask R-CNN of ``mask_rcnn.py`` with three box heads, each for a higher IoU."""

from copy import deepcopy

from mimdet.config import LazyCall as L
from mimdet.detection import Box2BoxTransform, CascadeROIHeads, FastRCNNConvFCHead, FastRCNNOutputLayers, Matcher
from mimdet.modeling import ShapeSpec

from .mask_rcnn import model as _mask_rcnn


def use_cascade(model):
    """Replace the box head of a Mask R-CNN by three; other parts do not change."""
    for key in ("box_head", "box_predictor", "proposal_matcher"):
        model.roi_heads.pop(key)
    model.roi_heads.update(
        _target_=CascadeROIHeads,
        box_heads=[
            L(FastRCNNConvFCHead)(
                input_shape=L(ShapeSpec)(channels="${.....backbone.out_channels}", height=7, width=7),
                conv_dims=[256, 256, 256, 256],
                fc_dims=[1024],
                conv_norm="naiveSyncBN_N",
            )
            for _ in range(3)
        ],
        box_predictors=[
            L(FastRCNNOutputLayers)(
                input_shape=L(ShapeSpec)(channels=f"${{....box_heads[{stage}].fc_dims[0]}}"),
                test_score_thresh=0.05,
                box2box_transform=L(Box2BoxTransform)(weights=weights),
                cls_agnostic_bbox_reg=True,
                num_classes="${...num_classes}",
            )
            for stage, weights in enumerate([(10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)])
        ],
        proposal_matchers=[
            L(Matcher)(thresholds=[iou], labels=[0, 1], allow_low_quality_matches=False) for iou in (0.5, 0.6, 0.7)
        ],
    )


model = deepcopy(_mask_rcnn)  # deepcopy: other configs use the Mask R-CNN
use_cascade(model)
