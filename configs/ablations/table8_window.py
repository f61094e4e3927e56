"""No sampling and no decoder: attention in windows of 7x7 tokens in every block (paper, Table 8, row 3).

The encoder's output is c4. Windows at the right and lower edge are smaller where the grid ends; nothing is padded.
"""

from .table6_mask_token import dataloader, lr_multiplier, mae_checkpoint, model, optimizer, train

model.backbone.bottom_up.encoder.window = 7
model.backbone.bottom_up.update(decoder=None, sample_ratio=1.0, _out_feature_channels=[192, 384, 768, 768])
train["output_dir"] = "output/ablations/table8_window"
