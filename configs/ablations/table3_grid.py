"""Trained on every other token, as on a checkerboard, tested on all (paper, Table 3)."""

from .table6_mask_token import dataloader, lr_multiplier, mae_checkpoint, model, optimizer, train

model.backbone.bottom_up.sampling = "grid"
train["output_dir"] = "output/ablations/table3_grid"
