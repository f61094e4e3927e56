"""Mask R-CNN, with the names, arguments and keys of the Detectron2 classes it stands for."""

from .anchors import DefaultAnchorGenerator
from .box_head import FastRCNNConvFCHead, FastRCNNOutputLayers
from .boxes import Box2BoxTransform
from .fpn import FPN, LastLevelMaxPool
from .mask_head import MaskRCNNConvUpsampleHead
from .matcher import Matcher
from .norm import NaiveSyncBatchNorm
from .pooler import ROIPooler
from .rcnn import GeneralizedRCNN
from .roi_heads import StandardROIHeads
from .rpn import RPN, StandardRPNHead

__all__ = [
    "FPN",
    "RPN",
    "Box2BoxTransform",
    "DefaultAnchorGenerator",
    "FastRCNNConvFCHead",
    "FastRCNNOutputLayers",
    "GeneralizedRCNN",
    "LastLevelMaxPool",
    "MaskRCNNConvUpsampleHead",
    "Matcher",
    "NaiveSyncBatchNorm",
    "ROIPooler",
    "StandardROIHeads",
    "StandardRPNHead",
]
