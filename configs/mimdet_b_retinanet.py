"""MIMDet-Base, RetinaNet, 36 epochs on COCO (paper, Table 11). Annotations need no masks."""

from .common.backbone import bottom_up as _bottom_up
from .common.coco import dataloader
from .common.retinanet import model
from .common.schedule import lr_multiplier, mae_checkpoint, optimizer, train

model.backbone.bottom_up = _bottom_up
for _part in (dataloader.train, dataloader.test):
    _part.dataset.use_masks = False
dataloader.train.mapper.use_instance_mask = False
train["output_dir"] = "output/mimdet_b_retinanet"
