"""MIMDet's backbone with ViT-Base."""

from functools import partial

from torch import nn

from mimdet.config import LazyCall as L
from mimdet.modeling import MIMDetBackbone, MIMDetDecoder, MIMDetEncoder

bottom_up = L(MIMDetBackbone)(
    encoder=L(MIMDetEncoder)(
        img_size=800,
        patch_size=16,
        in_chans=3,
        embed_dim=768,
        depth=12,
        num_heads=12,
        mlp_ratio=4.0,
        dpr=0.1,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
        pretrained="${mae_checkpoint.path}",
        checkpointing="auto",
        recompute="auto",
        stem="conv",
        stem_pretrained=None,
        window=None,
        taps=[],
    ),
    decoder=L(MIMDetDecoder)(
        img_size="${..encoder.img_size}",
        patch_size="${..encoder.patch_size}",
        embed_dim="${..encoder.embed_dim}",
        decoder_embed_dim=512,
        depth=4,
        num_heads=16,
        mlp_ratio=4.0,
        norm_layer=nn.LayerNorm,
        pretrained="${..encoder.pretrained}",
        checkpointing="${..encoder.checkpointing}",
        recompute="${..encoder.recompute}",
        fill="conv_stem",
    ),
    sample_ratio=0.5,
    inference_sample_ratio=1.0,
    batch_mode="canvas",
    sampling="random",
    pyramid=None,
    size_divisibility=32,
    _out_feature_channels=[192, 384, 512, 512],
    _out_feature_strides=[4, 8, 16, 32],
)
