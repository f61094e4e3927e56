"""Trained on 75% of the tokens, tested on all (paper, Table 1).

The row's other columns: `--eval-only model.backbone.bottom_up.inference_sample_ratio=RATIO`.
"""

from .table6_mask_token import dataloader, lr_multiplier, mae_checkpoint, model, optimizer, train

model.backbone.bottom_up.sample_ratio = 0.75
train["output_dir"] = "output/ablations/table1_ratio_75"
