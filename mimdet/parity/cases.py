"""What is compared: operations against PyTorch, models against recordings, Detectron2 and the original."""

from __future__ import annotations

import fnmatch
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..kernels import OPS, dispatch
from ..testing import op_cases, recording
from ..testing.budget import Measurement
from ..testing.memory import poisoned_allocations
from ..testing.op_cases import DIFFERENTIABLE, DTYPES
from . import models

LEVELS = ("quick", "default", "full")
DEVICES = ("cpu", "cuda")
# Minutes under the interpreter, an hour in all layouts.
_LONG = ("wide", "model")
# Of the model's memory, hence compared with every dtype and size.
_MODEL_LAYOUTS = ("contiguous", "channels_last")


class BadUseError(ValueError):
    """What was asked for cannot be compared; the message is one line."""


@dataclass(frozen=True)
class ParityCase:
    """One comparison.

    Attributes:
        op: an operation, or a part of the model: a key of ``models.PARTS``.
        implementation: its name in ``mimdet.kernels.dispatch``; "auto" of a model.
        device: "cpu" or "cuda". Triton on "cpu" runs under its interpreter.
        dtype: "fp32", "bf16" or "fp16".
        layout: of the main inputs, in ``op_cases.LAYOUTS``.
        size: in ``op_cases.SIZES``, or which of the recordings.
        direction: "forward" or "backward".
    """

    op: str
    implementation: str
    device: str
    dtype: str
    layout: str
    size: str
    direction: str

    @property
    def id(self) -> str:
        """The fields, with hyphens."""
        return "-".join(vars(self).values())

    @property
    def interpreted(self) -> bool:
        """Whether it needs a process with TRITON_INTERPRET=1."""
        return self.implementation == "triton" and self.device == "cpu"

    def measure(self, original: Path | None = None) -> list[Measurement]:
        """Errors of all tensors of the case.

        Args:
            original: checkout of the original MIMDet, for the cases that need it.

        Raises:
            AssertionError: a shape or a dtype is wrong, or a number is not finite.
            mimdet.testing.RecordingError: a recording is missing or altered.
        """
        if self.op in OPS:
            return _measure_op(self)
        measure = models.PARTS[self.op]
        return measure(self, original) if self.op == "original" else measure(self)


@dataclass(frozen=True)
class Unavailable:
    """An implementation that cannot run here, and why."""

    op: str
    implementation: str
    device: str
    dtype: str
    reason: str


def select(
    level: str = "default",
    only: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    original: Path | None = None,
) -> tuple[list[ParityCase], list[Unavailable]]:
    """The cases that can run here, and the implementations that cannot.

    Args:
        level: one of ``LEVELS``; each has all cases of the one before.
        only: glob if it has one of ``*?[``, else a part of the id.
        device: one of ``DEVICES``; None: the CPU, and the GPU where there is one.
        dtype: one of ``op_cases.DTYPES``; None: all.
        original: checkout of the original MIMDet to compare with.

    Raises:
        BadUseError: no case matches, or none that matches can run here; says why.
        mimdet.testing.RecordingError: a recording that the cases need is missing or altered.
    """
    gpu = torch.cuda.is_available()
    devices = [device] if device else ["cpu", "cuda"] if gpu else ["cpu"]
    if "cuda" in devices and not gpu:
        raise BadUseError("--device cuda: PyTorch finds no GPU (install a driver, and a build of PyTorch for it)")
    if original is not None:
        models.check_original(original)
    interpreter = device == "cpu" or not gpu
    listed, missing = [], []
    for place in devices:
        for case, reason in (*_operations(level, place, interpreter), *_models(level, place, original)):
            if dtype not in (None, case.dtype) or not matches(only, case.id):
                continue
            if reason is None:
                listed.append(case)
            else:
                missing.append(Unavailable(case.op, case.implementation, case.device, case.dtype, reason))
    missing = list(dict.fromkeys(missing))
    if any(case.op in models.PARTS for case in listed):
        recording.check()
    if listed:
        return listed, missing
    asked = " with ".join(t for t in (f"--only {only}" if only else "", f"--dtype {dtype}" if dtype else "") if t)
    if missing:
        why = "; ".join(dict.fromkeys(f"{m.op} {m.implementation}: {m.reason}" for m in missing))
        raise BadUseError(f"{asked}: nothing that matches can run here: {why}")
    raise BadUseError(f"{asked}: no case matches at the level {level} (ids are such as {_EXAMPLE.id})")


_EXAMPLE = ParityCase("bias_gelu", "cpp", "cpu", "bf16", "contiguous", "small", "forward")


def matches(pattern: str | None, name: str) -> bool:
    """Whether a case's id is meant by ``--only``."""
    if pattern is None:
        return True
    return fnmatch.fnmatchcase(name, pattern) if any(c in pattern for c in "*?[") else pattern in name


def chosen_by_auto(devices: Iterable[str]) -> dict[str, str]:
    """``op device dtype`` -> the implementation that auto takes there."""
    return {
        f"{row.op} {device} {name}": row.impl
        for device in devices
        for name, dtype in DTYPES.items()
        for row in dispatch.table(device, dtype)
        if row.chosen
    }


def _operations(level: str, device: str, interpreter: bool) -> Iterator[tuple[ParityCase, str | None]]:
    """Cases of all operations, with the reason where one cannot run."""
    for op, operation in dispatch.operations().items():
        for implementation, registered in operation.implementations.items():
            for dtype in op_cases.dtypes_of(op):
                interpreted = interpreter and implementation == "triton" and device == "cpu"
                if registered.device != "any" and not interpreted and (device == "cpu") != (registered.device == "CPU"):
                    continue  # made for the other device
                if interpreted:
                    reason = _interpreter_refuses(registered, dtype)
                else:
                    reason = registered.refusal(_call(device, dtype, equal_lengths=True))
                for layout in op_cases.layouts_of(op):
                    for size in op_cases.sizes_of(op):
                        if in_level(level, interpreted, dtype, layout, size):
                            for direction in ("forward", "backward")[: 1 + (op in DIFFERENTIABLE)]:
                                yield ParityCase(op, implementation, device, dtype, layout, size, direction), reason


def _call(device: str, dtype: str, equal_lengths: bool) -> dispatch.Call:
    return dispatch.Call(torch.device(device), (DTYPES[dtype],), equal_lengths=equal_lengths)


def _interpreter_refuses(registered: dispatch.Implementation, dtype: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if registered.dtypes and DTYPES[dtype] not in registered.dtypes:
        return f"no kernel for {DTYPES[dtype]}"
    return None


def in_level(level: str, interpreted: bool, dtype: str, layout: str, size: str) -> bool:
    """Whether a level has an operation's cases of this dtype, layout and size."""
    ours = layout in _MODEL_LAYOUTS
    if level == "quick":
        if interpreted:
            return ours and (size, dtype) in (("small", "fp32"), ("small", "bf16"), ("faint", "fp32"))
        return size in ("small", "faint", "padded") and (ours or dtype == "fp32")
    if level == "default":
        if interpreted:
            return (size == "small" and (ours or dtype == "fp32")) or (ours and dtype == "fp32" and size not in _LONG)
        return ours or size == "small" or (dtype == "fp32" and size in ("faint", "padded"))
    return not interpreted or size not in _LONG or (size, dtype, ours) == ("wide", "fp32", True)


def _models(level: str, device: str, original: Path | None) -> Iterator[tuple[ParityCase, str | None]]:
    gpu = device == "cuda"
    implementations = {
        "quick": ("auto",),
        "default": ("auto", "eager"),
        "full": ("auto", "eager", *(("triton", "cuda") if gpu else ("cpp",))),
    }[level]
    for op, size, direction, dtypes in models.listed(level):
        if op == "original" and original is None:
            continue
        for implementation in ("auto",) if op in models.BESIDE else implementations:
            for dtype in dtypes:
                if dtype != "fp32" and (implementation == "eager" or (dtype == "fp16" and not gpu)):
                    continue  # eager is what the 16-bit dtypes are measured by
                case = ParityCase(op, implementation, device, dtype, "contiguous", size, direction)
                yield case, models.refusal(op) or _model_refuses(implementation, device, dtype)


def _model_refuses(implementation: str, device: str, dtype: str) -> str | None:
    if implementation in ("auto", "eager"):
        return None
    registered = dispatch.operations()["bias_gelu"].implementations[implementation]
    return registered.refusal(_call(device, dtype, equal_lengths=True))


def _measure_op(case: ParityCase) -> list[Measurement]:
    arguments = {"dtype": DTYPES[case.dtype], "layout": case.layout, "device": case.device}
    sizes = dict(op_cases.SIZES[case.size])
    registered = dispatch.operations()[case.op].implementations[case.implementation]
    if registered.refusal(_call(case.device, case.dtype, equal_lengths=False)) is not None:
        sizes["batch"] = 1  # it takes sequences of one length
    example = op_cases.case(case.op, **sizes, **arguments)
    with poisoned_allocations():
        # Other numbers of the same shapes come first: what a cache or a buffer keeps of them must not come back.
        for each in (_other_numbers(example), example):
            actual = _results(each, case)
    return op_cases.errors(example, actual)


def _results(example: op_cases.Case, case: ParityCase) -> dict[str, torch.Tensor]:
    if case.direction == "backward":
        tensors = op_cases.differentiate(example, case.implementation)
        return {name: value for name, value in tensors.items() if name.startswith("grad_")}
    with torch.no_grad():
        outputs = example(case.implementation)
    return op_cases.named(outputs if isinstance(outputs, tuple) else (outputs,))


def _other_numbers(example: op_cases.Case) -> op_cases.Case:
    others = example.others
    if not example.inputs:
        others = {k: v.flip(0) if _is_float(v) else v for k, v in others.items()}
    return example._replace(inputs={k: -v for k, v in example.inputs.items()}, others=others)


def _is_float(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def parse(fields: dict) -> ParityCase:
    """A case from its fields as JSON holds them."""
    return ParityCase(**{name: fields[name] for name in ParityCase.__dataclass_fields__})
