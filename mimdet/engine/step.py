"""One training step, and the synchronization that reads its losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn
from torch.optim import Optimizer


class NonFiniteLossError(FloatingPointError):
    """A loss or a weight became NaN or infinite."""


class TrainStep:
    """Forward, backward and update.

    Args:
        fabric: device and precision.
        model, optimizer: as returned by ``fabric.setup``.
        clip_grad_norm: largest norm of the gradient; None does not clip.
    """

    def __init__(self, fabric: Fabric, model: nn.Module, optimizer: Optimizer, clip_grad_norm: float | None = None):
        self.fabric = fabric
        self.model = model
        self.optimizer = optimizer
        self.clip_grad_norm = clip_grad_norm

    def __call__(self, batch: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Train on this process's samples; returns its losses, detached scalars on the device."""
        device = self.fabric.device
        images = [sample["image"].to(device, non_blocking=True) for sample in batch]
        targets = [
            {
                key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
                for key, value in sample["targets"].items()
            }
            for sample in batch
        ]
        losses = self.model(images, targets)
        self.optimizer.zero_grad()
        self.fabric.backward(sum(losses.values()))
        if self.clip_grad_norm:
            self.fabric.clip_gradients(
                self.model, self.optimizer, max_norm=self.clip_grad_norm, error_if_nonfinite=False
            )
        self.optimizer.step()
        return {name: loss.detach() for name, loss in losses.items()}


def read_losses(
    fabric: Fabric, losses: Mapping[str, torch.Tensor], stop: bool, batch: Sequence[Mapping[str, Any]], iteration: int
) -> tuple[dict[str, float], bool]:
    """Losses as numbers, means over the processes, and whether any process has a stop request.

    This is the only synchronization with the device in a step.

    Raises:
        NonFiniteLossError: a loss is NaN or infinite on any process; the message of that process names the loss and the
            images.
    """
    values = torch.stack([loss.float() for loss in losses.values()])
    local = values
    if fabric.world_size > 1:
        values = torch.cat([values, values.new_tensor([float(stop)])])
        *values, votes = fabric.all_reduce(values.clone(), reduce_op="mean").tolist()
        stop = votes > 0
    else:
        values = values.tolist()
    if not all(map(math.isfinite, values)):
        raise NonFiniteLossError(_explain(dict(zip(losses, local.tolist(), strict=True)), batch, iteration))
    return dict(zip(losses, values, strict=True)), stop


def _explain(losses: Mapping[str, float], batch: Sequence[Mapping[str, Any]], iteration: int) -> str:
    bad = [f"{name} is {value}" for name, value in losses.items() if not math.isfinite(value)]
    if not bad:
        return f"iteration {iteration}: a loss is not finite on another process, see its message"
    images = ", ".join(f"{sample['image_id']} ({sample['file_name']})" for sample in batch)
    return f"iteration {iteration}: {' and '.join(bad)}, on the images {images}"
