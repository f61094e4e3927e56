"""Rules of the cascade's stages, apart from parity."""

import pytest
import torch
import torch.nn.functional as F
from support.slots import proposals_of, sizes_of, truth_of
from torch import nn

from mimdet.config import instantiate
from mimdet.detection import Box2BoxTransform, CascadeROIHeads, FastRCNNOutputLayers, Matcher
from mimdet.modeling import ShapeSpec
from mimdet.testing import tiny_config

SIZE = (100, 100)
SIZES = sizes_of([SIZE])
BOXES = torch.tensor([[10.0, 10, 30, 30], [60, 10, 80, 30], [10, 60, 30, 80]])


class BoxPooler(nn.Module):
    """Features are the box's coordinates times the level's value; records the boxes."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, levels, boxes, valid, areas=None):
        self.seen.append([b[v] for b, v in zip(boxes, valid, strict=True)])
        return boxes.flatten(0, 1) / 100 * levels[0].mean()


class NoMasks(nn.Module):
    def forward(self, x, classes):
        return x.new_zeros(len(x), 4, 4) + x.sum() * 0


def predictor(cls_agnostic_bbox_reg=True):
    return FastRCNNOutputLayers(
        ShapeSpec(channels=4),
        box2box_transform=Box2BoxTransform((1, 1, 1, 1)),
        num_classes=2,
        cls_agnostic_bbox_reg=cls_agnostic_bbox_reg,
    )


def heads(steps=(0.0, 0.0, 0.0), thresholds=(0.5, 0.6, 0.7), **changes):
    """Three stages for two classes. Stage i moves every box by ``steps[i]`` of its width to the right."""
    torch.manual_seed(0)
    predictors = [predictor() for _ in range(3)]
    for each, step in zip(predictors, steps, strict=True):
        nn.init.normal_(each.cls_score.weight)
        nn.init.zeros_(each.bbox_pred.weight)
        each.bbox_pred.bias.data[0] = step
    arguments = {
        "num_classes": 2,
        "batch_size_per_image": 8,
        "positive_fraction": 0.5,
        "box_in_features": ["p2"],
        "box_pooler": BoxPooler(),
        "box_heads": [nn.Identity() for _ in range(3)],
        "box_predictors": predictors,
        "proposal_matchers": [Matcher([t], [0, 1]) for t in thresholds],
        "mask_in_features": ["p2"],
        "mask_pooler": BoxPooler(),
        "mask_head": NoMasks(),
        **changes,
    }
    return CascadeROIHeads(**arguments)


def features():
    return {"p2": torch.ones(1, 1, 2, 2, requires_grad=True)}


def proposals(boxes=BOXES):
    return proposals_of([boxes])


def truth(boxes=BOXES[:1]):
    square = torch.zeros(len(boxes), *SIZE, dtype=torch.bool)
    return truth_of([{"boxes": boxes, "labels": torch.zeros(len(boxes), dtype=torch.int64), "masks": square}])


def test_empty_boxes_go_in_training_only():
    # The second box leaves the image in the first stage.
    model = heads(steps=(2.5, 0.0, 0.0))
    with torch.no_grad():
        model.eval()(features(), proposals(), SIZES)
        assert [len(seen) for (seen,) in model.box_pooler.seen] == [3, 3, 3]
        model.box_pooler.seen.clear()
        _, losses = model.train()(features(), proposals(), SIZES, truth())
    first, second, third = (seen for (seen,) in model.box_pooler.seen)
    assert len(first) == 4, "three proposals, and the ground truth once"
    assert len(second) == len(third) == 3, "no new sample, no ground truth again"
    # Nothing matches any more: all rows are background, and the loss is the mean over what is left.
    expected = F.cross_entropy(model.box_predictor[1](second / 100)[0], torch.full((3,), 2))
    torch.testing.assert_close(losses["loss_cls_stage1"], expected)
    assert losses["loss_box_reg_stage1"] == 0


@pytest.mark.parametrize("boxes", [0, 3], ids=["no-proposals", "no-truth"])
def test_an_image_without_proposals_or_ground_truth(boxes):
    model = heads()
    _, losses = model(features(), proposals(BOXES[:boxes]), SIZES, truth(BOXES[:0]))
    assert len(losses) == 7
    assert all(bool(loss.isfinite()) for loss in losses.values())
    sum(losses.values()).backward()
    with torch.no_grad():
        detections, _ = model.eval()(features(), proposals(BOXES[:0]), SIZES)
    assert not detections.valid.any()


def test_a_row_that_overflows_is_dropped():
    model = instantiate(tiny_config("mimdet_b_cascade_mask_rcnn").model.roi_heads).eval()
    model.box_predictor[-1].test_score_thresh = 0.0
    levels = {f"p{n}": torch.ones(1, 16, 128 >> n, 128 >> n) for n in range(2, 6)}
    with torch.no_grad():
        detections, _ = model(levels, proposals(), SIZES)
        assert detections.valid.any()
        model.box_predictor[0].bbox_pred.bias.data[0] = torch.nan
        detections, _ = model(levels, proposals(), SIZES)
    assert not detections.valid.any()


def test_keys_are_detectron2s():
    keys = instantiate(tiny_config("mimdet_b_cascade_mask_rcnn").model.roi_heads).state_dict().keys()
    assert {"box_head.0.conv1.weight", "box_head.2.fc1.bias", "box_predictor.1.bbox_pred.weight"} <= keys
    assert "mask_head.predictor.weight" in keys


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"box_heads": [nn.Identity()] * 2}, "2 box_heads, 3 box_predictors and 3 proposal_matchers"),
        ({"proposal_matchers": []}, "0 proposal_matchers"),
        (
            {"box_predictors": [predictor(cls_agnostic_bbox_reg=False)] * 3},
            r"box_predictors\[0\] needs cls_agnostic_bbox_reg",
        ),
    ],
    ids=["heads", "matchers", "a-box-for-each-class"],
)
def test_what_cannot_be_a_cascade_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        heads(**changes)
