"""Detectron2's matcher, image by image, with torchvision's operations."""

import torch
from torchvision.ops import box_iou


def match(matcher, boxes, candidates, outside=None):
    """Detectron2's matcher on a matrix of overlaps: index and label of each candidate."""
    if not len(boxes):
        return torch.zeros(len(candidates), dtype=torch.int64), torch.full((len(candidates),), matcher.labels[0])
    iou = box_iou(boxes, candidates).nan_to_num(0.0)
    if outside is not None:
        iou = iou.masked_fill(outside, -1.0)
    best, index = iou.max(dim=0)
    labels = torch.tensor(matcher.labels)[sum((best >= t).long() for t in matcher.thresholds)]
    if matcher.allow_low_quality_matches:
        labels[(iou == iou.max(dim=1, keepdim=True).values).any(dim=0)] = 1
    return index, labels
