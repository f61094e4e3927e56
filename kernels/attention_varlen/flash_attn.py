"""The flash-attn packages, all optional: version 3 on Hopper, 4 on Hopper and Blackwell, else 2."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch

from ..dispatch import Call, no_gpu


class Version(NamedTuple):
    """A generation of the package, the GPUs that it has kernels for, and the head dims it takes."""

    number: int
    module: str
    capabilities: range
    head_dims: tuple[int, ...]


_EIGHTHS = tuple(range(8, 257, 8))
# On one GPU the first that fits is the fastest.
_VERSIONS = (
    Version(3, "flash_attn_interface", range(9, 10), _EIGHTHS),
    Version(4, "flash_attn.cute.interface", range(9, 12), (64, 96, 128)),
    Version(2, "flash_attn", range(8, 13), _EIGHTHS),
)


def supports(call: Call) -> str | None:
    """flash-attn needs an NVIDIA GPU, one of its packages, and a head dim that it has kernels for."""
    reason = no_gpu("flash-attn's kernels", call.device, rocm=False)
    if reason:
        return reason
    head_dims = sorted({dim for version in _usable(call.device) for dim in version.head_dims})
    if not head_dims:
        return "flash-attn for this GPU is not installed (pip install flash-attn)"
    if call.head_dim not in head_dims:
        return f"it takes head dims {', '.join(map(str, head_dims))}, got {call.head_dim} (use triton or eager)"
    return None


def attention(qkv: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, scale: float) -> torch.Tensor:
    """Packed qkv (T, 3, heads, head_dim) -> (T, heads, head_dim)."""
    number, function = _function(qkv.device, qkv.shape[-1])
    options = {"softmax_scale": scale, "deterministic": torch.are_deterministic_algorithms_enabled()}
    if number == 2:
        return function(qkv, cu_seqlens, max_seqlen, **options)
    lengths = {f"cu_seqlens_{side}": cu_seqlens for side in "qk"} | {f"max_seqlen_{side}": max_seqlen for side in "qk"}
    out = function(*qkv.unbind(1), **lengths, **options)
    # Some releases of 3 and 4 return (out, lse).
    return out[0] if isinstance(out, tuple) else out


@torch.compiler.assume_constant_result
def _function(device: torch.device, head_dim: int) -> tuple[int, Callable[..., torch.Tensor]]:
    """Number of the version that takes this head dim, and its function; 2 takes qkv in one piece."""
    version = next(version for version in _usable(device) if head_dim in version.head_dims)
    name = "flash_attn_varlen_qkvpacked_func" if version.number == 2 else "flash_attn_varlen_func"
    return version.number, getattr(_module(version.module), name)


def _usable(device: torch.device) -> list[Version]:
    major = torch.cuda.get_device_capability(device)[0]
    return [v for v in _VERSIONS if major in v.capabilities and _module(v.module) is not None]


@functools.cache
def _module(name: str) -> ModuleType | None:
    try:
        module = importlib.import_module(name)
    except ImportError:  # not installed, or built for another PyTorch
        return None
    return module if hasattr(module, "flash_attn_varlen_func") else None
