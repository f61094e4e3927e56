"""A MIMDet small enough to learn generated shapes from scratch on two CPU cores in a few minutes."""

from mimdet.config import LazyCall as L
from mimdet.data import RandomFlip, ResizeShortestEdge

from .mimdet_tiny_mask_rcnn import dataloader, lr_multiplier, mae_checkpoint, model, optimizer, train

_ITERATIONS = 800

model.backbone.bottom_up.encoder.img_size = 192
model.backbone.out_channels = 64
model.proposal_generator.anchor_generator.sizes = [[16], [32], [64], [96], [128]]
model.proposal_generator.update(batch_size_per_image=128, pre_nms_topk=(400, 300), post_nms_topk=(200, 200))
model.roi_heads.update(num_classes=4, batch_size_per_image=48)
model.roi_heads.box_pooler.sampling_ratio = model.roi_heads.mask_pooler.sampling_ratio = 1
model.roi_heads.box_head.update(conv_dims=[64, 64], fc_dims=[256])
model.roi_heads.mask_head.conv_dims = [64, 64, 64]

dataloader.train.dataset.update(
    json_file="${train.output_dir}/shapes/annotations/instances_train.json",
    image_root="${train.output_dir}/shapes/train",
)
dataloader.test.dataset.update(
    json_file="${train.output_dir}/shapes/annotations/instances_val.json",
    image_root="${train.output_dir}/shapes/val",
)
dataloader.train.mapper.augmentations = [
    L(RandomFlip)(horizontal=True),
    L(ResizeShortestEdge)(short_edge_length=(128, 144, 160), max_size=256, sample_style="choice"),
]
dataloader.test.mapper.augmentations = [L(ResizeShortestEdge)(short_edge_length=160, max_size=256)]
dataloader.train.update(total_batch_size=4, num_workers=0)
dataloader.test.num_workers = 0

optimizer.lr = 2e-3
train.update(
    output_dir="output/demo",
    reference_batch_size=4,
    max_iter=_ITERATIONS,
    eval_period=_ITERATIONS // 4,
    log_period=10,
    amp=dict(enabled=False, dtype="auto"),
)
train["checkpointer"] = dict(period=_ITERATIONS // 4, max_to_keep=1)
