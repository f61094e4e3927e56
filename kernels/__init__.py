"""Fused operations of the model: ``from mimdet.kernels import add_layer_norm``.

Every operation takes ``impl="auto" | "triton" | "cuda" | "cpp" | "eager"``, see ``dispatch`` and docs/kernels.md.
"""

if __name__ != "mimdet.kernels":
    # sys.path of a checkout's root would find this folder instead of PyPI's package 'kernels'.
    raise ImportError(
        "this folder is mimdet.kernels; import it by that name, or run from outside the mimdet checkout "
        "to reach another package called 'kernels'"
    )

import sys as _sys
from importlib import import_module as _import_module
from types import ModuleType as _ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the lazy names below, for static tools
    from .add_layer_norm.api import add_layer_norm
    from .ahead import KernelCompilationError, warm_up
    from .attention_varlen.api import attention_varlen, attention_varlen_packed
    from .batch_norm.api import batch_norm
    from .bias_gelu.api import bias_gelu
    from .dispatch import KernelUnavailableError, table, use
    from .gather_add_pos.api import gather_add_pos
    from .group_norm_gelu.api import group_norm_gelu
    from .layer_norm_gelu.api import layer_norm_gelu
    from .match_boxes.api import match_boxes
    from .nms_slots.api import nms_slots
    from .rasterize_polygons.api import rasterize_polygons
    from .roi_align_levels.api import roi_align_levels
    from .sample_tokens.api import sample_packed_tokens, sample_tokens
    from .scatter_fill.api import scatter_fill
    from .tensors import valid_mask

__all__ = [
    "OPS",
    "KernelCompilationError",
    "KernelUnavailableError",
    "add_layer_norm",
    "attention_varlen",
    "attention_varlen_packed",
    "batch_norm",
    "bias_gelu",
    "gather_add_pos",
    "group_norm_gelu",
    "layer_norm_gelu",
    "match_boxes",
    "nms_slots",
    "rasterize_polygons",
    "roi_align_levels",
    "sample_packed_tokens",
    "sample_tokens",
    "scatter_fill",
    "table",
    "use",
    "valid_mask",
    "warm_up",
]
# Public names that are no operation's folder -> module.
_OTHERS = {
    "KernelCompilationError": "ahead",
    "KernelUnavailableError": "dispatch",
    "attention_varlen_packed": "attention_varlen.api",
    "sample_packed_tokens": "sample_tokens.api",
    "table": "dispatch",
    "use": "dispatch",
    "valid_mask": "tensors",
    "warm_up": "ahead",
}
OPS = tuple(name for name in __all__ if name != "OPS" and name not in _OTHERS)
_EXPORTS = _OTHERS | {op: f"{op}.api" for op in OPS}


class _Package(_ModuleType):
    """Importing an operation's folder sets an attribute of its name here: keep the function, which shares the name."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in OPS and isinstance(value, _ModuleType)):
            super().__setattr__(name, value)


_sys.modules[__name__].__class__ = _Package


def __getattr__(name: str):
    """Import the public names when they are first asked for: this package needs no torch until it is used."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'mimdet.kernels' has no attribute {name!r}")
    globals()[name] = value = getattr(_import_module(f".{_EXPORTS[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
