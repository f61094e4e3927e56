"""One decoder block (paper, Table 7 and Table 8, row 2)."""

from .table6_mask_token import dataloader, lr_multiplier, mae_checkpoint, model, optimizer, train

model.backbone.bottom_up.decoder.depth = 1
train["output_dir"] = "output/ablations/table7_decoder_1"
