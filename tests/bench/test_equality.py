"""Detections that are equal up to their order."""

import pytest
import torch

from mimdet.bench.equality import detections_mismatch, matched

BOXES = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 9], [1, 1, 5, 5], [0, 0, 9, 9]])
CLASSES = torch.tensor([3, 4, 3, 4])


def detections(order):
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    masks = torch.stack([torch.eye(8, dtype=torch.bool).roll(i, 0) for i in range(4)])
    return {"boxes": BOXES[order], "labels": CLASSES[order], "scores": scores[order], "masks": masks[order]}


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 1, 0, 3], [1, 0, 3, 2]])
def test_detections_match_in_any_order(order):
    """Two have one box and one class: they match in their order."""
    index = matched((BOXES[order] + 1e-3, CLASSES[order]), (BOXES, CLASSES), 1e-2)
    assert [order[i] for i in index] == [0, 1, 2, 3]
    assert detections_mismatch([detections(order)], [detections([0, 1, 2, 3])]) is None


@pytest.mark.parametrize(
    ("boxes", "classes"), [(BOXES + 1, CLASSES), (BOXES, CLASSES.flip(0)), (BOXES[:3], CLASSES[:3])]
)
def test_other_boxes_or_classes_do_not(boxes, classes):
    assert matched((boxes, classes), (BOXES, CLASSES), 1e-2) is None


def test_nothing_equals_nothing():
    none = BOXES[:0], CLASSES[:0]
    assert len(matched(none, none, 1e-2)) == 0


@pytest.mark.parametrize(
    ("key", "message"), [("scores", "a score differs"), ("masks", "a mask differs"), ("boxes", "other boxes")]
)
def test_a_difference_is_named(key, message):
    actual = detections([0, 1, 2, 3])
    actual[key] = ~actual[key] if key == "masks" else actual[key] + 0.1
    assert f"image 1: {message}" in detections_mismatch(
        [detections([0, 1]), actual], [detections([0, 1]), detections([0, 1, 2, 3])]
    )
