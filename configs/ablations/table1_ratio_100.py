"""Trained and tested on all tokens (paper, Table 1)."""

from .table6_mask_token import dataloader, lr_multiplier, mae_checkpoint, model, optimizer, train

model.backbone.bottom_up.sample_ratio = 1.0
train["output_dir"] = "output/ablations/table1_ratio_100"
