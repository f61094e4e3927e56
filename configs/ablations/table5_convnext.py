"""ConvNeXt-Large's first two stages for the ConvStem (paper, Table 5).

From random weights, or from ImageNet's with `model.backbone.bottom_up.encoder.stem_pretrained=PATH`, a file written by
`torch.save(timm.create_model("convnext_large", pretrained=True).state_dict(), PATH)`.
The features of stride 16 come from the downsampling that begins ConvNeXt's third stage.
"""

from .table6_mask_token import dataloader, lr_multiplier, mae_checkpoint, model, optimizer, train

model.backbone.bottom_up.encoder.stem = "convnext"
train["output_dir"] = "output/ablations/table5_convnext"
