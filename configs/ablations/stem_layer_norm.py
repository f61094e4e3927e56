"""MIMDet-Base whose ConvStem has LayerNorm and GELU, fused, in place of GroupNorm and GELU; not in the paper.

LayerNorm's statistics are of one cell, so padding and batch-mates do not enter them. The original's detectors were
trained with GroupNorm: do not load their weights into this one.
"""

from ..mimdet_b_mask_rcnn import dataloader, lr_multiplier, mae_checkpoint, model, optimizer, train

model.backbone.bottom_up.encoder.stem_norm = "layer"
train["output_dir"] = "output/ablations/stem_layer_norm"
