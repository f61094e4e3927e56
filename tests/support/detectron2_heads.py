"""Cascade and RetinaNet heads on random features, ours and Detectron2's, and recordings of the latter.

``PYTHONPATH=tests python -m support.detectron2_heads``, where Detectron2 can be imported, records its answers in
``recordings/detectron2_heads.npz``. Weights and inputs follow from names and seeds (``fill_weights.py``). Wherever
candidates are drawn at random, the first ones in index order are taken.
"""

from contextlib import contextmanager

import numpy as np
import torch
from support.fill_weights import fill_module, image
from support.paths import RECORDINGS
from support.slots import proposals_of, sizes_of, truth_of
from torch import nn

from mimdet.config import instantiate
from mimdet.modeling import ShapeSpec
from mimdet.testing import tiny_config
from mimdet.testing.small import target

DATA = RECORDINGS / "detectron2_heads.npz"
CLASSES = 5
# The second image is smaller than its padded batch.
SIZES = [(96, 128), (70, 100)]
OUTPUT_SIZES = [(96, 128), (105, 150)]
CHANNELS = 16
LEVELS = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}
NO_TRUTH = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": []}


@contextmanager
def first_candidates():
    """Random draws pick candidates in index order."""
    saved = torch.rand, torch.randperm
    torch.rand = lambda *size, **_: (torch.arange(size[-1]) / max(size[-1], 1)).expand(size)
    torch.randperm = lambda n, **_: torch.arange(n)
    try:
        yield
    finally:
        torch.rand, torch.randperm = saved


def truth(case):
    """Ground truth of two images; the second's is missing in the case ``one_empty``, both in ``all_empty``."""
    targets = [target(31 + i, size, count) for i, (size, count) in enumerate(zip(SIZES, (3, 4), strict=True))]
    for each in targets:
        each["labels"] %= CLASSES
    empty = {"full": 0, "one_empty": 1, "all_empty": 2}[case]
    return targets[: 2 - empty] + [NO_TRUTH] * empty


def roi_inputs():
    """Pyramid levels that require gradients, and proposals near the ground truth and elsewhere."""
    rng = np.random.default_rng(5)
    features = {
        name: torch.from_numpy(rng.standard_normal((2, CHANNELS, 96 // s, 128 // s), dtype=np.float32)).requires_grad_()
        for name, s in LEVELS.items()
    }
    proposals = []
    for (height, width), each in zip(SIZES, truth("full"), strict=True):
        near = each["boxes"].numpy().repeat(8, axis=0)
        near = near + rng.uniform(-0.2, 0.2, near.shape) * np.tile(near[:, 2:] - near[:, :2], 2)
        corner = rng.uniform(0, 0.7, (20, 2)) * (width, height)
        far = np.concatenate([corner, corner + rng.uniform(4, 60, (20, 2))], axis=1)
        boxes = np.concatenate([near, far]).clip(0, (width, height, width, height)).astype(np.float32)
        boxes = boxes[((boxes[:, 2:] - boxes[:, :2]) > 1).all(axis=1)]
        proposals.append(torch.from_numpy(rng.permutation(boxes)))
    return features, proposals


def cascade(model):
    """The ROI heads of a Cascade's section, native or Detectron2's, at the size of the recordings."""
    model.roi_heads.num_classes = CLASSES
    for predictor in model.roi_heads.box_predictors:
        predictor.test_topk_per_image = 20
    return instantiate(model.roi_heads)


def our_cascade():
    heads = cascade(tiny_config("mimdet_b_cascade_mask_rcnn").model)
    fill_module(heads)
    return heads


def their_cascade():
    from support import detectron2_testing as d2

    heads = cascade(d2.tiny("mimdet_b_cascade_mask_rcnn").model)
    heads.load_state_dict(our_cascade().state_dict())
    return heads


def run_our_cascade(case):
    """Losses and gradients of a training step, or, in the case ``eval``, detections."""
    features, proposals = roi_inputs()
    wrapped, sizes = proposals_of(proposals), sizes_of(SIZES)
    heads = our_cascade()
    if case == "eval":
        with torch.no_grad():
            detections, _ = heads.eval()(features, wrapped, sizes)
        fields = ("boxes", "scores", "labels", "mask_probabilities")
        return _detections([tuple(d[name] for name in fields) for d in detections.tolist()])
    with first_candidates():
        _, losses = heads.train()(features, wrapped, sizes, truth_of(truth(case)))
    return _losses(losses, features, heads)


def run_their_cascade(case):
    from detectron2.structures import Boxes, ImageList, Instances
    from detectron2.utils.events import EventStorage

    features, proposals = roi_inputs()
    wrapped = [
        Instances(size, proposal_boxes=Boxes(boxes.clone()), objectness_logits=torch.zeros(len(boxes)))
        for size, boxes in zip(SIZES, proposals, strict=True)
    ]
    heads = their_cascade()
    images = ImageList(torch.zeros(2, 3, 96, 128), SIZES)
    if case == "eval":
        with torch.no_grad():
            detections, _ = heads.eval()(images, features, wrapped)
        return _detections([(d.pred_boxes.tensor, d.scores, d.pred_classes, d.pred_masks[:, 0]) for d in detections])
    with first_candidates(), EventStorage():
        _, losses = heads.train()(images, features, wrapped, their_truth(case))
    return _losses(losses, features, heads)


def their_truth(case):
    from detectron2.structures import Boxes, Instances, PolygonMasks

    return [
        Instances(size, gt_boxes=Boxes(t["boxes"]), gt_classes=t["labels"], gt_masks=PolygonMasks(t["masks"]))
        for size, t in zip(SIZES, truth(case), strict=True)
    ]


class Stem(nn.Module):
    """A backbone with c3, c4 and c5 that takes a tensor or an ImageList."""

    size_divisibility = 32
    padding_constraints: dict = {}  # noqa: RUF012 - as Detectron2 requires

    def __init__(self):
        super().__init__()
        self.c3 = nn.Conv2d(3, 8, 8, stride=8)
        self.c4 = nn.Conv2d(8, 12, 2, stride=2)
        self.c5 = nn.Conv2d(12, 16, 2, stride=2)

    def output_shape(self):
        return {f"c{n}": ShapeSpec(channels=c, stride=2**n) for n, c in ((3, 8), (4, 12), (5, 16))}

    def forward(self, x):
        c3 = self.c3(getattr(x, "tensor", x)).relu()
        c4 = self.c4(c3).relu()
        return {"c3": c3, "c4": c4, "c5": self.c5(c4)}


def retinanet(model, stem):
    """A RetinaNet over ``stem`` from its section, native or Detectron2's, at the size of the recordings."""
    model.update(num_classes=CLASSES, test_topk_candidates=40, max_detections_per_image=30)
    model.backbone.norm = "BN"
    model.backbone.top_block.in_channels = 16
    return instantiate(model, backbone=instantiate(model.backbone, bottom_up=stem))


def our_retinanet():
    model = retinanet(tiny_config("mimdet_b_retinanet").model, Stem())
    fill_module(model)
    return model


def their_retinanet():
    from detectron2.modeling import Backbone
    from support import detectron2_testing as d2

    section = d2.tiny("mimdet_b_retinanet").model
    section._target_ = "detectron2.modeling.meta_arch.retinanet.RetinaNet"
    model = retinanet(section, type("TheirStem", (Stem, Backbone), {})())
    model.load_state_dict(our_retinanet().state_dict())
    return model


def dense_images():
    return [torch.from_numpy(image(41 + i, *size)) for i, size in enumerate(SIZES)]


def run_our_retinanet(case):
    """As :func:`run_our_cascade`; losses are of the second of two steps."""
    model, images = our_retinanet(), dense_images()
    if case == "eval":
        with torch.no_grad():
            detections = model.eval()(images, output_sizes=OUTPUT_SIZES)
        return _detections([(d["boxes"], d["scores"], d["labels"]) for d in detections])
    model.train()(images, truth("full"))
    return _losses(model(images, truth(case)), {}, model)


def run_their_retinanet(case):
    from detectron2.utils.events import EventStorage

    model = their_retinanet()
    inputs = [
        {"image": image, "height": size[0], "width": size[1]}
        for image, size in zip(dense_images(), OUTPUT_SIZES, strict=True)
    ]
    if case == "eval":
        with torch.no_grad():
            detections = [result["instances"] for result in model.eval()(inputs)]
        return _detections([(d.pred_boxes.tensor, d.scores, d.pred_classes) for d in detections])

    def step(case):
        with EventStorage():
            return model([{**i, "instances": t} for i, t in zip(inputs, their_truth(case), strict=True)])

    model.train()
    step("full")
    return _losses(step(case), {}, model)


def _detections(detections):
    names = ("boxes", "scores", "labels", "masks")
    values = {f"{i}.{n}": v.numpy() for i, row in enumerate(detections) for n, v in zip(names, row, strict=False)}
    return {name: value[:, ::9, ::9] if name.endswith("masks") else value for name, value in values.items()}


def _losses(losses, features, model):
    """Losses by name, and norms of the gradients of features and parameters."""
    sum(losses.values()).backward()
    values = {name: loss.detach().numpy() for name, loss in losses.items()}
    values |= {f"grad.{name}": feature.grad.norm().numpy() for name, feature in features.items()}
    return values | {f"grad.{name}": p.grad.norm().numpy() for name, p in model.named_parameters()}


TRAINING = ("full", "one_empty", "all_empty")
OURS = {"cascade": run_our_cascade, "retinanet": run_our_retinanet}
THEIRS = {"cascade": run_their_cascade, "retinanet": run_their_retinanet}


def recorded(kind, case, like):
    """Detectron2's answers under the names and in the shapes of ``like``, which must have as many values."""
    with np.load(DATA) as data:
        flat = data[f"{kind}.{case}"]
    names = sorted(like)
    assert flat.size == sum(like[name].size for name in names), "another number of values"
    parts = np.split(flat, np.cumsum([like[name].size for name in names])[:-1])
    return {name: part.reshape(like[name].shape) for name, part in zip(names, parts, strict=True)}


if __name__ == "__main__":
    answers = {}
    for kind, run in THEIRS.items():
        for case in (*TRAINING, "eval"):
            actual = run(case)
            answers[f"{kind}.{case}"] = np.concatenate([actual[name].ravel() for name in sorted(actual)]).astype(
                np.float32
            )
    np.savez_compressed(DATA, **answers)
