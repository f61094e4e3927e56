"""Batches in slots: an empty slot changes nothing, whatever it holds, and whether it is computed or not."""

import pytest
import torch
from support.tiny_detectors import DETECTORS, detector, targets_of

from mimdet.detection import roi_heads, slots
from mimdet.detection.slots import GroundTruth
from mimdet.kernels.tensors import to_host_together
from mimdet.testing.small import make_images, target

SIZES = [(96, 128), (75, 141), (40, 64)]


@pytest.fixture
def in_every_way(monkeypatch):
    """A function's results: a CPU counts valid rows, a GPU computes all slots, of masks in small batches."""

    def call(function):
        results = []
        for counting_is_free, batch_of_all_slots in ((True, 8), (False, 8), (False, 0)):
            for module in (slots, roi_heads):
                monkeypatch.setattr(module, "counting_is_free", lambda device, free=counting_is_free: free)
            monkeypatch.setattr(roi_heads, "_BATCH_OF_ALL_SLOTS", batch_of_all_slots)
            results.append(function())
        return results

    return call


def step(model, state, images, targets):
    """Losses, the gradient of their sum and the new statistics, and detections, from one seed and the same weights."""
    torch.manual_seed(3)
    model.load_state_dict(state)
    if hasattr(model, "loss_normalizer"):
        model.loss_normalizer.fill_(100.0)
    losses = model.train()(images, targets)
    gradients = torch.autograd.grad(sum(losses.values()), [p for p in model.parameters() if p.requires_grad])
    statistics = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        detections = model.eval()(images)
    losses = {key: loss.item() for key, loss in losses.items()}
    return losses, torch.cat([g.flatten() for g in gradients]), statistics, detections


@pytest.mark.parametrize("counts", [(3, 1, 2), (0, 4, 0), (0, 0, 0), (130, 1, 0)], ids=str)
@pytest.mark.parametrize("mode", ["canvas", "packed"])
@pytest.mark.parametrize("name", DETECTORS)
def test_computing_all_slots_changes_nothing(name, mode, counts, in_every_way):
    ratio = "model.backbone.bottom_up.sample_ratio=1.0"
    model = detector(name, f"model.backbone.bottom_up.batch_mode={mode}", ratio)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    images, targets = make_images(SIZES), targets_of(SIZES, counts)
    (losses, gradient, statistics, detections), *others = in_every_way(lambda: step(model, state, images, targets))
    assert all(len(each["scores"]) > 0 for each in detections)
    for other in others:
        assert other[0] == pytest.approx(losses, rel=1e-6, abs=1e-9)
        assert float((other[1] - gradient).norm()) <= 1e-5 * float(gradient.norm())
        torch.testing.assert_close(other[2], statistics, rtol=1e-5, atol=1e-6)
        for actual, expected in zip(other[3], detections, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("value", [torch.nan, 1e30], ids=str)
@pytest.mark.parametrize("name", DETECTORS)
def test_what_empty_slots_hold_changes_no_bit(name, value, monkeypatch):
    """Values of slots without a box: of the ground truth, of proposals, and features of their rows."""
    for module in (slots, roi_heads):
        monkeypatch.setattr(module, "counting_is_free", lambda device: False)
    model, images, targets = detector(name), make_images(SIZES), targets_of(SIZES, (3, 0, 1))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    if name != "retinanet":
        model.proposal_generator.nms_thresh = 0.1  # few proposals stay

    clean = step(model, state, images, targets)
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
    dirty = step(model, state, images, targets)
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
