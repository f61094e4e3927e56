"""``LazyCall``: a call as a config node, and ``instantiate``, which makes the call."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig

TARGET = "_target_"
PARTIAL = "_partial_"


class LazyCall:
    """``LazyCall(f)(a=1)`` is a config node that :func:`instantiate` turns into ``f(a=1)``.

    The node is an omegaconf ``DictConfig`` whose ``_target_`` is the callable and whose other keys are
    its keyword arguments. Detectron2's ``LazyCall`` is the same, so either library can build nodes of the other.
    """

    def __init__(self, target: Callable | str):
        if not (callable(target) or isinstance(target, str)):
            raise TypeError(f"LazyCall takes a callable or its dotted name, not {type(target).__name__}")
        # omegaconf would turn a dataclass into a config of its fields: the node has its name instead.
        self.target = dotted_name(target) if dataclasses.is_dataclass(target) else target

    def __call__(self, **kwargs: Any) -> DictConfig:
        return DictConfig({TARGET: self.target, **kwargs}, flags={"allow_objects": True})


def resolve_target(target: Callable | str) -> Callable:
    """The callable behind a ``_target_``, which may be a dotted name such as ``torch.nn.Linear``.

    A module is found by its name in ``sys.modules``, not as an attribute of its package: torch deletes submodules
    such as ``torch.optim.adamw`` from theirs.

    Raises:
        ImportError: a name that cannot be imported, or that names nothing callable.
    """
    if callable(target):
        return target
    result = None
    if isinstance(target, str):
        result = _locate(target)
        if result is None and (public := public_target(target)) != target:
            result = _locate(public)  # a module of an earlier version
    if not callable(result):
        raise ImportError(f"config: no callable {target!r}; {TARGET} must name an importable function or class")
    return result


def public_target(name: str) -> str:
    """``mimdet.<package>.<Name>`` for ``mimdet.<package>.<module>.<Name>``; other names unchanged.

    Saved configs have these public names, which stay the same when modules move.
    """
    parts = name.split(".")
    return ".".join([*parts[:2], parts[-1]]) if parts[0] == "mimdet" and len(parts) > 3 else name


def dotted_name(target: Callable) -> str:
    """The name to import ``target`` by; ``mimdet.<package>.<Name>`` if a package of mimdet exports it.

    Raises:
        ValueError: ``target`` has no such name; it is a lambda, for example.
    """
    name = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"
    if "<" in name or name.startswith((".", "_mimdet_config_")) or name.endswith("."):
        raise ValueError(f"config: {target!r} cannot be saved by name; define it in an importable module")
    public = public_target(name)
    return public if public != name and _locate(public) is target else name


def _locate(name: str) -> Any:
    """The object of a dotted name: the longest importable module, then attributes; None if there is no module."""
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        return None
    for length in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:length])
        try:
            result = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
                continue  # the last part is a class, or there is no such module
            raise ImportError(f"config: {TARGET} {name!r}: module {module} needs {error.name}: {error}") from error
        except Exception as error:
            raise ImportError(
                f"config: {TARGET} {name!r}: module {module} fails with {type(error).__name__}: {error}"
            ) from error
        for part in parts[length:]:
            result = getattr(result, part, None)
        return result
    return None


def instantiate(cfg: Any, **extra: Any) -> Any:
    """Build the object that a config node describes, children first.

    Args:
        cfg: a config node; anything that is not a config, list or mapping is returned as it is.
        extra: keyword arguments for the outermost call; they replace those in ``cfg``.

    Raises:
        ImportError: a ``_target_`` that is a string and cannot be imported.
        TypeError, ValueError: the callable refuses its arguments; the message names the callable and the key.
    """
    if isinstance(cfg, (list, tuple, ListConfig)):
        return [instantiate(item) for item in cfg]
    if not isinstance(cfg, (dict, DictConfig)):
        return cfg
    return _call(cfg, extra) if TARGET in cfg else {key: instantiate(value) for key, value in cfg.items()}


def _call(cfg: Mapping[str, Any], extra: dict[str, Any]) -> Any:
    target = resolve_target(cfg[TARGET])
    kwargs = {k: instantiate(v) for k, v in cfg.items() if k not in (TARGET, PARTIAL, *extra)} | extra
    if cfg.get(PARTIAL, False):
        return functools.partial(target, **kwargs)
    try:
        return target(**kwargs)
    except (TypeError, ValueError) as error:
        key = _key(cfg)
        if type(error) not in (TypeError, ValueError) or (type(error) is ValueError and not key):
            raise  # it has a text of its own
        place = f"config key {key}" if key else ""
        if type(error) is TypeError:
            name = getattr(target, "__qualname__", repr(target))
            place += f"{', ' if key else ''}while building {name} with arguments {sorted(kwargs)}"
        raise type(error)(f"{error} ({place})") from error


def _key(node: Mapping[str, Any]) -> str:
    """Where a node is in its config, as overrides name it; "" at the top, or for no config."""
    # omegaconf names an item of a list a[0], but a0 where it is the last part.
    key = node._get_full_key(TARGET).rpartition(".")[0] if isinstance(node, DictConfig) else ""
    return key.replace("[", ".").replace("]", "")
