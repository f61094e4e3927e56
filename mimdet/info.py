"""Versions, devices and implementations of this machine and installation."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil

import torch

_PACKAGES = (
    "mimdet",
    "torch",
    "torchvision",
    "triton",
    "timm",
    "numpy",
    "omegaconf",
    "lightning-fabric",
    "pycocotools",
    "faster-coco-eval",
    "flash-attn",
    "detectron2",
)
# Implementations of an operation, in the order of `mimdet info`.
KERNELS = ("triton", "cuda", "flash_attn", "torch_varlen", "sdpa", "cpp", "aten_cpu", "eager")


def versions() -> list[tuple[str, str]]:
    """(package, version), "not installed" for absent ones."""
    rows = [("python", platform.python_version())]
    for name in _PACKAGES:
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    return rows


def devices() -> list[tuple[str, str]]:
    """(device, description) of the processor and of every GPU that PyTorch sees."""
    capability = torch.backends.cpu.get_cpu_capability()
    rows = [("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads in use, {capability}")]
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        rows.append((f"cuda:{i}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"))
    if len(rows) == 1:
        built = f"PyTorch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build of PyTorch"
        rows.append(("cuda", f"no GPU found ({built})"))
    for tool in ("nvcc", "g++"):
        rows.append((tool, shutil.which(tool) or "not found"))
    return rows


def implementations() -> list[tuple[str, str, str]]:
    """(part, implementation in use, reason) for every part that has several."""
    gpu = torch.cuda.is_available()
    fast_eval = importlib.util.find_spec("faster_coco_eval") is not None
    if not gpu:
        precision = ("off", "no GPU; train.amp.dtype=bf16 asks for it")
    elif torch.cuda.get_device_capability()[0] >= 8:
        precision = ("bf16", "the GPU computes in bfloat16")
    else:
        precision = ("fp16", "the GPU has no bfloat16 arithmetic")
    return [
        ("operations (auto)", *_kernels_in_use()),
        ("mixed precision (auto)", *precision),
        (
            "COCO metrics",
            "faster-coco-eval" if fast_eval else "pycocotools",
            "installed" if fast_eval else "faster-coco-eval is not installed (pip install 'mimdet[fast-eval]')",
        ),
    ]


def kernels() -> tuple[list[tuple[str, ...]], list[str]]:
    """Implementations of every operation, and whether they run here.

    Returns:
        Rows of operation, device, and a state for each of ``KERNELS``: "chosen" by auto, "yes", "no" with the number
        of a reason, or "-" where there is none; and the reasons, numbered from 1.
    """
    from .kernels import table

    states: dict[tuple[str, str], dict[str, str]] = {}
    reasons: list[str] = []
    for row in table():
        if not row.usable and row.reason not in reasons:
            reasons.append(row.reason)
        state = "chosen" if row.chosen else "yes" if row.usable else f"no ({reasons.index(row.reason) + 1})"
        states.setdefault((row.op, row.device), {})[row.impl] = state
    return [(*key, *(row.get(impl, "-") for impl in KERNELS)) for key, row in states.items()], reasons


def kernel_limits() -> list[tuple[str, str, str]]:
    """(operation, implementations, supported shapes) for implementations that do not support all shapes."""
    from .kernels import table

    limits: dict[tuple[str, str], list[str]] = {}
    for row in table("cpu"):
        if row.limits:
            limits.setdefault((row.op, row.limits), []).append(row.impl)
    return [(op, ", ".join(impls), text) for (op, text), impls in limits.items()]


def _kernels_in_use() -> tuple[str, str]:
    rows, _ = kernels()
    chosen = {impl for row in rows for impl, state in zip(KERNELS, row[2:], strict=True) if state == "chosen"}
    return ", ".join(sorted(chosen)), "MIMDET_KERNELS, mimdet.kernels.use or impl= choose another"
