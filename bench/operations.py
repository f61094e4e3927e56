"""FLOPs, bytes and seconds of each operation of a step, by component and direction."""

from __future__ import annotations

import bisect
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula

aten = torch.ops.aten

OTHER = "gradient sums"
UPDATE = "update"


@dataclass
class Work:
    """One kind of operation on one set of shapes.

    Attributes:
        calls: how often it ran.
        flops: of all calls, as ``torch.utils.flop_counter`` counts them.
        bytes: of all calls: every input read and every output written once.
        dtype: of the first floating point tensor.
        seconds: of all calls.
    """

    calls: int = 0
    flops: int = 0
    bytes: int = 0
    dtype: torch.dtype | None = None
    seconds: float = 0.0


# (component, "forward" or "backward", operation, shapes)
Key = tuple[str, str, str, str]


class Counter(TorchDispatchMode):
    """Counts and times every operation that runs inside ``with``.

    An operation belongs to the component whose module called it; in backward, to the one whose forward created
    the autograd node. Operations run one at a time, so their seconds add up to more than a step's.

    Args:
        model: whose modules name the components.
        components: component -> prefixes of module names; the longest match wins, and "" matches all.
        optimizer: its steps are ``UPDATE``. The rest, above all sums of parameters' gradients, is ``OTHER``.
        methods: component -> dotted name of a module's method.
        operations: False leaves ``work`` empty: counting slows Python between operations.

    Attributes:
        work: of each kind of operation.
        seconds: (component, "forward" or "backward") -> wall clock in its modules, without the components inside; in
            backward only what is recomputed, and the rest is in (``OTHER``, "forward"). All add up to the time inside
            ``with``.
    """

    def __init__(
        self,
        model: nn.Module,
        components: Mapping[str, Iterable[str]],
        optimizer: torch.optim.Optimizer,
        methods: Mapping[str, str] | None = None,
        operations: bool = True,
    ):
        super().__init__()
        self._operations = operations
        register_flops()
        self.work: dict[Key, Work] = defaultdict(Work)
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self._last = 0.0
        self._stack = [OTHER]
        # Autograd nodes have increasing sequence numbers: the first number of each component's forward.
        self._numbers: list[int] = []
        self._components: list[str] = []
        owner = {prefix: name for name, prefixes in components.items() for prefix in prefixes}
        self._removal = ExitStack()
        handles = [
            optimizer.register_step_pre_hook(lambda *_: self._enter(UPDATE)),
            optimizer.register_step_post_hook(lambda *_: self._leave()),
        ]
        for name, module in model.named_modules():
            matching = [p for p in owner if not p or name == p or name.startswith(p + ".")]
            if matching:
                component = owner[max(matching, key=len)]
                handles.append(module.register_forward_pre_hook(lambda m, a, c=component: self._enter(c)))
                handles.append(module.register_forward_hook(lambda m, a, o: self._leave(), always_call=True))
        for handle in handles:
            self._removal.enter_context(handle)
        for component, name in (methods or {}).items():
            path, _, attribute = name.rpartition(".")
            module = model.get_submodule(path)
            method = self._within(component)(getattr(module, attribute))
            self._removal.enter_context(mock.patch.object(module, attribute, method))

    def __enter__(self):
        self._last = time.perf_counter()
        return super().__enter__() if self._operations else self

    def __exit__(self, *error):
        self._charge(self._owner())
        self._removal.close()
        return super().__exit__(*error) if self._operations else None

    @contextmanager
    def _within(self, component: str) -> Iterator[None]:
        self._enter(component)
        try:
            yield
        finally:
            self._leave()

    def _enter(self, component: str) -> None:
        self._charge(self._owner())
        self._stack.append(component)
        self._record()

    def _leave(self) -> None:
        self._charge(self._owner())
        self._stack.pop()
        self._record()

    def _charge(self, owner: tuple[str, str]) -> None:
        """The time since the last call is ``owner``'s."""
        now = time.perf_counter()
        self.seconds[owner] += now - self._last
        self._last = now

    def _record(self) -> None:
        number = torch._C._autograd._get_sequence_nr()
        if self._numbers and self._numbers[-1] >= number:
            self._numbers.pop()
            self._components.pop()
        self._numbers.append(number)
        self._components.append(self._stack[-1])

    def _owner(self) -> tuple[str, str]:
        node = torch._C._current_autograd_node()
        if node is None:
            return self._stack[-1], "forward"
        if len(self._stack) > 1:  # recomputed by checkpointing
            return self._stack[-1], "backward"
        at = bisect.bisect_right(self._numbers, node._sequence_nr()) - 1
        return (self._components[at] if at >= 0 else OTHER), "backward"

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        start = time.perf_counter()
        result = function(*args, **kwargs)
        if any(t.is_cuda for t in tensors_of(result)):
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if moves_nothing(function):
            return result
        tensors = tensors_of((args, kwargs))
        shapes = " ".join("x".join(map(str, t.shape)) for t in tensors if t.dim())
        work = self.work[(*self._owner(), function.name(), shapes)]
        work.calls += 1
        work.flops += flops(function, args, kwargs, result)
        work.bytes += moved(function, args, kwargs, result)
        work.seconds += seconds
        if work.dtype is None:
            work.dtype = next((t.dtype for t in tensors if t.is_floating_point()), None)
        return result


class Dispatches(TorchDispatchMode):
    """Counts the operators of a step that runs inside ``with``, and those whose numbers the host must read.

    Attributes:
        operations: operators that are no views; one may launch several kernels.
        waits: operators after which the host waits for a GPU: numbers that it reads, results whose shape depends on
            data, and copies to the host. Without a GPU, what a CPU reads from a tensor without an operator, as
            ``tolist`` does, is not seen, and numbers that a GPU's program keeps on the host count too.
    """

    def __init__(self):
        super().__init__()
        self.operations = self.waits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace != "prim" and not moves_nothing(function):
            self.operations += 1
            self.waits += _waits(function, args, result)
        return result


def _waits(function, args: tuple, result) -> bool:
    packet = function.overloadpacket
    if packet in (aten.index, aten.index_put, aten.index_put_):
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        # One number at the places of a mask is written without counting them.
        return bool(masks) and (packet is aten.index or args[2].numel() > 1)
    if packet in (aten._to_copy, aten.copy_):
        source, target = (args[0], result) if packet is aten._to_copy else (args[1], args[0])
        return source.is_cuda and not target.is_cuda
    if packet is torch.ops.torchvision.nms or packet is aten.is_nonzero:  # without tags
        return True
    return bool({torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(function.tags))


def flops(function, args: tuple, kwargs: dict, result) -> int:
    """Multiplications and additions of one call: 2 for each term of a product; 0 for operations without products."""
    formula = flop_registry.get(function.overloadpacket)
    return formula(*args, **kwargs, out_val=result) if formula else 0


def moved(function, args: tuple, kwargs: dict, result) -> int:
    """Bytes of one call: inputs read once, outputs written once; tensors changed in place count twice."""
    total = 0
    arguments = function._schema.arguments
    values = [*zip(arguments, args, strict=False), *((a, kwargs[a.name]) for a in arguments if a.name in kwargs)]
    written_inputs = 0
    for argument, value in values:
        size = sum(map(_size, tensors_of(value)))
        total += size
        if argument.alias_info is not None and argument.alias_info.is_write:
            written_inputs += size
    if written_inputs:
        # Outputs that are the written inputs are counted by them; an out= argument is written, not read.
        out = sum(_size(t) for a, v in values if a.is_out for t in tensors_of(v))
        return total + written_inputs - out
    return total + sum(map(_size, tensors_of(result)))


def tensors_of(tree) -> list[torch.Tensor]:
    """The tensors in nested arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _size(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's memory; expanded dimensions count once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count * tensor.element_size()


_NO_WORK = {"_unsafe_view", "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}


def moves_nothing(function) -> bool:
    """Whether it is fresh memory or a view: its outputs are inputs' memory, which is not written.

    The schema says so, except of ``_unsafe_view``.
    """
    returns = function._schema.returns
    is_view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return is_view or function.overloadpacket.__name__ in _NO_WORK


@cache
def register_flops() -> None:
    """Give ``torch.utils.flop_counter`` formulas of packed attention, ours and PyTorch's, and of in-place products.

    It accepts only registered operations, so the modules that register packed attention are imported first.
    """
    import_module("torch.nn.attention.varlen")
    import_module("mimdet.kernels.attention_varlen.api")

    def attention(products: int, q: int, cu_seqlens: int) -> Callable[..., int]:
        """N x N x head_dim products of each sequence by itself.

        Args:
            q, cu_seqlens: places among the arguments; q is (T, ..., heads, head_dim).
        """

        def formula(*arguments, **_) -> int:
            lengths = arguments[cu_seqlens].diff().long()
            return 2 * products * int(lengths.square().sum()) * arguments[q].shape[-2:].numel()

        return formula

    ours, torchs = torch.ops.mimdet, torch.ops.torch_attn
    for target, formula in {
        # Backward has the scores again, and one product for each of dV, dP, dQ and dK.
        ours.attention_varlen: attention(2, q=0, cu_seqlens=1),
        ours.attention_varlen_backward: attention(5, q=1, cu_seqlens=4),
        torchs._varlen_attn: attention(2, q=0, cu_seqlens=3),
        torchs._varlen_attn_backward: attention(5, q=1, cu_seqlens=6),
        aten.addmm_: flop_registry[aten.addmm],
        aten.baddbmm_: flop_registry[aten.baddbmm],
    }.items():
        if target not in flop_registry:  # later versions of PyTorch have a formula of varlen_attn
            register_flop_formula(target, get_raw=True)(formula)
