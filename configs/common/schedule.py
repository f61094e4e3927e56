"""36 epochs of 120,000 images at batch 64: AdamW, a quarter epoch of warmup, steps at epochs 27 and 33."""

import torch

from mimdet.config import LazyCall as L
from mimdet.engine import MultiStepParamScheduler, WarmupParamScheduler, get_fpn_model_parameters

_EPOCH = 120_000 // 64

train = dict(
    output_dir="output",
    init_checkpoint="",
    init_checkpoint_ignore=[],
    max_iter=36 * _EPOCH,
    # Batch size of the learning rate and iterations in this config; other batch sizes scale them.
    reference_batch_size=64,
    seed=0,
    device="auto",
    amp=dict(enabled=True, dtype="auto"),
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=True),
    clip_grad_norm=None,
    checkpointer=dict(period=_EPOCH, max_to_keep=100),
    eval_period=_EPOCH,
    log_period=20,
)

optimizer = L(torch.optim.AdamW)(
    params=L(get_fpn_model_parameters)(
        weight_decay=0.1,
        weight_decay_norm=0.0,
        base_lr="${..lr}",
        skip_list=("pos_embed", "decoder_pos_embed"),
        multiplier=2.0,
    ),
    lr=8e-5,
    betas=(0.9, 0.999),
    weight_decay=0.1,
)

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01],
        milestones=[27 * _EPOCH, 33 * _EPOCH],
        num_updates=36 * _EPOCH,
    ),
    warmup_length=0.25 / 36,
    warmup_factor=0.0,
)

mae_checkpoint = dict(path=None)
