"""Convolutions of a training step read and get channels_last, and 16 bits under autocast, gradients included."""

import torch
from support.fill_weights import fill_module
from torch import nn

from mimdet.engine.model import build_model
from mimdet.testing.small import SIZES, make_images, small_config, target

# fc1 has Detectron2's order of weights, channels first: the flattened maps are copied to it, and their gradient has it.
FLATTENED = "roi_heads.box_head.conv4"
IMAGES = "backbone.bottom_up.encoder.patch_embed.proj.0.0"  # reads images, which are float32


def is_nhwc(x):
    return 1 in (x.stride(1), x.shape[1]) or x.shape[2] * x.shape[3] == 1


def watched(model):
    """Hooks every convolution; returns the list that they fill with (name, what, tensor's layout, dtype)."""
    seen = []

    def see(name, what, x):
        seen.append((name, what, is_nhwc(x), x.dtype))

    def before(module, inputs):
        x = inputs[0].value if hasattr(inputs[0], "value") else inputs[0]
        see(names[module], "input", x)
        if x.requires_grad:
            x.register_hook(lambda gradient: see(names[module], "gradient of the input", gradient))

    def after(module, inputs, y):
        if y.requires_grad:
            y.register_hook(lambda gradient: see(names[module], "gradient", gradient))

    names = {m: name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))}
    for module in names:
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
    return seen


def test_convolutions_see_channels_last_and_bfloat16():
    model = build_model(small_config(), pretrained=False)
    fill_module(model)
    seen = watched(model.train())
    targets = [target(21 + i, size, 3 + i) for i, size in enumerate(SIZES)]
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(make_images(SIZES), targets)
    sum(losses.values()).backward()
    assert len({name for name, *_ in seen}) > 25
    assert {what for _, what, *_ in seen} == {"input", "gradient of the input", "gradient"}
    nchw = {(name, what) for name, what, nhwc, _ in seen if not nhwc}
    assert nchw <= {(FLATTENED, "gradient")}
    wide = {name for name, what, _, dtype in seen if dtype != torch.bfloat16}
    assert wide <= {IMAGES}
