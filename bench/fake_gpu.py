"""A training step on a GPU that is not there: fake CUDA tensors have shapes and dtypes, and compute nothing."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd.function import FunctionCtx
from torch.nn.utils import clip_grad
from torch.utils._foreach_utils import _device_has_foreach_support

from ..detection import detector
from ..engine.step import TrainStep
from ..engine.warm_up import to_fake
from ..kernels import dispatch, use


def _materialize(ctx: FunctionCtx, value: bool) -> None:
    ctx.materialize_grads = value  # autograd's own, which Python cannot read
    ctx.zeros_for_missing = value


def _memory_format_of_cudnn(x: torch.Tensor, weight: torch.Tensor, backend: object) -> torch.memory_format:
    """Of a convolution's result: fake tensors take that of the backend, which without a GPU is not cuDNN."""
    maps = [t for t in (x, weight) if t.dim() == 4]
    if any(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in maps):
        return torch.channels_last
    return torch.contiguous_format


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Fake tensors in which "cuda" exists, with Triton's kernels chosen; inputs may be real tensors on the CPU.

    Operations are those of a real GPU. Those that read data, as ``item``, raise an error of ``torch._subclasses``.
    """
    with supposed_gpu(), FakeTensorMode(allow_non_fake_inputs=True):
        yield


@contextmanager
def supposed_gpu() -> Iterator[None]:
    """Fake tensors, in a mode that is opened inside, compute as on a GPU, with Triton's kernels chosen."""
    replaced = (
        (dispatch, "no_gpu", lambda *_, **__: None),
        (dispatch, "too_old", lambda *_, **__: None),
        (detector, "check_targets", lambda *_: None),  # reads values of CPU tensors
        (torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None)),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch.cuda, "is_bf16_supported", lambda: True),
        # Checkpointing recomputes once for a run of autograd's engine, which ``backward`` does not start.
        (torch._C, "_current_graph_task_id", lambda: 0),
        (FunctionCtx, "set_materialize_grads", _materialize),
        (torch._C, "_conv_determine_backend_memory_format", _memory_format_of_cudnn),
        # It asks for the class of the tensors too, and would take the norms of gradients one at a time.
        (clip_grad, "_has_foreach_support", lambda tensors, device: _device_has_foreach_support(device)),
    )
    with ExitStack() as stack:
        for place, name, value in replaced:
            stack.enter_context(mock.patch.object(place, name, value))
        # The sampler asks where the position embedding is, to compute it once.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        stack.callback(dispatch.forget)
        dispatch.forget()
        stack.enter_context(use("triton"))
        yield


def to_fake_gpu(model: nn.Module) -> nn.Module:
    """Replace the parameters and buffers of a model on the CPU or "meta"; inside ``fake_gpu``."""
    return to_fake(model, torch.device("cuda"))


class FakeFabric:
    """The part of Lightning Fabric that a step uses, for one process."""

    device = torch.device("cuda", 0)
    world_size = 1
    strategy = SimpleNamespace(precision=SimpleNamespace(state_dict=dict))

    @staticmethod
    def backward(loss: torch.Tensor) -> None:
        backward(loss)

    @staticmethod
    def clip_gradients(
        model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float, error_if_nonfinite: bool
    ) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm, error_if_nonfinite=error_if_nonfinite)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    clip_grad_norm: float | None = None,
    dtype: torch.dtype | None = None,
) -> TrainStep:
    """The step that ``mimdet train`` runs, of a model of ``to_fake_gpu``; inside ``fake_gpu``.

    Args:
        dtype: of mixed precision, in which the model's forward runs from now on; None for none.
    """
    optimizer.optimizer = optimizer  # as Fabric wraps it
    if dtype is not None:
        model.forward = torch.autocast("cuda", dtype)(model.forward)
    return TrainStep(FakeFabric(), model, optimizer, clip_grad_norm)


@torch.no_grad()
def backward(loss: torch.Tensor) -> None:
    """As ``loss.backward()``. Autograd's engine needs a GPU for CUDA tensors, this calls its nodes from Python.

    ``torch._C._current_autograd_node`` is then the node that runs, as it is in the engine.
    """
    root, waiting, stack = loss.grad_fn, defaultdict(int), [loss.grad_fn]
    seen = {root}
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None:
                continue
            waiting[node] += 1
            if node not in seen:
                seen.add(node)
                stack.append(node)
    incoming = defaultdict(dict)
    incoming[root][0] = torch.ones_like(loss)
    ready = [root]
    while ready:
        node = ready.pop()
        with mock.patch.object(torch._C, "_current_autograd_node", lambda node=node: node):
            for following in _run(node, incoming, loss.device):
                waiting[following] -= 1
                if not waiting[following]:
                    ready.append(following)


def _run(node, incoming: dict, device: torch.device) -> list:
    """Run one node, add its results to the gradients of the nodes that take them, and return these nodes."""
    gradients = incoming.pop(node, {})
    if hasattr(node, "variable"):
        if gradients:
            node.variable.grad = _in_layout_of(node.variable, gradients[0])
        return []
    taking = []
    for gradient, (following, i) in _edges(node, gradients, device):
        if gradient is not None:
            expected = following._input_metadata[i]
            if gradient.shape != tuple(expected.shape):
                gradient = gradient.sum_to_size(expected.shape)
            gradient = gradient.to(expected.dtype)
            others = incoming[following]
            others[i] = others[i] + gradient if i in others else gradient
        taking.append(following)
    return taking


def _in_layout_of(parameter: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient, copied where autograd copies: its strides are not the parameter's."""
    strides = zip(parameter.shape, parameter.stride(), gradient.stride(), strict=True)
    if all(ours == theirs for size, ours, theirs in strides if size > 1):
        return gradient.detach()
    return gradient.new_empty_strided(parameter.shape, parameter.stride()).copy_(gradient)


def _edges(node, gradients: dict, device: torch.device) -> list:
    """A node's results with the nodes that take them."""
    inputs = [gradients.get(i) for i in range(len(node._input_metadata))]
    if not hasattr(node, "apply"):
        results, edges = node(*inputs), node.next_functions
        results = results if isinstance(results, tuple) else (results,)
    else:  # a Python autograd.Function: results for every argument, edges for tensors
        if getattr(node, "zeros_for_missing", True):
            inputs = [
                torch.zeros(meta.shape, dtype=meta.dtype, device=device) if x is None else x
                for x, meta in zip(inputs, node._input_metadata, strict=True)
            ]
        results = node.apply(*inputs)
        results = results if isinstance(results, tuple) else (results,)
        results = [x for x, needed in zip(results, node.needs_input_grad, strict=True) if needed]
        edges = [edge for edge in node.next_functions if edge[0] is not None]
    return [(x, edge) for x, edge in zip(results, edges, strict=True) if edge[0] is not None]
