"""The native config of the same name, with Detectron2's heads, data, evaluator and trainer.

Every file of ``configs/detectron2`` is a link to this one.
"""

from mimdet.detectron2 import from_native

dataloader, lr_multiplier, mae_checkpoint, model, optimizer, train = from_native(__file__)
