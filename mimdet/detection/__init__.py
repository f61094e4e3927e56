"""The detectors, with the names, arguments and keys of their Detectron2 counterparts."""

from .anchors import DefaultAnchorGenerator
from .assignment import Box2BoxTransform, Matcher
from .box_head import FastRCNNConvFCHead, FastRCNNOutputLayers
from .cascade import CascadeROIHeads
from .detector import Detector
from .fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from .layers import NaiveSyncBatchNorm
from .mask_head import MaskRCNNConvUpsampleHead
from .passes import InferencePasses
from .pooler import ROIPooler
from .rcnn import GeneralizedRCNN
from .retinanet import RetinaNet, RetinaNetHead
from .roi_heads import StandardROIHeads
from .rpn import RPN, StandardRPNHead

__all__ = [
    "FPN",
    "RPN",
    "Box2BoxTransform",
    "CascadeROIHeads",
    "DefaultAnchorGenerator",
    "Detector",
    "FastRCNNConvFCHead",
    "FastRCNNOutputLayers",
    "GeneralizedRCNN",
    "InferencePasses",
    "LastLevelMaxPool",
    "LastLevelP6P7",
    "MaskRCNNConvUpsampleHead",
    "Matcher",
    "NaiveSyncBatchNorm",
    "ROIPooler",
    "RetinaNet",
    "RetinaNetHead",
    "StandardROIHeads",
    "StandardRPNHead",
]
