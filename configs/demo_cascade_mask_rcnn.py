"""The demo's MIMDet with Cascade Mask R-CNN's three box heads."""

from .common.cascade_mask_rcnn import use_cascade
from .demo import dataloader, lr_multiplier, mae_checkpoint, model, optimizer, train

use_cascade(model)
for _head in model.roi_heads.box_heads:
    _head.update(conv_dims=[64, 64], fc_dims=[256])
train["output_dir"] = "output/demo_cascade_mask_rcnn"
