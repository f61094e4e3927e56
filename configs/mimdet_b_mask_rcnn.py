"""MIMDet-Base, Mask R-CNN, 36 epochs on COCO (paper, Table 9)."""

from .common.backbone import bottom_up as _bottom_up
from .common.coco import dataloader
from .common.mask_rcnn import model
from .common.schedule import lr_multiplier, mae_checkpoint, optimizer, train

model.backbone.bottom_up = _bottom_up
train["output_dir"] = "output/mimdet_b_mask_rcnn"
