"""Device, versions, load and date of a measurement; nothing that names the machine or its owner."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path, PurePath

import torch

from ..info import versions

_VARIABLES = (
    "OMP_NUM_THREADS",
    "THP_MEM_ALLOC_ENABLE",
    "GLIBC_TUNABLES",
    "MIMDET_KERNELS",
    "TORCHINDUCTOR_MAX_AUTOTUNE",
)
_PACKAGES = ("python", "mimdet", "torch", "triton", "timm", "numpy")


def describe(device: str) -> dict:
    """Device, versions, load, date and commit, as JSON holds them."""
    return {
        "device": device_name(device),
        "versions": {name: version for name, version in versions() if name in _PACKAGES},
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_average": [round(v, 2) for v in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
    }


def device_name(device: str) -> str:
    """Name of the processor or the GPU, and the instructions that PyTorch uses."""
    if torch.device(device).type == "cuda":
        gpu = torch.cuda.get_device_properties(torch.device(device))
        return f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    return f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}"


def command() -> str:
    """The command line, without the folders of absolute paths."""
    arguments = [PurePath(a).name if PurePath(a).is_absolute() else a for a in sys.argv[1:]]
    return shlex.join(["mimdet", *arguments])


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Of the checkout that runs, with "+" when files differ from it; None for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "setup.py").is_file():
        return None
    try:
        commit, changes = (
            subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True)
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")
