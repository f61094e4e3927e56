"""A config as YAML text and back; runs and checkpoints save it."""

from __future__ import annotations

import functools
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .lazy import PARTIAL, TARGET, dotted_name


class Loader(yaml.SafeLoader):
    """Plain values, and the tuples that Detectron2's configs have: no other Python tag."""


Loader.add_constructor(
    "tag:yaml.org,2002:python/tuple", lambda loader, node: tuple(loader.construct_sequence(node, deep=True))
)


def to_yaml(cfg: DictConfig) -> str:
    """YAML text of a config; callables become dotted names, so that :func:`from_yaml` can rebuild them.

    Raises:
        ValueError: a value that cannot be imported by name, such as a lambda.
    """
    return yaml.safe_dump(plain(cfg), sort_keys=False, default_flow_style=None, width=110)


def from_yaml(text: str) -> DictConfig:
    """The config of a text by :func:`to_yaml`.

    Raises:
        ValueError: the text is not a YAML mapping, or holds an interpolation that does not parse.
    """
    return read_yaml(text, Loader)


def read_yaml(text: str, loader: type[Loader]) -> DictConfig:
    """As :func:`from_yaml`, by another loader."""
    try:
        content = yaml.load(text, loader)
        if not isinstance(content, dict):
            raise ValueError("config is not a YAML mapping")
        return OmegaConf.create(content, flags={"allow_objects": True})
    except yaml.YAMLError as error:
        raise ValueError(f"config is not valid YAML: {error}") from error
    except OmegaConfBaseException as error:
        raise ValueError(f"config holds what none can: {error}") from error


def plain(value: Any) -> Any:
    """A config as dicts, lists and plain values: interpolations as written, callables as dotted names.

    Raises:
        ValueError: a callable that cannot be imported by name.
    """
    if isinstance(value, (DictConfig, ListConfig)):
        value = OmegaConf.to_container(value, resolve=False)
    if isinstance(value, dict):
        named = {TARGET: dotted_name(value[TARGET])} if callable(value.get(TARGET)) else {}
        return {str(k): plain(v) for k, v in value.items()} | named
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, functools.partial):
        if value.args:
            raise ValueError(f"config: {value} has positional arguments and cannot be saved; use keywords")
        return {TARGET: dotted_name(value.func), PARTIAL: True, **plain(value.keywords)}
    if callable(value):
        return {TARGET: dotted_name(value), PARTIAL: True}
    return value
