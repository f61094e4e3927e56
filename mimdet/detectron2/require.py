"""Detectron2 is never a dependency: what is said where it is missing or does not work."""

from __future__ import annotations

import importlib
import sys

# Module -> a name in it that not every release has, or whose import shows that the module works.
_NEEDED = {
    "detectron2": "__path__",
    "detectron2.config": "LazyConfig",
    "detectron2.engine.defaults": "create_ddp_model",
    "detectron2.evaluation": "COCOEvaluator",
    "detectron2.modeling": "GeneralizedRCNN",
}
_HOW = 'pip install --no-build-isolation "git+https://github.com/facebookresearch/detectron2"'


def require_detectron2() -> None:
    """Import what this package needs of Detectron2.

    Raises:
        ImportError: Detectron2 is absent, too old, or does not fit what is installed; says which, and how to get it.
    """
    try:
        for module, name in _NEEDED.items():
            getattr(importlib.import_module(module), name)
    except Exception as error:  # its releases fail in many ways on libraries younger than they are
        raise ImportError(_reason(error), name=__package__) from error


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == "detectron2":
        return f"{__package__} needs Detectron2, which is not installed; get it with: {_HOW}"
    found = sys.modules.get("detectron2")
    where = ", ".join(getattr(found, "__path__", ["?"]))
    return (
        f"{__package__}: Detectron2 {getattr(found, '__version__', '(no version)')} in {where} does not work here "
        f"({type(error).__name__}: {error}). Add what is missing, or get its newest state with: {_HOW}"
    )
