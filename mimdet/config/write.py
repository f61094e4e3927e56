"""Write a config as a short Python file: the nearest shipped config, and the keys that differ from it."""

from __future__ import annotations

import functools
import importlib
import inspect
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..files import write_bytes
from .counterparts import BY_NATIVE
from .lazy import PARTIAL, TARGET, dotted_name, public_target, resolve_target
from .loader import SHIPPED, find_config, load
from .serialize import plain

_WIDTH = 120
_MOST_ROUNDS = 100
_NONE = object()


def convert_config(source: str | Path, target: str | Path, force: bool = False) -> list[str]:
    """Write the config ``source``, of Detectron2 or native, as a short native config file.

    Args:
        source: as for :func:`mimdet.config.load`.
        target: Python file to write; loading it gives the config that loading ``source`` gives.
        force: replace an existing ``target``.

    Returns:
        Lines for the log.

    Raises:
        FileExistsError: ``target`` exists, without ``force``.
        ValueError: ``target`` is no Python file or is ``source``, or a part of ``source`` has no native counterpart or
            no name.
    """
    target = Path(target).expanduser()
    if target.suffix != ".py":
        raise ValueError(f"{target}: a config file ends in .py")
    if target.resolve().exists() and target.resolve().samefile(find_config(source)):
        raise ValueError(f"cannot convert {source} into itself: choose another name")
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists: choose another name, or replace it with --force")
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"{target}: no folder {target.absolute().parent}")
    cfg = load(source)
    base, text, changes = _source_text(cfg, Path(source).name)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, target.name)
        copy.write_text(text, encoding="utf-8")
        if complete(load(copy)) != complete(cfg):
            raise RuntimeError(f"the config written for {source} does not load to the same config: please report this")
    write_bytes(target, text.encode())
    return [f"{target}: {base} with {changes} changed key{'s' * (changes != 1)}; loads to the same config as {source}"]


def complete(node: Any) -> Any:
    """A config as plain values, for comparison: interpolations resolved, defaults of all arguments filled in.

    Two configs that are complete alike build the same objects with the same arguments.
    """
    if OmegaConf.is_config(node):  # omegaconf 2.4 has configs of tuples too
        keys = list(node) if isinstance(node, DictConfig) else range(len(node))
        values = {key: node[key] if key == TARGET else complete(_resolved(node, key)) for key in keys}
        return _with_defaults(values) if isinstance(node, DictConfig) else list(values.values())
    value = plain(node)
    if isinstance(value, dict):
        return _with_defaults({key: item if key == TARGET else complete(item) for key, item in value.items()})
    return [complete(item) for item in value] if isinstance(value, list) else value


def _resolved(node: Any, key: Any) -> Any:
    """The value of a key, its text if it refers to nothing, None if there is no such key."""
    try:
        return node.get(key) if isinstance(node, DictConfig) else node[key]
    except OmegaConfBaseException:  # it refers to what only an override or the training sets
        return OmegaConf.to_container(node, resolve=False)[key]


def _with_defaults(node: dict[str, Any]) -> dict[str, Any]:
    if TARGET not in node:
        return node
    name, defaults = _signature(node[TARGET])
    return {**defaults, **node, TARGET: name}


@functools.cache
def _signature(target: Callable | str) -> tuple[str, dict[str, Any]]:
    """Dotted name and default arguments of a target."""
    target = resolve_target(target)
    name = dotted_name(target)
    known = BY_NATIVE.get(name.rpartition(".")[2])
    defaults: dict[str, Any] = {}
    for each in [target, resolve_target(known.rest)] if known and known.rest else [target]:
        try:
            parameters = inspect.signature(each).parameters.values()
        except (TypeError, ValueError):  # a builtin
            continue
        defaults |= {p.name: complete(p.default) for p in parameters if p.default is not p.empty}
    return name, defaults


def _source_text(cfg: DictConfig, source: str) -> tuple[str, str, int]:
    """The nearest shipped config's name, the text of the file, and the number of its changes."""
    complete_cfg = complete(cfg)
    names = sorted(f.relative_to(SHIPPED).with_suffix("").as_posix() for f in SHIPPED.rglob("*.py"))
    names = [name for name in names if "/" not in name and not name.startswith("demo")]
    distance = {
        name: sum(_size(_at(complete_cfg, path)) for path in _differences(complete(load(name)), complete_cfg, ()))
        for name in names
    }
    base = min(names, key=distance.__getitem__)
    order = {key: index for index, key in enumerate(load(base))}
    changes = sorted(_changes(load(base), cfg), key=lambda change: order.get(change[0][0], -1))
    writer = _Writer()
    body = writer.changes(changes)
    sections = sorted(set(cfg) & set(order))
    lines = [
        f'"""{source} as a native config: {base}, changed."""\n',
        *writer.imports(),
        f'\n_base = load("{base}")',
        *(f'_base.pop("{key}")' for key in sorted(set(order) - set(sections))),
        f"{', '.join(sections)} = (_base[key] for key in sorted(_base))\n",
        *body,
    ]
    return base, "\n".join(lines).rstrip() + "\n", len(changes)


def _differences(first: Any, second: Any, path: tuple) -> Iterator[tuple]:
    """Paths at which two complete configs differ, as deep as their nodes have the same target."""
    if isinstance(first, dict) and isinstance(second, dict) and first.get(TARGET) == second.get(TARGET):
        for key in [*second, *(key for key in first if key not in second)]:
            if key not in first or key not in second:
                yield (*path, key)
            else:
                yield from _differences(first[key], second[key], (*path, key))
    elif isinstance(first, list) and isinstance(second, list) and _same_calls(first, second):
        for index, (one, other) in enumerate(zip(first, second, strict=True)):
            yield from _differences(one, other, (*path, index))
    elif first != second:
        yield path


def _size(value: Any) -> int:
    """Number of plain values in a tree."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 1 if items is None else 1 + sum(map(_size, items))


def _same_calls(first: list, second: list) -> bool:
    """Whether two lists have calls of the same targets, so that their arguments are compared one by one."""

    def targets(items: list) -> list:
        return [item.get(TARGET) if isinstance(item, dict) else None for item in items]

    return None not in targets(first) and targets(first) == targets(second) and first != second


def _changes(live: DictConfig, cfg: DictConfig) -> list[tuple[tuple, Any]]:
    """(path, value) of what turns ``live``, in place, into ``cfg``; the value ``_NONE`` deletes a key."""
    for key in [key for key in live if key not in cfg]:
        del live[key]
    changes: dict[tuple, Any] = {}
    expected = complete(cfg)
    for _ in range(_MOST_ROUNDS):
        paths = [*_differences(complete(live), expected, ())]
        if not paths:
            return list(changes.items())
        # A key that refers to another changes with it, so keys that refer to none come first.
        written = plain(live)
        free = [path for path in paths if "${" not in str(_at(written, path))]
        for path in free or paths[:1]:
            while not OmegaConf.is_config(_node(live, path[:-1])):
                path = path[:-1]  # an argument of a functools.partial: the whole of it changes
            # A second change: the reference that the source has is to another value here.
            value = _without_defaults(_at(expected, path)) if path in changes else _raw(cfg, path, expected)
            parent = _node(live, path[:-1])
            if isinstance(value, list) and type(_resolved(parent, path[-1])).__name__ == "TupleConfig":
                value = tuple(value)  # omegaconf 2.4 warns where a list replaces a tuple
            if value is _NONE:
                del parent[path[-1]]
            else:
                parent[path[-1]] = value
            changes[path] = value
    raise RuntimeError("the config does not become that of its source: please report this")


def _node(cfg: Any, path: tuple) -> Any:
    for key in path:
        cfg = cfg[key]
    return cfg


def _at(tree: Any, path: tuple) -> Any:
    for key in path:
        if isinstance(tree, dict) and key not in tree:
            return _NONE
        tree = tree[key]
    return tree


def _raw(cfg: DictConfig, path: tuple, expected: Any) -> Any:
    """The value at ``path`` as it is written in a config, or else the default that holds there."""
    value = _at(plain(cfg), path)
    return _without_defaults(_at(expected, path)) if value is _NONE else value


def _without_defaults(value: Any) -> Any:
    """A complete value without the arguments that are their defaults."""
    if isinstance(value, list):
        return [_without_defaults(item) for item in value]
    if not isinstance(value, dict):
        return value
    defaults = _signature(value[TARGET])[1] if TARGET in value else {}
    return {key: _without_defaults(item) for key, item in value.items() if defaults.get(key, _NONE) != item}


class _Writer:
    """Python source of values; ``imports`` are those that it needs."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}  # class name -> dotted name
        self._calls = self._partials = False

    def imports(self) -> list[str]:
        """Import statements."""
        modules = defaultdict(list)
        config = ["from mimdet.config import LazyCall as L"] * self._calls + ["from mimdet.config import load"]
        for name, dotted in self._names.items():
            modules[dotted.rpartition(".")[0]].append(name)
        lines = ["from functools import partial\n"] if self._partials else []
        native = [module for module in sorted(modules) if module.startswith("mimdet.")]
        others = [module for module in sorted(modules) if module not in native]
        statements = [[_import(m, modules[m]) for m in group] for group in (others, native)]
        return [*lines, *([*statements[0], ""] if others else []), *config, *statements[1]]

    def changes(self, changes: list[tuple[tuple, Any]]) -> list[str]:
        """Statements: one assignment, or one ``update`` for several keys of a section."""
        by_parent: dict[tuple, dict[Any, Any]] = defaultdict(dict)
        for path, value in changes:
            by_parent[path[:-1]][path[-1]] = value
        lines = []
        for parent, values in by_parent.items():
            node = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in parent).lstrip(".")
            lines += [f"{node}.pop({self._value(key, 0)})" for key, value in values.items() if value is _NONE]
            kept = {key: value for key, value in values.items() if value is not _NONE}
            names = all(isinstance(key, str) and key.isidentifier() for key in kept)
            if len(kept) > 1 and names and parent:
                # A dict in an update would be merged with the old one; a call replaces it.
                plain_values = {key: item for key, item in kept.items() if not isinstance(item, dict)}
                if len(plain_values) > 1:
                    lines.append(self._call(f"{node}.update", plain_values, 0))
                    kept = {key: item for key, item in kept.items() if key not in plain_values}
            for key, value in kept.items():
                place = f"{node}.{key}" if isinstance(key, str) and key.isidentifier() else f"{node}[{key!r}]"
                lines.append(f"{place if parent else key} = {self._value(value, 0, len(place) + 3)}")
        return lines

    def _value(self, value: Any, indent: int, before: int = 0) -> str:
        if isinstance(value, Mapping) and TARGET in value:
            return self._node(dict(value), indent)
        if isinstance(value, Mapping):
            items = [f"{self._value(key, 0)}: {self._value(item, indent + 4)}" for key, item in value.items()]
            return _bracket("{", items, "}", indent, before)
        if isinstance(value, (list, tuple)):
            start, end = ("(", ")") if isinstance(value, tuple) else ("[", "]")
            items = [self._value(item, indent + 4) for item in value]
            return _bracket(start, items, "," * (start == "(" and len(items) == 1) + end, indent, before)
        return (
            f'"{value}"'
            if isinstance(value, str) and value.isprintable() and not set(value) & set('"\\')
            else repr(value)
        )

    def _node(self, node: dict[str, Any], indent: int) -> str:
        dotted = _exported(node.pop(TARGET))
        name = dotted.rpartition(".")[2]
        if self._names.setdefault(name, dotted) != dotted:
            name = repr(dotted)
        partial = node.pop(PARTIAL, False)
        if partial and not node and not name.startswith("'"):
            return name
        self._partials |= partial
        self._calls |= not partial
        if partial:
            return self._call("partial", node, indent, first=[name])
        return self._call(f"L({name})", node, indent)

    def _call(self, function: str, arguments: dict[str, Any], indent: int, first: list[str] | None = None) -> str:
        items = [f"{key}={self._value(value, indent + 4, len(key) + 1)}" for key, value in arguments.items()]
        return _bracket(f"{function}(", [*(first or []), *items], ")", indent)


def _import(module: str, names: list[str]) -> str:
    line = f"from {module} import {', '.join(sorted(names))}"
    return line if len(line) <= _WIDTH else _bracket(f"from {module} import (", sorted(names), ")", 0, _WIDTH)


def _bracket(start: str, items: list[str], end: str, indent: int, before: int = 0) -> str:
    """One line, or one line for each item."""
    line = f"{start}{', '.join(items)}{end}"
    if "\n" not in line and indent + before + len(line) < _WIDTH:
        return line
    inner = " " * (indent + 4)
    return f"{start}\n" + "".join(f"{inner}{item},\n" for item in items) + " " * indent + end.lstrip(",")


def _exported(target: Any) -> str:
    """The shortest dotted name that is the same object."""
    dotted = public_target(target if isinstance(target, str) else dotted_name(target))
    built, (*modules, name) = resolve_target(dotted), dotted.split(".")
    for length in range(1, len(modules)):
        module = ".".join(modules[:length])
        try:
            if getattr(importlib.import_module(module), name, None) is built:
                return f"{module}.{name}"
        except ImportError:
            continue
    return dotted
