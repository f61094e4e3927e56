"""A step draws random numbers once for each purpose, none of them in backward or in a recomputed function."""

import pytest
import torch
from support.packed_images import batch
from support.packed_images import tiny_backbone as backbone
from torch.utils._python_dispatch import TorchDispatchMode

from mimdet.testing.small_benchmarking import small_backbone, small_input

SIZES = [(64, 96), (40, 50)]


class Draws(TorchDispatchMode):
    """Names of the operations that draw random numbers."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if torch.Tag.nondeterministic_seeded in function.tags:
            self.names.append(function.name().removeprefix("aten::"))
        return function(*args, **(kwargs or {}))


def step(model, images):
    """Names of the draws of a training step, and its features and gradients."""
    torch.manual_seed(3)
    with Draws() as draws:
        features = model(images)
        sum(f.square().mean() for f in features.values()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return draws.names, {**features, **gradients}


def assert_checkpointing_changes_nothing(models, images, expected):
    (plain, values), (again, checkpointed) = (step(model, images) for model in models)
    assert plain == again == expected
    for name, value in values.items():
        torch.testing.assert_close(checkpointed[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("mode", ["canvas", "packed"])
@pytest.mark.parametrize(
    ("name", "rates", "expected"),
    [
        ("mimdet_b_mask_rcnn", ["encoder.dpr=0.5"], ["rand", "bernoulli"]),
        ("mimdet_b_mask_rcnn", ["encoder.dpr=0.5", "decoder.dpr=0.5"], ["rand", "bernoulli", "bernoulli"]),
        ("ablations/table8_window_vit_fpn", ["encoder.dpr=0.5"], ["bernoulli"]),
        ("mimdet_b_mask_rcnn", ["encoder.dpr=0.0"], ["rand"]),
    ],
    ids=["encoder", "decoder-too", "taps", "rate-0"],
)
def test_a_step_draws_tokens_and_paths_once(name, rates, expected, mode):
    models = [
        backbone(name, f"batch_mode={mode}", f"encoder.checkpointing={checkpointing}", "encoder.recompute=lean", *rates)
        for checkpointing in ("false", "true")
    ]
    assert_checkpointing_changes_nothing(models, batch(SIZES), expected)


def test_windows_and_images_of_a_plain_vit_are_drawn_together():
    models = [small_backbone(drop_path_rate=0.5, with_cp=with_cp).train() for with_cp in (False, True)]
    models[1].load_state_dict(models[0].state_dict())
    assert_checkpointing_changes_nothing(models, small_input(2), ["bernoulli"])
