"""Registration of operations under ``torch.ops.mimdet``, once, and the short way to them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch

# How the CUDA kernels are told a dtype: Dtype in csrc/cuda_rows.h.
CUDA_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_library = torch.library.Library("mimdet", "FRAGMENT")
_runs: dict[str, Callable] = {}
_functions: dict[str, type[torch.autograd.Function]] = {}


def define(name: str, schema: str, run: Callable, fake: Callable) -> Callable:
    """Register ``mimdet::<name>`` and return what calls it.

    The dispatcher and the gradient formulas of registered operations cost tens of microseconds a call, as much as a
    small kernel. Where nothing looks at what is called (no compiler, no dispatch mode, no transform, no tensor
    subclass), the call goes to ``run`` directly, through an ``autograd.Function`` where gradients are wanted.

    Args:
        name: of the operation.
        schema: "(Tensor x, ...) -> Tensor"; functional, outputs never alias inputs.
        run: the implementation on CPU and GPU tensors.
        fake: shapes, dtypes and strides of the outputs, for meta and fake tensors.
    """
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    run = _on_its_device(run)
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"mimdet::{name}", fake, lib=_library)
    overload = getattr(torch.ops.mimdet, name).default

    def call(*arguments):
        if torch.compiler.is_compiling() or _is_observed(arguments):
            return overload(*arguments)
        if not torch.is_grad_enabled() or not _want_gradients(arguments):
            return run(*arguments)
        return _functions[name].apply(*arguments) if name in _functions else overload(*arguments)

    _runs[name] = run
    return call


def autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Attach the gradient formula of ``mimdet::<name>``, as ``torch.library.register_autograd`` takes it."""
    torch.library.register_autograd(f"mimdet::{name}", backward, setup_context=setup_context, lib=_library)

    run = _runs[name]

    def forward(ctx, *arguments):
        output = run(*arguments)
        setup_context(ctx, arguments, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    _functions[name] = type(f"mimdet_{name}", (torch.autograd.Function,), members)


def _on_its_device(run: Callable) -> Callable:
    """``run`` with the first tensor's GPU as the current one: Triton launches on that."""

    @wraps(run)
    def guarded(*arguments):
        for a in arguments:
            if isinstance(a, torch.Tensor):
                break
        if not a.is_cuda or a.get_device() == torch.cuda.current_device():
            return run(*arguments)
        with torch.cuda.device(a.device):
            return run(*arguments)

    return guarded


def _is_observed(arguments: tuple) -> bool:
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return True
    return any(isinstance(a, torch.Tensor) and not (type(a) in _PLAIN and (a.is_cpu or a.is_cuda)) for a in arguments)


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _want_gradients(arguments: tuple) -> bool:
    return any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments)
