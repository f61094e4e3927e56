"""Two decoder blocks (paper, Table 7)."""

from .table6_mask_token import dataloader, lr_multiplier, mae_checkpoint, model, optimizer, train

model.backbone.bottom_up.decoder.depth = 2
train["output_dir"] = "output/ablations/table7_decoder_2"
