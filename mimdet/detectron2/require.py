"""Detectron2 is not a dependency: the error where it is missing or does not work."""

from __future__ import annotations

import importlib
import sys

# Module -> a name that old releases lack, or whose import fails where the module does not work.
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
        ImportError: Detectron2 is missing, too old, or incompatible with installed packages; says how to get it.
    """
    try:
        for module, name in _NEEDED.items():
            getattr(importlib.import_module(module), name)
    except Exception as error:  # its releases raise many types with newer libraries
        raise ImportError(_reason(error), name=__package__) from error


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == "detectron2":
        return f"{__package__} needs Detectron2, which is not installed; get it with: {_HOW}"
    detectron2 = sys.modules.get("detectron2")
    where = ", ".join(getattr(detectron2, "__path__", ["?"]))
    return (
        f"{__package__}: Detectron2 {getattr(detectron2, '__version__', '(no version)')} in {where} does not work here "
        f"({type(error).__name__}: {error}). Add what is missing, or get its newest state with: {_HOW}"
    )
