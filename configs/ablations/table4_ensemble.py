"""Tested in four passes over half of the tokens each, detections merged (paper, Table 4).

Training is that of `table6_mask_token.py`, whose result is tested. Other rows: `model.inference.passes=1`, `2` or `8`.
"""

from .table6_mask_token import dataloader, lr_multiplier, mae_checkpoint, model, optimizer, train

model.inference.update(passes=4, ratio=0.5)
train["output_dir"] = "output/ablations/table4_ensemble"
