"""MIMDet-Large, Mask R-CNN, 36 epochs on COCO (paper, Table 9)."""

from .mimdet_b_mask_rcnn import dataloader, lr_multiplier, mae_checkpoint, model, optimizer, train

model.backbone.bottom_up.encoder.update(embed_dim=1024, depth=24, num_heads=16, dpr=0.4)
model.backbone.bottom_up._out_feature_channels = [256, 512, 512, 512]
optimizer.params.multiplier = 3.5
train["output_dir"] = "output/mimdet_l_mask_rcnn"
