"""Nothing in a training step or a detection waits for the GPU: proven with fake CUDA tensors."""

import pytest
import torch
from support.no_sync import NoSync, SyncError
from support.tiny_detectors import DETECTORS, detector, samples
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from mimdet.bench.experiments.launches import Launches
from mimdet.bench.fake_gpu import fake_gpu, to_fake_gpu, train_step
from mimdet.bench.operations import UPDATE
from mimdet.testing.small import make_images

SIZES = [(75, 141), (96, 128), (75, 141), (40, 64)]
WAITS = (SyncError, DataDependentOutputException, DynamicOutputShapeException)


def train(name, batch, *options, dtype=None, clip=None, spoil=None):
    """Two steps; the count of each operation of the second, by component and direction."""
    model, every = detector(name, *options).train(), samples(SIZES[:batch], 3)
    if spoil is not None:
        model.backbone.register_forward_hook(lambda module, inputs, output: spoil(output["p3"]))
    with fake_gpu(), NoSync():
        to_fake_gpu(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        step = train_step(model, optimizer, clip, dtype)
        step(every)
        with Launches(model, optimizer) as launches:
            step(every)
    return launches.counts


@pytest.mark.parametrize("mode", ["canvas", "packed"])
@pytest.mark.parametrize("name", DETECTORS)
def test_a_training_step_never_waits(name, mode):
    counts = train(name, 2, f"model.backbone.bottom_up.batch_mode={mode}", clip=1.0)
    assert counts[UPDATE, UPDATE, torch.ops.aten._fused_adamw_.default] == 1


def test_mixed_precision_does_not_wait():
    assert train("mask_rcnn", 1, dtype=torch.bfloat16)


def test_checkpointing_does_not_wait():
    assert train("mask_rcnn", 1, "model.backbone.bottom_up.encoder.checkpointing=true")


def test_a_batch_of_four_takes_the_operations_of_two():
    two, four = (train("mask_rcnn", batch) for batch in (2, 4))
    assert four == two


@pytest.mark.parametrize("name", DETECTORS)
def test_detections_wait_for_their_number_alone(name):
    model, images = detector(name).eval(), make_images(SIZES[:2])
    with torch.no_grad(), fake_gpu(), NoSync():
        to_fake_gpu(model)
        batch = model.preprocess(images)
        slots = model.detect(model.backbone(batch), batch.sizes)
        resized = model._resize(slots, batch.image_sizes, [(300, 400)] * 2)
        assert resized.boxes.shape == (2, slots.valid.shape[1], 4)
        with pytest.raises(WAITS):
            resized.tolist()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x.sum().item(),
        lambda x: x[0, 0, 0].tolist(),
        lambda x: x[x > 0],
        lambda x: x.new_tensor([1.0]),
        lambda x: x.cpu(),
        lambda x: torch.ones(2).to(x.device),
        lambda x: x.nonzero(),
    ],
    ids=["item", "tolist", "boolean-index", "new_tensor", "cpu", "pageable", "nonzero"],
)
def test_what_waits_is_found(spoil):
    with pytest.raises(WAITS):
        train("mask_rcnn", 1, spoil=spoil)
