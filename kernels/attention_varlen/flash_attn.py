"""The flash-attn packages, of which none is required: version 3 on Hopper, 4 on Hopper and Blackwell, else 2."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch

from .. import registry


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


def can_run(device: str, dtype: torch.dtype) -> str | None:
    """flash-attn needs 16-bit tensors on an NVIDIA GPU and one of its packages."""
    reason = registry.wrong_dtype("flash-attn kernel", dtype, (torch.bfloat16, torch.float16))
    reason = reason or registry.no_gpu("flash-attn's kernels", device, rocm=False)
    if reason is None and not _usable():
        return "flash-attn for this GPU is not installed (pip install flash-attn)"
    return reason


@torch.compiler.assume_constant_result
def head_dims() -> tuple[int, ...]:
    """Those that an installed version takes on this GPU."""
    return tuple(sorted({dim for version in _usable() for dim in version.head_dims}))


def attention(
    qkv: torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float,
) -> torch.Tensor:
    """Packed qkv (T, 3, heads, head_dim), or q, k, v (T, heads, head_dim) -> (T, heads, head_dim)."""
    packed = isinstance(qkv, torch.Tensor)
    head_dim = (qkv if packed else qkv[0]).shape[-1]
    options = {"softmax_scale": scale, "deterministic": torch.are_deterministic_algorithms_enabled()}
    if packed and _number(head_dim) == 2:
        return _function(head_dim, "flash_attn_varlen_qkvpacked_func")(qkv, cu_seqlens, max_seqlen, **options)
    lengths = {f"cu_seqlens_{side}": cu_seqlens for side in "qk"} | {f"max_seqlen_{side}": max_seqlen for side in "qk"}
    function = _function(head_dim, "flash_attn_varlen_func")
    out = function(*(qkv.unbind(1) if packed else qkv), **lengths, **options)
    # Some releases of 3 and 4 give the logarithm of the softmax's sum as well.
    return out[0] if isinstance(out, tuple) else out


@torch.compiler.assume_constant_result
def _number(head_dim: int) -> int:
    return next(v.number for v in _usable() if head_dim in v.head_dims)


@torch.compiler.assume_constant_result
def _function(head_dim: int, name: str) -> Callable[..., torch.Tensor]:
    return getattr(next(_module(v.module) for v in _usable() if head_dim in v.head_dims), name)


def _usable() -> list[Version]:
    major = torch.cuda.get_device_capability()[0]
    return [v for v in _VERSIONS if major in v.capabilities and _module(v.module) is not None]


@functools.cache
def _module(name: str) -> ModuleType | None:
    try:
        module = importlib.import_module(name)
    except ImportError:  # not installed, or built for another PyTorch
        return None
    return module if hasattr(module, "flash_attn_varlen_func") else None
