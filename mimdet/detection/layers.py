"""Convolutions and batch norms of the detectors, and their initial weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from ..modeling.areas import ValidArea


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _SumOverProcesses(torch.autograd.Function):
    """Sum of a tensor over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total


class NaiveSyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics cover all processes, by differentiable all-reduce.

    Unlike ``nn.SyncBatchNorm`` it runs on CPU processes too and accepts an empty batch in a process.

    Args:
        num_features: channels.
        eps, momentum, affine, track_running_stats: as ``nn.BatchNorm2d``.
        stats_mode: "" gives every process the same weight, so all must have the same batch size; "N" weighs each by its
            number of rows, as ROI heads need. Maps with a valid area are weighted by its cells in both modes.

    Raises:
        ValueError: another ``stats_mode``; in training, fewer than two values a channel.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        stats_mode: str = "",
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        if stats_mode not in ("", "N"):
            raise ValueError(f'stats_mode must be "" or "N", got {stats_mode!r}')
        self.stats_mode = stats_mode

    def forward(self, x: torch.Tensor, area: ValidArea | None = None) -> torch.Tensor:
        """(N, C, H, W) -> (N, C, H, W). With ``area``, training statistics cover the valid area alone, and padding
        becomes zero."""
        if not self.training:
            return super().forward(x)
        if area is not None:
            return area.unpack(self._in_training(area.pack(x), by_cells=True))
        return self._in_training(x)

    def _in_training(self, x: torch.Tensor, by_cells: bool = False) -> torch.Tensor:
        world = _world_size()
        if world == 1:
            # BatchNorm rejects an empty batch, which happens when no proposal is foreground.
            return super().forward(x) if x.numel() else x * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)
        rows, _, height, width = x.shape
        weight = rows * height * width if by_cells else rows if self.stats_mode == "N" else 1
        return self._synced(x, float(weight))

    def _synced(self, x: torch.Tensor, weight: float) -> torch.Tensor:
        rows = x.shape[0]
        values = x.float()
        # All-reduce of sums, not means: an empty batch adds nothing. The variance is a second pass over x - mean.
        cells = x.shape[2] * x.shape[3]
        total = values.new_tensor([weight])
        scale = weight / max(rows * cells, 1)
        summed = _SumOverProcesses.apply(torch.cat([values.sum((0, 2, 3)) * scale, total]))
        count = summed[-1].detach()
        mean = summed[:-1] / count.clamp(min=1)
        x_centered = values - mean.view(1, -1, 1, 1)
        variance = _SumOverProcesses.apply(x_centered.square().sum((0, 2, 3)) * scale) / count.clamp(min=1)
        factor = self.momentum * (count > 0)
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor.to(self.running_mean.dtype))
            self.running_var.lerp_(variance.to(self.running_var.dtype), factor.to(self.running_var.dtype))
            self.num_batches_tracked.add_(1)
        gain = self.weight * (variance + self.eps).rsqrt()
        out = x_centered * gain.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)
        return out.to(x.dtype)


def normalize(norm: nn.Module, x: torch.Tensor, area: ValidArea | None = None) -> torch.Tensor:
    """``norm(x)`` of maps (B, C, H, W); with a valid area, its statistics cover that area alone.

    Values in the padding are arbitrary afterwards.
    """
    if isinstance(norm, NaiveSyncBatchNorm):
        return norm(x, area)
    if area is None or not area.padded:
        return norm(x)
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return area.join([norm(area.crop(x, i)) for i in range(len(x))])
    return area.unpack(norm(area.pack(x))) if norm.training else norm(x)


def get_norm(norm: str | Callable[[int], nn.Module] | None, channels: int) -> nn.Module | None:
    """A norm layer from its name in a config, a callable of the channel count, or None for none.

    Names: BN, SyncBN, naiveSyncBN, naiveSyncBN_N, GN (32 groups); "" is none.

    Raises:
        ValueError: unknown name.
    """
    if norm is None or norm == "":
        return None
    if callable(norm):
        return norm(channels)
    makers: dict[str, Callable[[int], nn.Module]] = {
        "BN": nn.BatchNorm2d,
        "SyncBN": NaiveSyncBatchNorm,
        "naiveSyncBN": NaiveSyncBatchNorm,
        "naiveSyncBN_N": lambda c: NaiveSyncBatchNorm(c, stats_mode="N"),
        "GN": lambda c: nn.GroupNorm(32, c),
    }
    if norm not in makers:
        raise ValueError(f"unknown norm {norm!r}; one of {', '.join(makers)}")
    return makers[norm](channels)


class Conv2d(nn.Conv2d):
    """``nn.Conv2d``, then ``norm`` and ``activation`` where there are any; the norm's keys are under ``norm.``.

    With the maps' valid area, the norm's statistics cover it alone, and the padding of the result is zero: the next
    convolution then reads the same zeros beyond an image as it reads beyond the map of that image alone.
    """

    def __init__(
        self,
        *args,
        norm: nn.Module | None = None,
        activation: Callable[[torch.Tensor], torch.Tensor] | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.norm = norm
        self.activation = activation

    def forward(self, x: torch.Tensor, area: ValidArea | None = None) -> torch.Tensor:
        x = super().forward(x)
        if self.norm is not None:
            x = normalize(self.norm, x, area)
        if self.activation is not None:
            x = self.activation(x)
        return x if area is None else area.zero_padding(x)


def xavier_fill(module: nn.Module) -> None:
    """Uniform weights of variance 1 / fan_in, zero bias (Caffe2's XavierFill, as FPN uses)."""
    nn.init.kaiming_uniform_(module.weight, a=1)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def msra_fill(module: nn.Module) -> None:
    """Normal weights of variance 2 / fan_out, zero bias (Caffe2's MSRAFill)."""
    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def normal_fill(module: nn.Module, std: float) -> None:
    """Normal weights with standard deviation ``std``, zero bias."""
    nn.init.normal_(module.weight, std=std)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
