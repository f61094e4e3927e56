"""Six more epochs on all tokens after the 36 on half of them (paper, Table 2).

The paper names no schedule for them: learning rate, warmup and steps are those of the first stage, in a sixth of its
iterations. `train.init_checkpoint` is the result of the first stage.
"""

from .table6_mask_token import dataloader, lr_multiplier, mae_checkpoint, model, optimizer, train

_EPOCHS = 6

model.backbone.bottom_up.sample_ratio = 1.0
_scheduler = lr_multiplier.scheduler
_scheduler.update(
    milestones=[n * _EPOCHS // 36 for n in _scheduler.milestones],
    num_updates=_scheduler.num_updates * _EPOCHS // 36,
)
lr_multiplier.warmup_length = 0.25 / _EPOCHS
train["max_iter"] = train["max_iter"] * _EPOCHS // 36
train["init_checkpoint"] = "output/ablations/table6_mask_token/model_final.pth"
train["output_dir"] = "output/ablations/table2_full_set"
