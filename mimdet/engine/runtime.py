"""Device, precision and processes of a run: one CPU or GPU, or several under torchrun."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision, Precision
from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning_fabric.strategies import DDPStrategy, SingleDeviceStrategy
from omegaconf import DictConfig
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

_DDP_ARGUMENTS = inspect.signature(DistributedDataParallel.__init__).parameters
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Autocast(MixedPrecision):
    """Mixed precision that does not cast inputs and outputs.

    Fabric's casts every floating input, and a box coordinate in bfloat16 is off by pixels.
    """

    def convert_input(self, data: Any) -> Any:
        return data

    def convert_output(self, data: Any) -> Any:
        return data


class _DDP(DDPStrategy):
    """DDP with an optional communication hook, which compresses gradients."""

    def __init__(self, hook: Callable | None, **kwargs: Any):
        super().__init__(**kwargs)
        self._hook = hook

    def setup_module(self, module: nn.Module) -> DistributedDataParallel:
        wrapped = super().setup_module(module)
        if self._hook is not None:
            wrapped.register_comm_hook(None, self._hook)
        return wrapped


def build_fabric(train: DictConfig) -> Fabric:
    """Fabric for the ``train`` section of a config, with the process group initialized.

    One process needs no launcher. Several must be started by torchrun (or another launcher that sets RANK,
    WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    Raises:
        RuntimeError: the device does not exist, or this machine has fewer GPUs than processes.
        ValueError: ``train.device`` or ``train.amp.dtype`` is unknown, or not supported here.
    """
    device = choose_device(train.get("device", "auto"))
    dtype = choose_amp_dtype(train.amp, device)
    precision = Precision()
    if dtype is not None:
        name = "bf16-mixed" if dtype == torch.bfloat16 else "16-mixed"
        precision = Autocast(name, device.type)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        strategy = SingleDeviceStrategy(device=device, precision=precision)
        fabric = Fabric(accelerator=device.type, strategy=strategy, devices=1, plugins=[LightningEnvironment()])
    else:
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        if device.type == "cuda" and per_node > torch.cuda.device_count():
            raise RuntimeError(
                f"{per_node} processes on this machine but {torch.cuda.device_count()} GPUs: start one process a GPU"
            )
        options = {"gradient_as_bucket_view": True, **(train.get("ddp") or {})}
        compress = options.pop("fp16_compression", False)
        if "broadcast_buffers" in options and "forward_sync_buffers" in _DDP_ARGUMENTS:
            options["forward_sync_buffers"] = options.pop("broadcast_buffers")  # renamed in torch 2.15
        strategy = _DDP(compression_hook(compress, device, dtype), precision=precision, **options)
        fabric = Fabric(
            accelerator=device.type,
            strategy=strategy,
            devices=per_node,
            num_nodes=world_size // per_node,
            plugins=[TorchElasticEnvironment()],
        )
    fabric.launch()
    return fabric


def choose_device(name: str) -> torch.device:
    """The device of a name: auto (CUDA if there is a GPU, else the CPU), cpu, cuda, cuda:<number> or mps.

    Raises:
        ValueError: another name.
        RuntimeError: the device does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"{name!r} is not a device: use auto, cpu, cuda, cuda:1 or mps")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError(f"device {name!r} but PyTorch sees no GPU: use cpu, or check the driver")
        if device.index is None:
            device = torch.device("cuda", 0)
        count = torch.cuda.device_count()
        if device.index >= count:
            raise RuntimeError(f"device {name!r} but PyTorch sees {count} GPUs, cuda:0 to cuda:{count - 1}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise RuntimeError(f"device {name!r} but PyTorch has no Metal here: use cpu")
    return device


def choose_amp_dtype(amp: DictConfig, device: torch.device) -> torch.dtype | None:
    """The dtype of automatic mixed precision, None for plain float32.

    ``amp.dtype`` auto is bfloat16 on GPUs that compute in it (compute capability 8 on), float16 on older
    ones, and no mixed precision elsewhere: on a CPU bfloat16 must be requested.

    Raises:
        ValueError: unknown dtype, or fp16 on a CPU, where loss scaling gains nothing.
    """
    name = amp.get("dtype", "auto")
    if name not in ("auto", *_DTYPES):
        raise ValueError(f"train.amp.dtype={name!r}: use auto, bf16 or fp16")
    if not amp.enabled:
        return None
    if name == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if name == "fp16" and device.type != "cuda":
        raise ValueError(f"train.amp.dtype=fp16 needs a CUDA GPU, not {device.type}: use bf16")
    return _DTYPES[name]


def compression_hook(compress: bool, device: torch.device, dtype: torch.dtype | None) -> Callable | None:
    """DDP communication hook that compresses gradients to 16 bits between GPUs; None for no compression.

    The 16-bit dtype is that of mixed precision: bfloat16 training does not scale the loss, so its small gradients
    would underflow in float16. Without mixed precision, and between CPU processes, nothing is compressed.
    """
    if not compress or device.type != "cuda":
        return None
    hooks = {torch.float16: default_hooks.fp16_compress_hook, torch.bfloat16: default_hooks.bf16_compress_hook}
    return hooks.get(dtype)


def describe(fabric: Fabric) -> str:
    """Device, processes and precision as a line for the log."""
    device = fabric.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    precision = getattr(fabric.strategy.precision, "precision", "32-true")
    processes = f"{fabric.world_size} processes" if fabric.world_size > 1 else "1 process"
    return f"device {name}, {processes}, precision {precision}"
