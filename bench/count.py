"""What a step computes and moves: FLOPs and bytes of each operation, by component and direction."""

from __future__ import annotations

import bisect
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

OTHER = "gradient sums"
UPDATE = "update"


@dataclass
class Work:
    """One kind of operation on one set of shapes.

    Attributes:
        calls: how often it ran.
        flops: of all calls; 0 for what is not a matrix product, a convolution or attention.
        bytes: of all calls: every input read and every output written once.
        dtype: of the first floating point tensor.
        seconds: of all calls.
    """

    calls: int = 0
    flops: int = 0
    bytes: int = 0
    dtype: torch.dtype | None = None
    seconds: float = 0.0

    def floor(self, limits: Mapping[str, float], gemm_key: Callable[[torch.dtype], str]) -> float:
        """Seconds that the machine needs at best, all of it computing or all of it moving."""
        computing = self.flops / limits[gemm_key(self.dtype)] / 1e12 if self.flops else 0.0
        return max(computing, self.bytes / limits["copy_gb_s"] / 1e9)


# (component, "forward" or "backward", operation, shapes)
Key = tuple[str, str, str, str]


class Counter(TorchDispatchMode):
    """Counts and times every operation that runs inside ``with``.

    An operation belongs to the component whose module called it; in backward, to the one whose forward made the
    autograd node that runs. Operations are run one at a time, so their seconds add up to more than those of a step.

    Args:
        model: whose modules name the components.
        components: component -> prefixes of module names; the longest prefix that fits wins, and "" fits all.
        optimizer: whose steps are ``UPDATE``. What belongs nowhere, above all the sums of parameters' gradients, is
            ``OTHER``.
    """

    def __init__(self, model: nn.Module, components: Mapping[str, Iterable[str]], optimizer: torch.optim.Optimizer):
        super().__init__()
        self.work: dict[Key, Work] = defaultdict(Work)
        self._stack = [OTHER]
        # Autograd nodes carry increasing numbers: from which number on which component's forward ran.
        self._numbers: list[int] = []
        self._made_by: list[str] = []
        prefixes = {prefix: name for name, found in components.items() for prefix in found}
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._enter(UPDATE)),
            optimizer.register_step_post_hook(lambda *_: self._leave()),
        ]
        for name, module in model.named_modules():
            fitting = [p for p in prefixes if not p or name == p or name.startswith(p + ".")]
            if fitting:
                component = prefixes[max(fitting, key=len)]
                self._handles.append(module.register_forward_pre_hook(lambda m, a, c=component: self._enter(c)))
                self._handles.append(module.register_forward_hook(lambda m, a, o: self._leave(), always_call=True))

    def __exit__(self, *error):
        for handle in self._handles:
            handle.remove()
        return super().__exit__(*error)

    def _enter(self, component: str) -> None:
        self._stack.append(component)
        self._note()

    def _leave(self) -> None:
        self._stack.pop()
        self._note()

    def _note(self) -> None:
        number = torch._C._autograd._get_sequence_nr()
        if self._numbers and self._numbers[-1] >= number:
            self._numbers.pop()
            self._made_by.pop()
        self._numbers.append(number)
        self._made_by.append(self._stack[-1])

    def _place(self) -> tuple[str, str]:
        node = torch._C._current_autograd_node()
        if node is None:
            return self._stack[-1], "forward"
        if len(self._stack) > 1:  # recomputed by checkpointing
            return self._stack[-1], "backward"
        at = bisect.bisect_right(self._numbers, node._sequence_nr()) - 1
        return (self._made_by[at] if at >= 0 else OTHER), "backward"

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        start = time.perf_counter()
        result = function(*args, **kwargs)
        _wait(result)
        seconds = time.perf_counter() - start
        if _moves_nothing(function):
            return result
        tensors = _tensors((args, kwargs))
        shapes = " ".join("x".join(map(str, t.shape)) for t in tensors if t.dim())
        work = self.work[(*self._place(), function.name(), shapes)]
        work.calls += 1
        work.flops += flops(function, args, kwargs, result)
        work.bytes += moved(function, args, kwargs, result)
        work.seconds += seconds
        if work.dtype is None:
            work.dtype = next((t.dtype for t in tensors if t.is_floating_point()), None)
        return result


def flops(function, args: tuple, kwargs: dict, result) -> int:
    """Multiplications and additions of one call: 2 for each term of a product; 0 for operations without products."""
    formula = _FLOPS.get(function.overloadpacket) or _PACKED.get(function._schema.name)
    return formula(args, kwargs, result) if formula else 0


def moved(function, args: tuple, kwargs: dict, result) -> int:
    """Bytes of one call: each tensor read once, each written once; what is written in place counts for both."""
    total = 0
    values = [*zip(function._schema.arguments, args, strict=False)]
    values += [(a, kwargs[a.name]) for a in function._schema.arguments if a.name in kwargs]
    written_inputs = 0
    for argument, value in values:
        size = sum(map(_size, _tensors(value)))
        total += size
        if argument.alias_info is not None and argument.alias_info.is_write:
            written_inputs += size
    if written_inputs:
        # Outputs that are the written inputs are counted by them; an out= argument is written, not read.
        out = sum(_size(t) for a, v in values if a.is_out for t in _tensors(v))
        return total + written_inputs - out
    return total + sum(map(_size, _tensors(result)))


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _size(tensor: torch.Tensor) -> int:
    """Bytes of memory behind a tensor; what is expanded is read once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count * tensor.element_size()


_ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "lift_fresh"}


def _moves_nothing(function) -> bool:
    """Views and fresh memory."""
    if function.overloadpacket.__name__ in _ALLOCATIONS or function.overloadpacket is aten._unsafe_view:
        return True
    returns = function._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _wait(result) -> None:
    if any(t.is_cuda for t in _tensors(result)):
        torch.cuda.synchronize()


def _product(a: torch.Tensor, b: torch.Tensor) -> int:
    """(..., M, K) @ (..., K, N)."""
    return 2 * a.numel() * b.shape[-1]


def _convolution(x: torch.Tensor, weight: torch.Tensor, result_shape, transposed: bool) -> int:
    # Each position of the map that the kernel slides over meets each weight of its group once.
    positions = (x.shape if transposed else result_shape)[2:].numel()
    return 2 * x.shape[0] * positions * weight.numel()


def _convolution_backward(args, kwargs, result) -> int:
    gradient, x, weight, transposed, wanted = args[0], args[1], args[2], args[7], args[10]
    return (wanted[0] + wanted[1]) * _convolution(x, weight, gradient.shape, transposed)


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> int:
    """Scores and their product with the values: (B, H, N, D) each."""
    return 2 * q.shape[:-2].numel() * q.shape[-2] * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def _attention_forward(args, kwargs, result) -> int:
    return _attention(*args[:3])


def _attention_backward(args, kwargs, result) -> int:
    # Scores again, and one product for each of dV, dP, dQ and dK.
    return _attention(*args[1:4]) * 5 // 2


def _attention_packed(q: torch.Tensor, cu_seqlens: torch.Tensor) -> int:
    """As ``_attention``, of each sequence by itself; q: (T, ..., H, D)."""
    return 4 * int(cu_seqlens.diff().long().square().sum()) * q.shape[-2:].numel()


def _packets(*names: str) -> list:
    return [getattr(aten, name) for name in names if hasattr(aten, name)]


_KERNELS = ("flash_attention", "efficient_attention", "cudnn_attention")
_FLOPS = {
    aten.mm: lambda args, kwargs, result: _product(*args[:2]),
    aten.bmm: lambda args, kwargs, result: _product(*args[:2]),
    **dict.fromkeys(
        (aten.addmm, aten.addmm_, aten.baddbmm, aten.baddbmm_), lambda args, kwargs, result: _product(*args[1:3])
    ),
    aten.convolution: lambda args, kwargs, result: _convolution(args[0], args[1], result.shape, args[6]),
    aten.convolution_backward: _convolution_backward,
    **dict.fromkeys(
        _packets(
            *(f"_scaled_dot_product_{kernel}" for kernel in _KERNELS), "_scaled_dot_product_flash_attention_for_cpu"
        ),
        _attention_forward,
    ),
    **dict.fromkeys(
        _packets(
            *(f"_scaled_dot_product_{kernel}_backward" for kernel in _KERNELS),
            "_scaled_dot_product_flash_attention_for_cpu_backward",
        ),
        _attention_backward,
    ),
}
# By name: PyTorch's are registered by who uses them.
_PACKED = {
    **dict.fromkeys(
        ("mimdet::attention_varlen", "torch_attn::_varlen_attn"),
        lambda args, kwargs, result: _attention_packed(args[0], args[3]),
    ),
    **dict.fromkeys(
        ("mimdet::attention_varlen_backward", "torch_attn::_varlen_attn_backward"),
        lambda args, kwargs, result: _attention_packed(args[1], args[6]) * 5 // 2,
    ),
}
