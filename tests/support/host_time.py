"""Python's part of the fused calls of a training step: ``python tests/support/host_time.py`` prints it by operation.

A step of MIMDet-Base with few channels is recorded. Then its calls are repeated, forward and backward, with
``library.launch`` doing nothing: what is left is Python and torch's allocations. Columns: calls, microseconds of all of
them, and Python functions of ``kernels`` that they enter, which do not depend on the machine's load.
"""

import contextlib
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

KERNELS = str(Path(__file__).resolve().parents[2] / "kernels")
BOTTOM_UP = "model.backbone.bottom_up"
# Depth and number of layers are MIMDet-Base's; widths are not, no kernel runs.
NARROW = [
    f"{BOTTOM_UP}.encoder.embed_dim=48",
    f"{BOTTOM_UP}.encoder.num_heads=2",
    f"{BOTTOM_UP}.encoder.img_size=128",
    f"{BOTTOM_UP}.encoder.checkpointing=false",
    f"{BOTTOM_UP}.encoder.recompute=lean",
    f"{BOTTOM_UP}.decoder.decoder_embed_dim=32",
    f"{BOTTOM_UP}.decoder.num_heads=2",
    f"{BOTTOM_UP}.decoder.recompute=lean",
    f"{BOTTOM_UP}._out_feature_channels=[12,24,32,32]",
    "model.backbone.out_channels=16",
    "model.roi_heads.batch_size_per_image=32",
]


class Call(NamedTuple):
    """A recorded call of a fused operation."""

    name: str
    function: object
    arguments: tuple
    keywords: dict
    grad: bool


class Cost(NamedTuple):
    """Seconds, and Python functions entered, of forward and of the backward formula."""

    forward: float
    backward: float
    entered: int


@contextlib.contextmanager
def recorded_calls():
    """Inside, calls that the model makes of fused operations are recorded; yields their list."""
    calls = []

    def recorder(name, function):
        def record(*arguments, **keywords):
            kept = {k: _detached(v) for k, v in keywords.items()}
            calls.append(Call(name, function, tuple(map(_detached, arguments)), kept, torch.is_grad_enabled()))
            return function(*arguments, **keywords)

        return record

    callers = [m for name, m in sys.modules.items() if name.startswith(("mimdet.modeling", "mimdet.detection"))]
    with contextlib.ExitStack() as stack:
        for module in callers:
            for name, value in list(vars(module).items()):
                if (getattr(value, "__module__", None) or "").endswith(f"{name.removesuffix('_packed')}.api"):
                    stack.enter_context(mock.patch.object(module, name, recorder(name, value)))
        yield calls


@contextlib.contextmanager
def no_launches():
    """Inside, kernels are not launched."""
    from mimdet.kernels import library

    with mock.patch.object(library, "launch", _nothing):
        yield


def _nothing(*arguments, **keywords):
    pass


def cost(call, repeats=20):
    """``Cost`` of a recorded call, the fastest of ``repeats``."""
    inputs = [t for v in (*call.arguments, *call.keywords.values()) for t in _tensors(v) if t.requires_grad]
    forward, backward = [], []

    def run():
        with torch.set_grad_enabled(call.grad):
            begin = time.perf_counter()
            output = call.function(*call.arguments, **call.keywords)
            forward.append(time.perf_counter() - begin)
        outputs = [t for t in _tensors(output) if t.grad_fn is not None]
        if outputs:
            with _timed_formula(outputs[0].grad_fn, backward):
                torch.autograd.grad(outputs, inputs, [torch.zeros_like(t) for t in outputs], allow_unused=True)

    entered = _entered(run)
    for _ in range(repeats):
        run()
    return Cost(min(forward), min(backward, default=0.0), entered)


@contextlib.contextmanager
def _timed_formula(node, seconds):
    """Inside, the time of the autograd.Function's backward, without autograd's engine, is added to ``seconds``."""
    function = type(node)._forward_cls
    formula = function.backward

    def timed(*arguments):
        begin = time.perf_counter()
        result = formula(*arguments)
        seconds.append(time.perf_counter() - begin)
        return result

    with mock.patch.object(function, "backward", staticmethod(timed)):
        yield


def _entered(run):
    """How many Python functions of ``kernels`` a second ``run()`` enters."""
    run()
    count = 0

    def notice(frame, event, _):
        nonlocal count
        count += event == "call" and str(Path(frame.f_code.co_filename).resolve()).startswith(KERNELS)

    sys.setprofile(notice)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def _tensors(value):
    """All tensors in a value or in a list or tuple of values."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, list | tuple) else []


def _detached(value):
    """Tensors of the same memory, each a leaf."""
    if isinstance(value, torch.Tensor):
        return value.detach().requires_grad_(value.requires_grad)
    same = isinstance(value, list | tuple) and _tensors(value)
    return type(value)(map(_detached, value)) if same else value


def training_step():
    """Calls of one training step under autocast."""
    import numpy as np

    from mimdet.config import instantiate, load

    torch.manual_seed(0)
    model = instantiate(load("configs/mimdet_b_mask_rcnn.py", NARROW).model).train()
    polygon = np.array([5.0, 5, 30, 5, 30, 40, 5, 40])
    target = {"boxes": torch.tensor([[5.0, 5, 30, 40]]), "labels": torch.tensor([1]), "masks": [[polygon]]}
    images = [torch.rand(3, 64, 96) * 255, torch.rand(3, 64, 80) * 255]
    with recorded_calls() as calls:
        with torch.autocast("cpu", torch.bfloat16):
            losses = model(images, [target, target])
        sum(losses.values()).backward()
    return calls


def main():
    torch.set_num_threads(1)
    calls = training_step()
    rows, total = defaultdict(list), []
    with no_launches():
        for call in calls:
            rows[call.name].append(cost(call))
    total = [c for costs in rows.values() for c in costs]
    print(f"{'':26} calls  forward us  backward us  functions")
    for name, costs in {**rows, "total": total}.items():
        forward, backward, entered = map(sum, zip(*costs, strict=True))
        print(f"{name:26} {len(costs):5} {forward * 1e6:11.0f} {backward * 1e6:12.0f} {entered:10}")


if __name__ == "__main__":
    main()
