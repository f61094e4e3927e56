"""Fused operations of the backbone, imported as ``mimdet.kernels``.

Every operation has the same face: ``impl="auto" | "triton" | "cuda" | "cpp" | "eager"``, see ``selector``.
attention_varlen takes more words than these, see there.
"""

if __name__ != "mimdet.kernels":
    # From a checkout's root this folder would shadow the package of that name on PyPI.
    raise ImportError(
        "this folder is mimdet.kernels; import it by that name, or run from outside the mimdet checkout "
        "to reach another package called 'kernels'"
    )

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the lazy names below, for static tools
    from .registry import table
    from .selector import KernelUnavailableError, use

# Public name -> module. An operation and its folder share a name, so the folders' own __init__ stay empty and
# callers import from mimdet.kernels.<op>.api when they want one operation alone.
_EXPORTS = {
    "KernelUnavailableError": "selector",
    "table": "registry",
    "use": "selector",
}
OPS = (
    "add_layer_norm",
    "attention_varlen",
    "bias_gelu",
    "gather_add_pos",
    "group_norm_gelu",
    "layer_norm_gelu",
    "sample_tokens",
    "scatter_fill",
)

__all__ = ["OPS", "KernelUnavailableError", "table", "use"]


def __getattr__(name: str):
    """Import the public names when they are first asked for: this package needs no torch until it is used."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'mimdet.kernels' has no attribute {name!r}")
    return getattr(_import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
