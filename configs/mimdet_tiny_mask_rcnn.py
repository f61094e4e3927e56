"""A small MIMDet for trying things on real images without a GPU or pre-trained weights."""

from mimdet.config import LazyCall as L
from mimdet.data import RandomFlip, ResizeShortestEdge
from mimdet.engine import CosineParamScheduler

from .common.backbone import bottom_up as _bottom_up
from .common.coco import dataloader
from .common.mask_rcnn import model
from .common.schedule import lr_multiplier, mae_checkpoint, optimizer, train

model.backbone.bottom_up = _bottom_up
model.backbone.bottom_up.encoder.update(img_size=512, embed_dim=192, depth=4, num_heads=3, checkpointing=False)
model.backbone.bottom_up.decoder.update(decoder_embed_dim=128, depth=2, num_heads=4)
model.backbone.bottom_up._out_feature_channels = [48, 96, 128, 128]
model.backbone.out_channels = 128
model.proposal_generator.anchor_generator.sizes = [[16], [32], [64], [128], [256]]
model.proposal_generator.head.conv_dims = [-1]
model.proposal_generator.update(pre_nms_topk=(1000, 500), post_nms_topk=(500, 500))
model.roi_heads.batch_size_per_image = 128
model.roi_heads.box_head.update(conv_dims=[128, 128], fc_dims=[512])
model.roi_heads.mask_head.conv_dims = [128, 128, 128]

dataloader.train.mapper.augmentations = [
    L(RandomFlip)(horizontal=True, prob=0.5),
    L(ResizeShortestEdge)(short_edge_length=(288, 320, 352, 384), max_size=512, sample_style="choice"),
]
dataloader.test.mapper.augmentations = [L(ResizeShortestEdge)(short_edge_length=352, max_size=512)]
dataloader.train.update(total_batch_size=2, num_workers=2)
dataloader.test.num_workers = 2

# Nothing is pre-trained here, so all parts learn at one rate.
optimizer.lr = 1e-3
optimizer.params.multiplier = 1.0
lr_multiplier.warmup_length = 0.05
lr_multiplier.scheduler = L(CosineParamScheduler)(start_value=1.0, end_value=0.0)
train.update(output_dir="output/mimdet_tiny_mask_rcnn", reference_batch_size=2, max_iter=1000, eval_period=500)
train["checkpointer"] = dict(period=500, max_to_keep=2)
