"""Convolutions and batch norms of the detectors, and their initial weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ..kernels import batch_norm
from ..modeling.areas import ValidArea


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` as one operation, with the ReLU that follows it, over valid cells alone."""

    def forward(
        self,
        x: torch.Tensor,
        area: ValidArea | None = None,
        *,
        valid: torch.Tensor | None = None,
        relu: bool = False,
    ) -> torch.Tensor:
        """(N, C, H, W) -> the same, behind a ReLU if asked.

        Training statistics are those of the cells in ``area`` and of the maps that ``valid`` (N,) bool names, if
        given; all else becomes zero.

        Raises:
            ValueError: training on one value a channel.
        """
        if area is not None and self.training and area.cell_count == 1 and self._processes() == 1:
            raise ValueError("Expected more than 1 value per channel when training, the valid area has one cell")
        tracked = not self.training or self.track_running_stats
        return batch_norm(
            x,
            self.weight,
            self.bias,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.num_batches_tracked if tracked else None,
            training=self.training or self.running_mean is None,
            momentum=self.momentum,
            eps=self.eps,
            relu=relu,
            sizes=area.cells if area is not None and area.padded else None,
            valid=valid,
            sync=self._processes() > 1,
            weigh=self._weigh(area),
        )

    def _processes(self) -> int:
        """How many share training statistics."""
        return 1

    def _weigh(self, area: ValidArea | None) -> str:
        """What a process counts by in them."""
        return "cells"


class NaiveSyncBatchNorm(BatchNorm2d):
    """BatchNorm2d whose training statistics cover all processes.

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

    def _processes(self) -> int:
        shared = self.training and dist.is_available() and dist.is_initialized()
        return dist.get_world_size() if shared else 1

    def _weigh(self, area: ValidArea | None) -> str:
        return "cells" if area is not None else "maps" if self.stats_mode == "N" else "processes"


def normalize(norm: nn.Module, x: torch.Tensor, area: ValidArea | None = None) -> torch.Tensor:
    """``norm(x)`` of maps (B, C, H, W); with a valid area, its statistics cover that area alone.

    Values in the padding are arbitrary afterwards.
    """
    if isinstance(norm, BatchNorm2d):
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
        "BN": BatchNorm2d,
        "SyncBN": NaiveSyncBatchNorm,
        "naiveSyncBN": NaiveSyncBatchNorm,
        "naiveSyncBN_N": lambda c: NaiveSyncBatchNorm(c, stats_mode="N"),
        "GN": lambda c: nn.GroupNorm(32, c),
    }
    if norm not in makers:
        raise ValueError(f"unknown norm {norm!r}; one of {', '.join(makers)}")
    return makers[norm](channels)


def knows_valid_maps(head: nn.Module) -> bool:
    """Whether a head takes ``valid``, and all its batch norms can leave maps out of their statistics."""
    norms = [module for module in head.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return "valid" in inspect.signature(head.forward).parameters and all(isinstance(m, BatchNorm2d) for m in norms)


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

    def forward(
        self, x: torch.Tensor, area: ValidArea | None = None, valid: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(N, C, H, W) -> (N, C', H', W'); maps that ``valid`` (N,) bool does not name become zero.

        Raises:
            ValueError: ``valid`` with a batch norm of another class than ``BatchNorm2d`` of this module.
        """
        x = super().forward(x)
        activation = self.activation
        if isinstance(self.norm, BatchNorm2d):
            relu = activation is F.relu
            x = self.norm(x, area, valid=valid, relu=relu)
            if relu or activation is None:
                return x
        elif self.norm is not None:
            if valid is not None and isinstance(self.norm, nn.modules.batchnorm._BatchNorm):
                raise ValueError(f"{type(self.norm).__name__} does not know valid maps; use BN, SyncBN or naiveSyncBN")
            x = normalize(self.norm, x, area)
        if activation is not None:
            x = activation(x)
        if valid is not None:
            x = x.masked_fill(~valid.view(-1, 1, 1, 1), 0.0)
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
