"""The demo's MIMDet with RetinaNet, which predicts boxes alone."""

from .common.retinanet import model as _retinanet
from .demo import dataloader, lr_multiplier, mae_checkpoint, optimizer, train
from .demo import model as _demo

model = _retinanet
model.backbone.update(bottom_up=_demo.backbone.bottom_up, out_channels=64)
model.num_classes = 4
# GroupNorm: without it, so narrow a tower with initial weights of std 0.01 outputs almost zero.
model.head.update(conv_dims=[64, 64], norm="GN")
model.anchor_generator.sizes = [[x, x * 2 ** (1 / 3), x * 2 ** (2 / 3)] for x in (16, 32, 64, 96, 128)]
for _part in (dataloader.train, dataloader.test):
    _part.dataset.use_masks = False
dataloader.train.mapper.use_instance_mask = False
train["output_dir"] = "output/demo_retinanet"
