"""A detector of one encoder block, for tests of the experiments."""

CONFIG = "mimdet_tiny_mask_rcnn"
BOTTOM_UP = "model.backbone.bottom_up"
OVERRIDES = (
    f"{BOTTOM_UP}.encoder.depth=1",
    f"{BOTTOM_UP}.encoder.embed_dim=64",
    f"{BOTTOM_UP}.encoder.num_heads=2",
    f"{BOTTOM_UP}.decoder.decoder_embed_dim=32",
    f"{BOTTOM_UP}._out_feature_channels=[16,32,32,32]",
)
