"""Compiles the Triton kernels of a training before its first step."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from omegaconf import DictConfig
from rich.console import Console
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._pytree import tree_map_only

from ..kernels.ahead import KernelCompilationError, compile_all, recording
from ..kernels.dispatch import Call, requested, supports_triton
from .model import build_model
from .resume import isolated_random
from .step import inputs_of

logger = logging.getLogger(__name__)


def compile_kernels(
    cfg: DictConfig,
    batch: Sequence[Mapping[str, Any]],
    fabric: Fabric,
    evaluates: bool = False,
    console: Console | None = None,
) -> None:
    """Compile the Triton kernels that the config needs on a GPU, several at a time.

    A step of a second model, on fake tensors of the batch's shapes, tells which; it takes a few seconds and no memory.
    Sizes of images make no other kernels, so that the first batch stands for all. The first process of each machine
    compiles; others wait for it, and find the kernels on disk. Elsewhere than on a GPU nothing happens.

    Args:
        cfg: the whole config.
        batch: samples of the training.
        fabric: device, precision and processes.
        evaluates: compile the kernels of evaluations too, which compute in float32.
        console: terminal that shows the progress.

    Raises:
        KernelCompilationError: a kernel does not compile, in this process or another; names it.
    """
    if fabric.device.type != "cuda":
        return
    error = None
    runs_triton = requested() in ("auto", "triton") and supports_triton(Call(fabric.device, ())) is None
    if runs_triton and fabric.local_rank == 0:
        try:
            with isolated_random():
                _compile(cfg, batch, fabric, evaluates, console)
        except KernelCompilationError as reason:
            error = str(reason)
    errors = [error]
    if fabric.world_size > 1:
        errors = [None] * fabric.world_size
        dist.all_gather_object(errors, error)
    for error in filter(None, errors):
        raise KernelCompilationError(error)


def _compile(
    cfg: DictConfig, batch: Sequence[Mapping[str, Any]], fabric: Fabric, evaluates: bool, console: Console | None
) -> None:
    begin = time.perf_counter()
    with recording() as recorded, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        try:
            _step(cfg, batch, fabric, evaluates)
        except Exception as error:  # a model of the user's: only the training may refuse it
            logger.info(
                "some kernels compile when they are first launched: on fake tensors the model raises %s: %s",
                type(error).__name__, error,
            )  # fmt: skip
    with console.status("compiling kernels") if console is not None else nullcontext() as status:

        def show(done: int, total: int) -> None:
            if status is not None:
                status.update(f"compiling kernels {done}/{total}")

        count = compile_all(recorded, show)
    if count:
        logger.info("%d Triton kernels are ready after %.1f s", count, time.perf_counter() - begin)


def _step(cfg: DictConfig, batch: Sequence[Mapping[str, Any]], fabric: Fabric, evaluates: bool) -> None:
    """A step of training, and one of evaluation, of another model than the trained one: caches keep fake tensors."""
    with torch.device("meta"):
        model = build_model(cfg, pretrained=False)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        to_fake(model, fabric.device)
        samples = tree_map_only(torch.Tensor, mode.from_tensor, list(batch))
        with fabric.autocast():
            losses = model.train()(*inputs_of(samples, model, fabric.device))
        with torch.autograd.set_multithreading_enabled(False):  # fake tensors have no stream to wait for
            sum(losses.values()).backward()
        if evaluates:
            images, _ = inputs_of(samples[:1], model, fabric.device)
            # Detections are read at last: fake tensors have no numbers.
            with torch.no_grad(), suppress(DataDependentOutputException, DynamicOutputShapeException):
                model.eval()(images)


def to_fake(model: nn.Module, device: torch.device) -> nn.Module:
    """Replace the parameters and buffers of a model on the CPU or "meta" by fake tensors; inside a fake mode."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
                is_parameter = tensors is module._parameters
                tensors[name] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
    return model
