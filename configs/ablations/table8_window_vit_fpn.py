"""As `table8_window.py`, with c2 and c3 from the ViT's own features (paper, Table 8, row 4).

They come from blocks 3 and 6 of 12, by transposed convolutions (Li et al., 2021). Parameters: 120.7 M; the paper
rounds down to 120, and 127.95 to 127.
"""

from mimdet.config import LazyCall as L
from mimdet.modeling import UpsampledTokens

from .table8_window import dataloader, lr_multiplier, mae_checkpoint, model, optimizer, train

model.backbone.bottom_up.encoder.taps = [3, 6]
model.backbone.bottom_up.pyramid = L(UpsampledTokens)(embed_dim="${..encoder.embed_dim}")
model.backbone.bottom_up._out_feature_channels = [768, 768, 768, 768]
train["output_dir"] = "output/ablations/table8_window_vit_fpn"
