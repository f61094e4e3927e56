"""Slots of a batch from what each image has."""

import torch
from torch.nn.utils.rnn import pad_sequence

from mimdet.detection.rpn import Proposals
from mimdet.detection.slots import Detections, GroundTruth

CPU = torch.device("cpu")


def proposals_of(boxes):
    """Proposals from each image's boxes (N, 4)."""
    valid = pad_sequence([torch.ones(len(b), dtype=torch.bool) for b in boxes], batch_first=True)
    return Proposals(pad_sequence(boxes, batch_first=True), valid)


def truth_of(targets, masks=True):
    return GroundTruth.from_targets(targets, CPU, masks)


def sizes_of(sizes):
    return torch.tensor(sizes, dtype=torch.float32)


def detections_of(images):
    """Detections from the fields of each image."""
    columns = {name: pad_sequence([d[name] for d in images], batch_first=True) for name in images[0]}
    valid = pad_sequence([torch.ones(len(d["boxes"]), dtype=torch.bool) for d in images], batch_first=True)
    return Detections(**columns, valid=valid)
