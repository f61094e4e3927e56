"""Parameter groups of the optimizer: MIMDet's three learning rates or one for all, and weight decay."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from omegaconf import DictConfig
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Adam, AdamW, Optimizer

from ..config import instantiate
from ..config.lazy import TARGET, resolve_target

_ENCODER = "backbone.bottom_up.encoder"
_CONV_STEM = _ENCODER + ".patch_embed"
_UPDATES = ("foreach", "capturable", "differentiable")  # arguments of Adam that exclude fused


def build_optimizer(cfg: DictConfig, model: nn.Module, scaled: bool = False) -> Optimizer:
    """The optimizer of a config's ``optimizer`` section, for a model.

    PyTorch's Adam and AdamW are ``fused`` unless the section says how they update: one pass over memory instead of
    about ten, which differs by rounding.

    Args:
        scaled: whether gradients are scaled (float16). Lightning Fabric cannot clip those of a fused optimizer.
    """
    params = instantiate(cfg.params, model=model)
    return instantiate(cfg, params=params, **({"fused": True} if not scaled and can_be_fused(cfg) else {}))


def can_be_fused(cfg: DictConfig) -> bool:
    """Whether an ``optimizer`` section names PyTorch's Adam or AdamW and does not say how they update."""
    return resolve_target(cfg[TARGET]) in (Adam, AdamW) and not {"fused", *_UPDATES} & set(cfg)


def get_fpn_model_parameters(
    model: nn.Module,
    weight_decay: float = 1e-5,
    weight_decay_norm: float | None = None,
    base_lr: float = 4e-5,
    skip_list: Collection[str] = (),
    multiplier: float = 1.5,
) -> list[dict[str, Any]]:
    """Optimizer parameter groups, in the order of their first parameters in the model.

    Learning rates: ``base_lr / multiplier`` for the pre-trained encoder, ``base_lr`` for its ConvStem,
    ``base_lr * multiplier`` for everything else. Vectors (biases, norm scales), names ending in ``.bias``
    and names in ``skip_list`` are not decayed. Frozen parameters are left out.

    Args:
        model: parameter names decide the group, so it must be the bare detector, not a wrapper.
        weight_decay: for matrices and convolution kernels.
        weight_decay_norm: for parameters of more than one dimension whose name contains ``norm``;
            None treats them as any other.
        base_lr: learning rate of the ConvStem.
        skip_list: full parameter names that are not decayed.
        multiplier: ratio between the learning rates.

    Returns:
        Dicts with ``params``, ``lr`` and ``weight_decay``, for ``torch.optim``.

    Raises:
        ValueError: the model has no trainable parameter.
    """
    skip = frozenset(skip_list)
    groups: dict[tuple[str, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim == 1 or name.endswith(".bias") or name in skip:
            decay = 0.0
        elif "norm" in name and weight_decay_norm is not None:
            decay = weight_decay_norm
        else:
            decay = weight_decay
        part, lr = _part(name, base_lr, multiplier)
        group = groups.setdefault((part, decay), {"params": [], "lr": lr, "weight_decay": decay})
        group["params"].append(parameter)
    if not groups:
        raise ValueError("the model has no trainable parameter: nothing to optimize")
    return list(groups.values())


def get_default_optimizer_params(
    model: nn.Module,
    weight_decay_norm: float | None = None,
    overrides: Mapping[str, Mapping[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """Optimizer parameter groups of one learning rate, one group for each set of other options.

    Biases are decayed as weights are. Frozen parameters are left out.

    Args:
        model: the bare detector.
        weight_decay_norm: for the parameters of batch, group and layer norms; None treats them as any other.
        overrides: options by the last part of a parameter's name: ``{"pos_embed": {"weight_decay": 0.0}}``.

    Returns:
        Dicts with ``params`` and the options, for ``torch.optim``.

    Raises:
        ValueError: the model has no trainable parameter, or an override matches none.
    """
    overrides = overrides or {}
    groups: dict[tuple, dict[str, Any]] = {}
    seen, named = set(), set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            named.add(name)
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            options: dict[str, float] = {}
            if weight_decay_norm is not None and isinstance(module, (_BatchNorm, nn.GroupNorm, nn.LayerNorm)):
                options["weight_decay"] = weight_decay_norm
            options |= overrides.get(name, {})
            group = groups.setdefault(tuple(sorted(options.items())), {"params": [], **options})
            group["params"].append(parameter)
    if unknown := sorted(set(overrides) - named):
        raise ValueError(f"optimizer.params.overrides: no parameter is called {', '.join(unknown)}")
    if not groups:
        raise ValueError("the model has no trainable parameter: nothing to optimize")
    return list(groups.values())


def _part(name: str, base_lr: float, multiplier: float) -> tuple[str, float]:
    if name.startswith(_CONV_STEM):
        return "conv_stem", base_lr
    if name.startswith(_ENCODER):
        return "encoder", base_lr / multiplier
    return "others", base_lr * multiplier
