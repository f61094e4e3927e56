"""MIMDet: fine-tune a masked-image-modeling pre-trained ViT into an object detector (arXiv 2204.02964)."""

from importlib import import_module as _import_module

__version__ = "0.1.0"

_EXPORTS = {
    "LazyCall": "config",
    "Predictor": "predict",
    "evaluate": "engine",
    "instantiate": "config",
    "load": "config",
    "predict_files": "predict",
    "train": "engine",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str):
    """Import a public name at its first use, so that ``import mimdet`` is fast."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'mimdet' has no attribute {name!r}")
    return getattr(_import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
