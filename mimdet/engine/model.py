"""Build a config's detector."""

from __future__ import annotations

import copy

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from ..config import instantiate

_PRETRAINED = ("pretrained", "stem_pretrained")  # arguments that name files of pre-trained weights


def build_model(cfg: DictConfig, pretrained: bool = True) -> nn.Module:
    """The config's model in channels_last memory, which is faster for convolutions.

    Without ``pretrained`` no file is read: ``mae_checkpoint.path`` and the arguments ``pretrained`` and
    ``stem_pretrained`` of every part become None. The caller loads other weights.
    """
    if not pretrained:
        cfg = copy.deepcopy(cfg)
        OmegaConf.set_readonly(cfg, False)
        _clear_pretrained(cfg.model)
        if OmegaConf.select(cfg, "mae_checkpoint.path") is not None:
            cfg.mae_checkpoint.path = None
    return instantiate(cfg.model).to(memory_format=torch.channels_last)


def _clear_pretrained(node: DictConfig | ListConfig) -> None:
    for key in range(len(node)) if isinstance(node, ListConfig) else list(node):
        if key in _PRETRAINED:
            node[key] = None
            continue
        if not (OmegaConf.is_interpolation(node, key) or OmegaConf.is_missing(node, key)):
            child = node[key]
            if isinstance(child, (DictConfig, ListConfig)):
                _clear_pretrained(child)
