"""`ablations/table5_convnext.py` with Detectron2's heads, data, evaluator and trainer."""

from mimdet.detectron2 import use_detectron2

from ...ablations.table5_convnext import dataloader, lr_multiplier, mae_checkpoint, model, optimizer, train

use_detectron2(model, dataloader, lr_multiplier, train)

__all__ = ["dataloader", "lr_multiplier", "mae_checkpoint", "model", "optimizer", "train"]
