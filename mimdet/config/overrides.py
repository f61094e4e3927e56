"""``key=value`` overrides from the command line, refused when the key does not exist."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .lazy import PARTIAL, TARGET, resolve_target


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with two changes for command lines: ``8e-5`` is a number, ``2024-01-05`` is text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$"), list("-+.0123456789")
)


def split_override(override: str) -> tuple[str, Any]:
    """``"a.b=1"`` -> ``("a.b", 1)``; the value is read as YAML, so lists and null work."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"override {override!r} is not of the form key=value")
    try:
        return key.strip(), _restore(yaml.load(text.translate(_HIDE), _Loader)) if text else ""
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"override {override!r}: the value is not valid YAML ({error})") from error


# YAML refuses lone surrogates, which Python uses for bytes of a non-ASCII path in a locale without UTF-8: private
# characters replace them while YAML parses.
_SURROGATES = range(0xDC80, 0xDD00)
_PRIVATE = 0x10FF00
_HIDE = {surrogate: _PRIVATE + index for index, surrogate in enumerate(_SURROGATES)}
_SHOW = {private: surrogate for surrogate, private in _HIDE.items()}


def _restore(value: Any) -> Any:
    if isinstance(value, dict):
        return {_restore(k): _restore(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_restore(v) for v in value]
    if isinstance(value, str):
        # JSON, whose strings are YAML, writes a character beyond 16 bits as two surrogates.
        joined = value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        return joined.translate(_SHOW)
    return value


def apply_overrides(cfg: DictConfig, overrides: Iterable[str]) -> DictConfig:
    """Set each ``key=value`` in ``cfg`` (in place) and return it.

    A key must exist already, or be an argument of the node's callable.

    Raises:
        KeyError: unknown key; the message suggests the nearest existing one.
        ValueError: an override that is not ``key=value``, or whose value no config can hold.
    """
    for override in overrides:
        key, value = split_override(override)
        parts = key.split(".")
        for depth in range(1, len(parts) + 1):
            _check(cfg, parts[: depth - 1], parts[depth - 1], key)
        try:
            OmegaConf.update(cfg, key, value, merge=False, force_add=True)
        except OmegaConfBaseException as error:
            raise ValueError(f"override {override!r}: {str(error).splitlines()[0]}") from error
    return cfg


def _check(cfg: DictConfig, path: list[str], name: str, key: str) -> None:
    node = OmegaConf.select(cfg, ".".join(path)) if path else cfg
    if isinstance(node, ListConfig):
        if not (name.isdigit() and int(name) < len(node)):
            raise KeyError(f"config key {key!r}: {'.'.join(path)!r} is a list of {len(node)}, it has no {name!r}")
        return
    if not isinstance(node, DictConfig):
        raise KeyError(f"config key {key!r}: {'.'.join(path)!r} is a plain value and has no key {name!r}")
    if name in node or name in _arguments(node):
        return
    here = difflib.get_close_matches(name, [*map(str, node), *_arguments(node)], n=1)
    corrected = [".".join([*path, *here, *key.split(".")[len(path) + 1 :]])] if here else []
    known = _all_keys(cfg)
    same_leaf = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    hint = corrected + same_leaf + near
    raise KeyError(f"unknown config key {key!r}" + (f"; did you mean {hint[0]!r}?" if hint else ""))


def _arguments(node: DictConfig) -> list[str]:
    """Names of the arguments of a lazy call's target."""
    if TARGET not in node:
        return []
    try:
        parameters = inspect.signature(resolve_target(node[TARGET])).parameters.values()
    except (TypeError, ValueError, ImportError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _all_keys(node: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for name in node:
        if name in (TARGET, PARTIAL):
            continue
        keys.append(prefix + str(name))
        try:
            child = node[name]
        except OmegaConfBaseException:  # an interpolation to a value that is set only at run time
            continue
        if isinstance(child, DictConfig):
            keys += _all_keys(child, f"{prefix}{name}.")
    return keys
