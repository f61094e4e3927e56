"""MIMDet-Base whose decoder gets MAE's [MASK] token at unsampled positions (paper, Table 6).

The other ablations start from this config: the default in their tables has this row's 51.5 / 46.0 AP. With ConvStem
features instead, `model.backbone.bottom_up.decoder.fill=conv_stem`, it is 51.7 / 46.1.
"""

from ..mimdet_b_mask_rcnn import dataloader, lr_multiplier, mae_checkpoint, model, optimizer, train

model.backbone.bottom_up.decoder.fill = "mask_token"
train["output_dir"] = "output/ablations/table6_mask_token"
