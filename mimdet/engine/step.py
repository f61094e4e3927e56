"""One training step, and what the host reads of it: later, so that nothing waits for the GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from torch import nn
from torch.optim import Optimizer

from ..kernels.tensors import HostCopy
from .weight_casts import WeightCasts


class NonFiniteLossError(FloatingPointError):
    """A loss, the gradient or a weight became NaN or infinite."""


class TrainStep:
    """Forward, backward and update.

    The first step with a loss or a gradient that is NaN or infinite, on any process, is the last that computes: it and
    all steps after it change neither weights nor moments. PyTorch's fused optimizers see that on the GPU; for others
    the step waits for the GPU.

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
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.broken = torch.zeros((), device=fabric.device)
        self._casts = WeightCasts(model)
        self._fused = getattr(optimizer.optimizer, "_step_supports_amp_scaling", False)  # as GradScaler asks
        # float16: an infinite gradient is usual then, and lowers GradScaler's scale.
        self._scaled = bool(fabric.strategy.precision.state_dict())

    def __call__(self, batch: Sequence[Mapping[str, Any]], stop: Callable[[], bool] = lambda: False) -> StepReport:
        """Train on this process's samples.

        Args:
            stop: whether this process requests to stop; asked after the backward pass.
        """
        with self._casts.step():
            losses = self.model(*inputs_of(batch, self.model, self.fabric.device))
            self.optimizer.zero_grad()
            total = sum(losses.values())
            self._casts.learn(total)
            self.fabric.backward(total)
        finite = total.detach() if self._scaled else total.detach() + self._gradient_norm()
        values = torch.stack([*(loss.detach().float() for loss in losses.values()), (~finite.isfinite()).float()])
        report = StepReport(tuple(losses), values, batch, stop(), self.fabric.world_size)
        self.broken = torch.maximum(self.broken, (report.broken > 0).float())
        self._update()
        return report

    def _gradient_norm(self) -> torch.Tensor:
        """Norm of the gradient before it is clipped."""
        if self.clip_grad_norm:
            return self.fabric.clip_gradients(
                self.model, self.optimizer, max_norm=self.clip_grad_norm, error_if_nonfinite=False
            )
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return nn.utils.get_total_norm(gradients, foreach=self.fabric.device.type in ("cpu", "cuda"))

    def _update(self) -> None:
        if self._scaled:
            self.optimizer.step()
            return
        if self._fused:
            self.optimizer.optimizer.found_inf = self.broken
        elif self.broken:
            return
        self.optimizer.step()


class StepReport:
    """A step's losses and stop requests on their way to the host.

    Args:
        names: of the losses.
        values: on the device, this process's losses and 1 if one of them or the gradient is not finite, else 0.
        batch: this process's samples.
        stop: this process's request to stop.
        world_size: processes, which all report a step together.
    """

    def __init__(
        self,
        names: Sequence[str],
        values: torch.Tensor,
        batch: Sequence[Mapping[str, Any]],
        stop: bool,
        world_size: int,
    ):
        self.names = names
        self.world_size = world_size
        self.images = ", ".join(f"{sample.get('image_id')} ({sample.get('file_name')})" for sample in batch)
        every = torch.cat([values, torch.full((1,), float(stop), device=values.device)])
        if world_size > 1:
            dist.all_reduce(every)
        self.broken = every[-2]
        self._numbers = HostCopy(torch.cat([every, values]))

    def read(self, iteration: int) -> tuple[dict[str, float], bool]:
        """Losses, means over the processes, and whether any process has requested to stop; waits for the step.

        Raises:
            NonFiniteLossError: a loss or the gradient is NaN or infinite on any process; the message of that process
                names the loss and the images.
        """
        numbers, count = self._numbers.tolist(), len(self.names)
        broken, stop, *local = numbers[count:]
        if broken:
            raise NonFiniteLossError(f"iteration {iteration}: {self._explain(numbers[:count], local)}")
        losses = {name: value / self.world_size for name, value in zip(self.names, numbers, strict=False)}
        return losses, stop > 0

    def _explain(self, losses: Sequence[float], local: Sequence[float]) -> str:
        bad = [f"{name} is {value}" for name, value in zip(self.names, local, strict=False) if not math.isfinite(value)]
        if not bad and not all(map(math.isfinite, losses)):
            return "a loss is not finite on another process, see its message"
        return f"{' and '.join(bad) or 'the gradient is NaN or infinite'}, on the images {self.images}"


def inputs_of(
    batch: Sequence[Mapping[str, Any]], model: nn.Module, device: torch.device
) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    """Images and targets of samples, on the device unless the model has ``moves_data``."""
    if not getattr(getattr(model, "module", model), "moves_data", False):
        batch = [_moved(sample, device) for sample in batch]
    return [sample["image"] for sample in batch], [sample.get("targets", {}) for sample in batch]


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
