"""Benchmarking-ViT-Base, Mask R-CNN, 25 epochs on COCO (Li et al., 2021)."""

from .common.benchmarking import dataloader, lr_multiplier, model, num_epochs, optimizer, train
from .common.schedule import mae_checkpoint

num_epochs(25)
