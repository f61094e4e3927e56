"""Registers operations under ``torch.ops.mimdet``, calls them, and launches their kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from pathlib import Path

import torch

from . import build

# Dtype codes of csrc/cuda_rows.h.
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Types of arguments without an observer. Looked up here once: ``call`` runs hundreds of times a step.
_PLAIN = _Tensor, _Parameter = torch.Tensor, torch.nn.Parameter
_OTHERS = frozenset((type(None), bool, int, float, str, list, torch.dtype))
_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._are_functorch_transforms_active

_library = torch.library.Library("mimdet", "FRAGMENT")
_runs: dict[str, Callable] = {}
_schemas: dict[str, str] = {}
_functions: dict[str, Callable] = {}


def define(name: str, schema: str, run: Callable, fake: Callable) -> Callable:
    """Register ``mimdet::<name>`` and return what calls it.

    torch's dispatcher and ``register_autograd`` cost tens of microseconds a call, as much as a small kernel. Where
    nothing observes the call (no compiler, dispatch mode, functorch transform or tensor subclass), it goes to ``run``
    directly, through an ``autograd.Function`` if an input requires a gradient. The first tensor's GPU is then torch's
    current device, where Triton launches.

    Args:
        name: of the operation.
        schema: "(Tensor x, ...) -> Tensor"; functional, outputs never alias inputs. A list of tensors comes first.
        run: implementation for CPU and GPU tensors.
        fake: shapes, dtypes and strides of the outputs, for meta and fake tensors.
    """
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, _on_its_device(run), key)
    torch.library.register_fake(f"mimdet::{name}", fake, lib=_library)
    overload = getattr(torch.ops.mimdet, name).default

    def call(*arguments):
        if _is_compiling() or _dispatch_modes() or _transforms():
            return overload(*arguments)
        first, differentiable = None, False
        for argument in arguments:
            kind = type(argument)
            if kind is _Tensor or kind is _Parameter:
                if first is None:
                    first = argument
                if argument.requires_grad:
                    differentiable = True
            elif kind is list and argument and isinstance(argument[0], _Tensor):
                first = argument[0] if first is None else first
                for tensor in argument:
                    if type(tensor) not in _PLAIN:
                        return overload(*arguments)
                    differentiable |= tensor.requires_grad
            elif kind not in _OTHERS:  # a tensor subclass, such as a fake tensor, or a symbolic number
                return overload(*arguments)
        function = run
        if differentiable and torch.is_grad_enabled():
            if name not in _functions:
                return overload(*arguments)
            function = _functions[name]
        if first.is_cpu:
            return function(*arguments)
        if not first.is_cuda:
            return overload(*arguments)
        if first.get_device() == torch.cuda.current_device():
            return function(*arguments)
        with torch.cuda.device(first.device):
            return function(*arguments)

    _runs[name], _schemas[name] = run, schema
    return call


def autograd(name: str, backward: Callable, setup_context: Callable, outputs: int = 1) -> None:
    """Attach the gradient formula of ``mimdet::<name>``, as ``torch.library.register_autograd`` takes it.

    Of a tuple, callers use the first ``outputs``; the others are saved for backward. Where nothing observes the call
    they are None: autograd takes a microsecond for every output.
    """
    torch.library.register_autograd(f"mimdet::{name}", backward, setup_context=setup_context, lib=_library)

    run = _runs[name]

    def forward(ctx, *arguments):
        output = run(*arguments)
        setup_context(ctx, arguments, output)
        return (*output[:outputs], *[None] * (len(output) - outputs)) if isinstance(output, tuple) else output

    # A Function sees no tensors inside of a list: a first argument that is one comes element by element.
    def forward_of_list(ctx, length, *arguments):
        return forward(ctx, list(arguments[:length]), *arguments[length:])

    def backward_of_list(ctx, *gradients):
        of_list, *others = backward(ctx, *gradients)
        return None, *of_list, *others

    def apply_to_list(tensors, *others):
        return function.apply(len(tensors), *tensors, *others)

    takes_list = "Tensor[]" in _schemas[name].partition("->")[0]
    methods = (forward_of_list, backward_of_list) if takes_list else (forward, backward)
    members = dict(zip(("forward", "backward"), map(staticmethod, methods), strict=True))
    function = type(f"mimdet_{name}", (torch.autograd.Function,), members)
    _functions[name] = apply_to_list if takes_list else function.apply


def run_of(overload: torch._ops.OpOverload) -> Callable:
    """What computes an operation of ``define``."""
    return _runs[overload.overloadpacket.__name__]


def _on_its_device(run: Callable) -> Callable:
    """``run`` with the first tensor's GPU as torch's current device, where Triton launches."""

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


def launch(name: str, impl: str, *arguments, sizes: tuple[int, ...] = (), typed: tuple[torch.Tensor, ...] = ()) -> None:
    """Launch one of an operation's kernels, which takes its inputs, then outputs that it fills.

    It is ``launch_<name>`` of the operation's triton.py, cuda.py or aten_cpu.py, else the function of csrc.

    Args:
        name: "<op>_<step>", such as "bias_gelu_fwd".
        impl: "triton", "cuda" or "cpp".
        arguments: tensors, None, numbers, and lists of tensors or numbers.
        sizes, typed: shapes and dtypes for C functions, which get bare pointers; see ``call_cuda``.
    """
    kernel = _kernel(name, impl)
    if kernel is None:
        call_cuda(name, *arguments, sizes=sizes, typed=typed)
    else:
        kernel(*arguments)


@cache
def _kernel(name: str, impl: str) -> Callable | None:
    op = name.rsplit("_", 1)[0]
    if (Path(__file__).parent / op / f"{impl}.py").is_file():
        return getattr(import_module(f".{op}.{impl}", __package__), f"launch_{name}")
    if impl == "cpp":
        return getattr(torch.ops.mimdet_cpu, name).default
    if impl == "cuda":
        return None
    raise ValueError(f"{op}: {impl!r} is not an implementation of the registered operation")


def call_cuda(name: str, *arguments, sizes: tuple[int, ...] = (), typed: tuple[torch.Tensor, ...] = ()) -> None:
    """Run the C function ``mimdet_<name>`` on the current stream of the first tensor's GPU, the current device.

    Tensors become pointers, ints int64, floats float, and lists of them arrays of these. ``sizes`` follow as int64,
    then the codes of the dtypes of ``typed``, then the stream.

    Raises:
        RuntimeError: the launch failed; with CUDA's error number.
    """
    device = next(argument.get_device() for argument in arguments if isinstance(argument, torch.Tensor))
    converted = []
    for argument in (*arguments, *sizes, *(_DTYPE_CODES[tensor.dtype] for tensor in typed)):
        if isinstance(argument, list):
            elements = [_c_value(element) for element in argument]
            converted.append((type(elements[0]) * len(elements))(*elements))
        else:
            converted.append(_c_value(argument))
    stream = torch._C._cuda_getCurrentRawStream(device)  # as Triton does, without a Stream object
    code = getattr(build.cuda_library(), f"mimdet_{name}")(*converted, ctypes.c_void_p(stream))
    if code:
        raise RuntimeError(f"mimdet: CUDA kernel {name} failed with CUDA error {code}")


def _c_value(argument: torch.Tensor | float | None) -> ctypes.c_void_p | ctypes.c_float | ctypes.c_int64:
    if argument is None or isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr() if argument is not None else None)
    return (ctypes.c_float if isinstance(argument, float) else ctypes.c_int64)(argument)


def dense(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """``contiguous()`` of each; None stays None."""
    return tuple([tensor if tensor is None else tensor.contiguous() for tensor in tensors])


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` with its last dimension dense, copied only if it is not."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def index_for(impl: str, index: torch.Tensor) -> torch.Tensor:
    """int64 ``index`` for C++ and CUDA; Triton takes int32 too."""
    return index if impl == "triton" else index.long()


def rows_per_partial(rows: int, least: int, most: int) -> int:
    """Rows per partial sum of gradients: ``least``, or more where there would be over ``most`` sums.

    It depends only on the number of rows, so any number of threads sums in the same order.
    """
    return max(least, -(-rows // most))
