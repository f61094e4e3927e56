"""Benchmarking-ViT-Base (Li et al., 2021), Mask R-CNN, large-scale jitter at 1024 pixels; `num_epochs` sets the length.

Only the encoder of MAE's file, `mae_checkpoint.path`, is loaded.
"""

import torch

from mimdet.config import LazyCall as L
from mimdet.data import FixedSizeCrop, RandomFlip, ResizeScale, ResizeShortestEdge
from mimdet.engine import CosineParamScheduler, WarmupParamScheduler, get_default_optimizer_params
from mimdet.modeling import BenchmarkingViTDet

from .coco import dataloader
from .mask_rcnn import model
from .schedule import train

_SIDE = "${model.backbone.bottom_up.img_size}"
_ITERATIONS = 184_375  # 100 epochs of 118,000 images at batch 64

model.backbone.bottom_up = L(BenchmarkingViTDet)(
    window_size=16,
    with_cp=False,
    pretrained="${mae_checkpoint.path}",
    stop_grad_conv1=False,
    sincos_pos_embed=True,
    zero_pos_embed=False,
    img_size=1024,
    patch_size=16,
    embed_dim=768,
    depth=12,
    num_heads=12,
    drop_path_rate=0.1,
    init_values=None,
    beit_qkv_bias=False,
    recompute="lean",
)
model.backbone.in_features = ["s0", "s1", "s2", "s3"]
model.lsj_postprocess = True

dataloader.train.mapper.augmentations = [
    L(ResizeScale)(min_scale=0.1, max_scale=2.0, target_height=_SIDE, target_width=_SIDE),
    L(FixedSizeCrop)(crop_size=[_SIDE, _SIDE]),
    L(RandomFlip)(horizontal=True),
]
dataloader.train.mapper.recompute_boxes = True
dataloader.test.mapper.augmentations = [
    L(ResizeShortestEdge)(short_edge_length=_SIDE, max_size=_SIDE),
    L(FixedSizeCrop)(crop_size=[_SIDE, _SIDE]),
]

optimizer = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(
        weight_decay_norm=0.0,
        overrides={"pos_embed": {"weight_decay": 0.0}, "relative_position_bias_table": {"weight_decay": 0.0}},
    ),
    lr=8e-5,
    betas=(0.9, 0.999),
    weight_decay=0.1,
)

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
    warmup_length=None,
    warmup_factor=0.001,
)

train.update(eval_period=1844)
train["checkpointer"] = dict(period=1844, max_to_keep=100)


def num_epochs(epochs):
    """Train for ``epochs`` epochs, the first quarter epoch with warmup."""
    train.update(max_iter=_ITERATIONS * epochs // 100, output_dir=f"output/benchmarking_b_{epochs}ep")
    lr_multiplier.warmup_length = 0.25 / epochs
