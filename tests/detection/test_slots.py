"""Slots of a batch give what the detectors find image by image, and nothing in an empty slot counts."""

from contextlib import contextmanager

import pytest
import torch
from support import dynamic_detection
from support.small_mimdet import make_images, target
from support.tiny_detectors import DETECTORS, detector

from mimdet.detection import roi_heads, slots
from mimdet.detection.masks import GroundTruthMasks
from mimdet.detection.slots import GroundTruth
from mimdet.kernels.tensors import to_host_together
from mimdet.testing import fixed_noise

SIZES = [(96, 128), (75, 141), (40, 64)]
NOTHING = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": []}


@pytest.fixture(params=["counted", "slots", "mask slots counted"])
def counted(request, monkeypatch):
    """On a CPU valid rows are counted; a GPU computes all slots, of masks in a large batch as many as are needed."""
    for module in (slots, roi_heads):
        monkeypatch.setattr(module, "counting_is_free", lambda device: request.param == "counted")
    monkeypatch.setattr(roi_heads, "_BATCH_OF_ALL_SLOTS", 0 if request.param == "mask slots counted" else 8)


def truth_of(counts):
    targets = [target(7 + i, size, n) if n else NOTHING for i, (size, n) in enumerate(zip(SIZES, counts, strict=True))]
    for each in targets:
        each["labels"] = each["labels"] % 4
    return targets


@contextmanager
def recorded(model):
    """What a training step chooses: proposals, sample, mask targets."""
    seen, patches = {}, pytest.MonkeyPatch()
    hook = model.proposal_generator.register_forward_hook(lambda m, a, out: seen.update(proposals=out[0]))
    sample, masks = roi_heads.StandardROIHeads.sample_proposals, GroundTruthMasks.targets

    def keep(name, function):
        def run(*arguments):
            seen[name] = function(*arguments), arguments
            return seen[name][0]

        return run

    patches.setattr(roi_heads.StandardROIHeads, "sample_proposals", keep("sample", sample))
    patches.setattr(GroundTruthMasks, "targets", keep("masks", masks))
    try:
        yield seen
    finally:
        hook.remove()
        patches.undo()


def numbers_for(model, images):
    """Uniform numbers for the anchors and proposals of a batch."""
    torch.manual_seed(1)
    batch = model.preprocess(images)
    height, width = batch.tensor.shape[2:]
    cells = sum(-(-height // s) * -(-width // s) for s in (4, 8, 16, 32, 64))
    return {"anchors": torch.rand(len(images), 3 * cells), "proposals": torch.rand(len(images), 100 + 256)}


def step(model, losses):
    """Losses and the gradient of their sum."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(sum(losses.values()), parameters)
    return {k: v.item() for k, v in losses.items()}, torch.cat([g.flatten() for g in gradients]).double()


@pytest.mark.parametrize("counts", [(3, 1, 2), (0, 4, 0), (0, 0, 0), (130, 1, 0)], ids=str)
@pytest.mark.parametrize("mode", ["canvas", "packed"])
@pytest.mark.parametrize("name", DETECTORS)
def test_training_equals_the_dynamic_path(name, mode, counts, counted):
    ratio = "model.backbone.bottom_up.sample_ratio=1.0"
    model = detector(name, f"model.backbone.bottom_up.batch_mode={mode}", ratio).train()
    images, targets = make_images(SIZES), truth_of(counts)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    if name == "retinanet":
        expected, _ = dynamic_detection.train(model, images, targets, None)
        expected = step(model, expected)
        model.load_state_dict(state)
        actual = step(model, model(images, targets))
    else:
        noise = numbers_for(model, images)
        expected, (boxes, samples, masks) = dynamic_detection.train(model, images, targets, noise)
        expected, after = step(model, expected), {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(state)
        with fixed_noise(model, None, **noise), recorded(model) as seen:
            actual = step(model, model(images, targets))
        same_choices(seen, boxes, samples, masks)
        for key, value in model.state_dict().items():  # running statistics
            torch.testing.assert_close(value, after[key], rtol=1e-5, atol=1e-6)
    assert actual[0] == pytest.approx(expected[0], rel=1e-6, abs=1e-9)
    assert float((actual[1] - expected[1]).norm()) <= 1e-5 * float(expected[1].norm())


def same_choices(seen, boxes, samples, masks):
    """Proposals, sampled rows, classes, matched boxes and mask targets, bit for bit."""
    (sampled, _), (small, (_, _, _, valid, _)) = seen["sample"], seen["masks"]
    proposed = seen["proposals"]
    for i, (expected, sample) in enumerate(zip(boxes, samples, strict=True)):
        assert torch.equal(proposed.boxes[i][proposed.valid[i]], expected)
        keep = sampled.valid[i]
        assert torch.equal(sampled.boxes[i][keep], sample[0])
        assert torch.equal(sampled.classes[i][keep], sample[1])
        assert torch.equal(sampled.gt_index[i][keep], sample[2])
        foreground = sample[1] < 4
        assert torch.equal(sampled.gt_boxes[i][keep][foreground], sample[3][foreground])
        assert int(keep.sum()) == int(keep[: len(sample[0])].sum()), "a prefix"
    assert torch.equal(small[valid], masks)


@pytest.mark.parametrize("mode", ["canvas", "packed"])
@pytest.mark.parametrize("name", DETECTORS)
def test_detections_equal_the_dynamic_path(name, mode, counted):
    options = [] if name == "retinanet" else ["model.roi_heads.box_predictor.test_score_thresh=0.2"]
    if name == "cascade_mask_rcnn":
        options = ["model.roi_heads.box_predictors.2.test_score_thresh=0.2"]
    model = detector(name, f"model.backbone.bottom_up.batch_mode={mode}", *options).eval()
    images = make_images(SIZES)
    with torch.no_grad():
        for actual, expected in zip(model(images), dynamic_detection.detect(model, images), strict=True):
            assert len(expected[0]) > 0
            assert torch.equal(actual["labels"], expected[2])
            torch.testing.assert_close(actual["boxes"], expected[0], rtol=1e-6, atol=1e-4)
            torch.testing.assert_close(actual["scores"], expected[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, 1e30], ids=str)
@pytest.mark.parametrize("name", DETECTORS)
def test_what_empty_slots_hold_changes_no_bit(name, value, monkeypatch):
    """Values of slots without a box: of the ground truth, of proposals, and features of their rows."""
    for module in (slots, roi_heads):
        monkeypatch.setattr(module, "counting_is_free", lambda device: False)
    model, images, targets = detector(name), make_images(SIZES), truth_of((3, 0, 1))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    if name != "retinanet":
        model.proposal_generator.nms_thresh = 0.1  # few proposals stay

    def run():
        torch.manual_seed(3)
        model.load_state_dict(state)
        if name == "retinanet":
            model.loss_normalizer.fill_(100.0)
        losses, gradient = step(model.train(), model(images, targets))
        with torch.no_grad():
            detections = model.eval()(images)
        return losses, gradient, model.state_dict(), detections

    clean = run()
    from_targets = GroundTruth.from_targets

    def poisoned_truth(*arguments):
        truth = from_targets(*arguments)
        boxes = truth.boxes.masked_fill(~truth.filled[..., None], value)
        return truth._replace(boxes=boxes, labels=truth.labels.masked_fill(~truth.filled, 3))

    monkeypatch.setattr(GroundTruth, "from_targets", poisoned_truth)
    if name != "retinanet":
        rpn, heads = model.proposal_generator, model.roi_heads
        propose = rpn.predict_proposals

        def poisoned_proposals(*arguments):
            boxes, valid = propose(*arguments)
            assert not valid.all()
            return type(propose(*arguments))(boxes.masked_fill(~valid[..., None], value), valid)

        monkeypatch.setattr(rpn, "predict_proposals", poisoned_proposals)
        for pooler in (heads.box_pooler, heads.mask_pooler):
            # NaN times a gradient of zero would be a NaN in a weight's gradient: rows must be finite.
            pooler.register_forward_hook(
                lambda m, inputs, rows: torch.where(inputs[2].flatten()[:, None, None, None], rows, 1e30)
            )
    dirty = run()
    assert dirty[0] == clean[0]
    assert torch.equal(dirty[1], clean[1])
    assert all(torch.equal(value, clean[2][key]) for key, value in dirty[2].items())
    for actual, expected in zip(dirty[3], clean[3], strict=True):
        assert all(torch.equal(value, expected[key]) for key, value in actual.items())


def test_more_boxes_than_slots_get_more_slots_and_one_warning(monkeypatch, caplog):
    monkeypatch.setattr(slots, "_told", set())
    every = [target(1, (400, 400), count) for count in (3, 129)]
    for _ in range(2):
        truth = GroundTruth.from_targets(every, torch.device("cpu"), masks=True)
    assert truth.boxes.shape == (2, 256, 4)
    assert truth.counts.tolist() == [3, 129]
    assert torch.equal(truth.boxes[1, :129], every[1]["boxes"])
    assert truth.boxes[0, 3].tolist() == [0, 0, 1, 1]
    assert [record.getMessage() for record in caplog.records] == [
        "an image has 129 ground-truth boxes: batches with such images get 256 slots"
    ]


def test_one_copy_to_the_host_keeps_every_field(monkeypatch):
    tensors = [torch.rand(5, 4), torch.arange(5), torch.rand(5) > 0.5, torch.rand(5, 2, 2).transpose(1, 2)]
    calls = []

    class OnGPU(torch.Tensor):
        """Says that it is on a GPU."""

        device = torch.device("cuda")

        def cpu(self):
            calls.append(self.shape)
            return self.as_subclass(torch.Tensor)

    moved = to_host_together([t.as_subclass(OnGPU) for t in tensors])
    assert len(calls) == 1
    for a, b in zip(moved, tensors, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.as_subclass(torch.Tensor), b)
