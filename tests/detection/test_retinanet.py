"""Rules of RetinaNet, apart from parity."""

import pytest
import torch
from support.slots import truth_of
from torch import nn

from mimdet.detection import (
    FPN,
    Box2BoxTransform,
    DefaultAnchorGenerator,
    LastLevelMaxPool,
    LastLevelP6P7,
    Matcher,
    RetinaNet,
    RetinaNetHead,
)
from mimdet.modeling import ShapeSpec

IMAGES = [torch.zeros(3, 32, 64)]
CELLS = 4 * 8
EMPTY = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


class Grid(nn.Module):
    """A pyramid of one level, stride 8."""

    size_divisibility = 8

    def forward(self, batch):
        return {"p3": batch.tensor[:, :1, ::8, ::8]}


class Answers(nn.Module):
    """A head with fixed logits (1, 32, 2) and deltas (1, 32, 4)."""

    num_classes, num_anchors = 2, 1

    def __init__(self, logits=None, deltas=None):
        super().__init__()
        self.logits = nn.Parameter(torch.full((1, CELLS, 2), -9.0) if logits is None else logits)
        self.deltas = nn.Parameter(torch.zeros(1, CELLS, 4) if deltas is None else deltas)

    def forward(self, levels, areas):
        assert [level.shape[0] for level in levels] == [1]
        return [self.logits], [self.deltas]


def net(head=None, **changes):
    """Anchors of 16 x 16 about the corners of 8 x 8 cells, two classes."""
    arguments = {
        "backbone": Grid(),
        "head": head or Answers(),
        "head_in_features": ["p3"],
        "anchor_generator": DefaultAnchorGenerator([[16]], [1.0], [8], offset=0.0),
        "box2box_transform": Box2BoxTransform((1, 1, 1, 1)),
        "anchor_matcher": Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True),
        "num_classes": 2,
        "pixel_mean": [0.0] * 3,
        "pixel_std": [1.0] * 3,
        **changes,
    }
    return RetinaNet(**arguments)


def truth(*rows):
    boxes = torch.tensor([row[:4] for row in rows], dtype=torch.float32)
    return [{"boxes": boxes, "labels": torch.tensor([row[4] for row in rows])}]


def test_the_normalizer_is_no_part_of_the_state_dict_and_detection_leaves_it_alone():
    model = net().train()
    model(IMAGES, truth((0, 0, 16, 16, 1), (32, 8, 48, 24, 0)))  # each is one anchor exactly
    model.eval()(IMAGES)
    assert model.loss_normalizer == pytest.approx(0.9 * 100 + 0.1 * 2)
    assert model.state_dict().keys() == {"head.logits", "head.deltas"}


def test_labels_of_anchors():
    anchors = torch.tensor(
        [
            [0.0, 0, 10, 10],  # the object itself
            [0, 0, 10, 4.5],  # overlap 0.45: ignored
            [0, 0, 10, 3],  # 0.3: background
            [50, 0, 60, 10],  # overlaps nothing
            [20, 20, 30, 30],  # tied for the best overlap with the second object, 1/3
            [30, 20, 40, 30],  # tied
        ]
    )
    targets = truth_of([*truth((0, 0, 10, 10, 1), (25, 20, 35, 30, 0)), EMPTY], masks=False)
    classes, boxes = net().label_anchors(anchors, targets)
    assert classes.tolist() == [[1, -1, 2, 2, 0, 0], [2] * 6]
    assert boxes[0, 0].tolist() == [0, 0, 10, 10]
    assert boxes[0, 5].tolist() == [25, 20, 35, 30]


def test_scores_must_exceed_the_threshold():
    logits = torch.full((1, CELLS, 2), -9.0)
    logits[0, 9, 0], logits[0, 13, 1] = 0.0, 0.1
    (detections,) = net(Answers(logits), test_score_thresh=0.5).eval()(IMAGES)
    assert detections["labels"].tolist() == [1]
    assert detections.keys() == {"boxes", "scores", "labels"}


def test_boxes_that_overflow_are_dropped():
    logits, deltas = torch.zeros(1, CELLS, 2), torch.zeros(1, CELLS, 4)
    logits[0, 1:], deltas[0, 1:] = 1.0, torch.nan
    (detections,) = net(Answers(logits, deltas), max_detections_per_image=2).eval()(IMAGES)
    assert detections["labels"].sort().values.tolist() == [0, 1]


def test_targets_need_no_masks_but_labels():
    with pytest.raises(ValueError, match=r"targets\[0\] has no labels"):
        net().train()(IMAGES, [{"boxes": torch.zeros(0, 4)}])
    with pytest.raises(ValueError, match=r"classes 0\.\.1: set the config's num_classes"):
        net().train()(IMAGES, truth((0, 0, 8, 8, 2)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 3}, "head has 2 classes, num_classes is 3"),
        ({"head_in_features": ["p3", "p4"]}, r"1 anchors at a cell of each of 2 levels, .* makes \[1\]"),
        (
            {"anchor_generator": DefaultAnchorGenerator([[16, 20]], [1.0], [8])},
            r"1 anchors at a cell of each of 1 levels, .* makes \[2\]",
        ),
    ],
    ids=["classes", "levels", "anchors"],
)
def test_parts_must_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        net(**changes)


def head(**changes):
    arguments = {"input_shape": [ShapeSpec(channels=8)] * 2, "num_classes": 2, "num_anchors": 3, "conv_dims": [8, 8]}
    return RetinaNetHead(**{**arguments, **changes})


def test_head_starts_from_its_prior_in_anchor_order():
    model = head(prior_prob=0.02)
    logits, deltas = model([torch.zeros(2, 8, 3, 5), torch.zeros(2, 8, 2, 2)])
    assert [x.shape for x in logits] == [(2, 45, 2), (2, 12, 2)]
    assert [x.shape for x in deltas] == [(2, 45, 4), (2, 12, 4)]
    torch.testing.assert_close(logits[0].sigmoid(), torch.full((2, 45, 2), 0.02))
    model.cls_score.bias.data = torch.arange(6.0)
    assert model([torch.zeros(1, 8, 1, 2)])[0][0].tolist() == [[[0, 1], [2, 3], [4, 5]] * 2]


@pytest.mark.parametrize(
    ("norm", "keys"),
    [("", {"cls_subnet.0.weight", "cls_subnet.2.weight"}), (lambda c: nn.GroupNorm(2, c), {"cls_subnet.1.weight"})],
    ids=["plain", "group-norm"],
)
def test_head_keys(norm, keys):
    names = head(norm=norm).state_dict().keys()
    assert keys | {"bbox_subnet.0.bias", "cls_score.weight", "bbox_pred.bias"} <= names


@pytest.mark.parametrize(
    "changes",
    [{"norm": "SyncBN"}, {"conv_dims": []}, {"input_shape": [ShapeSpec(channels=8), ShapeSpec(channels=4)]}],
    ids=["batch-norm", "no-convolution", "channels"],
)
def test_head_refuses(changes):
    with pytest.raises(ValueError, match="RetinaNetHead"):
        head(**changes)


class Bottom(nn.Module):
    def output_shape(self):
        return {"c4": ShapeSpec(channels=2, stride=16), "c5": ShapeSpec(channels=4, stride=32)}

    def forward(self, x):
        return {"c4": x.new_ones(1, 2, 6, 10), "c5": x.new_ones(1, 4, 3, 5)}


def test_p6_comes_from_c5_and_p7_from_its_positive_part():
    top = LastLevelP6P7(4, 8, "c5")
    pyramid = FPN(Bottom(), ["c4", "c5"], 8, top_block=top)
    top.p6.bias.data.fill_(-100.0)
    top.p7.bias.data.fill_(3.0)
    levels = pyramid(torch.zeros(1))
    sizes = {name: tuple(level.shape[-2:]) for name, level in levels.items()}
    assert sizes == {"p4": (6, 10), "p5": (3, 5), "p6": (2, 3), "p7": (1, 2)}
    torch.testing.assert_close(levels["p6"], top.p6(torch.ones(1, 4, 3, 5)))
    assert torch.equal(levels["p7"], torch.full((1, 8, 1, 2), 3.0))
    assert pyramid.output_shape()["p7"] == ShapeSpec(channels=8, stride=128)


def test_max_pooling_reads_p5():
    levels = FPN(Bottom(), ["c4", "c5"], 8, top_block=LastLevelMaxPool())(torch.zeros(1))
    assert torch.equal(levels["p6"], levels["p5"][:, :, ::2, ::2])


def test_a_top_block_must_find_its_input():
    with pytest.raises(ValueError, match=r"in_feature 'res5' is none of c4, c5, p4, p5"):
        FPN(Bottom(), ["c4", "c5"], 8, top_block=LastLevelP6P7(4, 8, "res5"))
