"""Build a config's detector."""

from __future__ import annotations

import copy

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from ..config import instantiate

_PRETRAINED = ("pretrained", "stem_pretrained")  # arguments that name files of pre-trained weights


def build_model(cfg: DictConfig, pretrained: bool = True) -> nn.Module:
    """The config's model in channels_last memory, which the convolutions want.

    Without ``pretrained`` no file is read, for other weights will replace those of pre-trained parts: the arguments
    ``pretrained`` and ``stem_pretrained`` of every part, and ``mae_checkpoint.path``, are taken as None.
    """
    if not pretrained:
        cfg = copy.deepcopy(cfg)
        OmegaConf.set_readonly(cfg, False)
        _empty_pretrained(cfg.model)
        if OmegaConf.select(cfg, "mae_checkpoint.path") is not None:
            cfg.mae_checkpoint.path = None
    return instantiate(cfg.model).to(memory_format=torch.channels_last)


def _empty_pretrained(node: DictConfig | ListConfig) -> None:
    for key in range(len(node)) if isinstance(node, ListConfig) else list(node):
        if key in _PRETRAINED:
            node[key] = None
            continue
        if not (OmegaConf.is_interpolation(node, key) or OmegaConf.is_missing(node, key)):
            child = node[key]
            if isinstance(child, (DictConfig, ListConfig)):
                _empty_pretrained(child)
