"""Read a config file: Python in the lazy form, or the YAML that a run leaves behind."""

from __future__ import annotations

import importlib
import itertools
import sys
import types
from collections.abc import Iterable
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf

from .overrides import apply_overrides
from .serialize import from_yaml

_SHIPPED = Path(__file__).absolute().parents[1] / "configs"
_counter = itertools.count()


def find_config(path: str | Path) -> Path:
    """The config file meant by ``path``: as given, or among those that the package ships.

    ``configs/mimdet_b_mask_rcnn.py`` and ``mimdet_b_mask_rcnn`` both work from any folder.

    Raises:
        FileNotFoundError: with the names of the shipped configs.
    """
    given = Path(path).expanduser()
    if given.is_file():
        return given.resolve()
    relative = Path(*given.parts[1:]) if given.parts[:1] == (_SHIPPED.name,) else given
    for candidate in (_SHIPPED / relative, _SHIPPED / relative.with_name(relative.name + ".py")):
        if candidate.is_file():
            return candidate.resolve()
    shipped = sorted(str(p.relative_to(_SHIPPED)) for p in _SHIPPED.rglob("*.py"))
    names = [n for n in shipped if "common" not in Path(n).parts]
    raise FileNotFoundError(f"no config file {str(path)!r}; shipped with mimdet: {', '.join(names) or 'none'}")


def load(path: str | Path, overrides: Iterable[str] = ()) -> DictConfig:
    """Load a config and apply ``key=value`` overrides.

    Args:
        path: a Python config (its module-level dicts and lists become the keys; relative imports reach
            other config files) or a ``.yaml`` saved by a run.
        overrides: such as ``"train.max_iter=100"``; values are read as YAML.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file does not parse.
        KeyError: an override names a key that does not exist; the message suggests the nearest.
    """
    file = find_config(path)
    if file.suffix in (".yaml", ".yml"):
        cfg = from_yaml(file.read_text(encoding="utf-8"))
    elif file.suffix == ".py":
        cfg = _from_module(_execute(file))
    else:
        raise ValueError(f"config {file}: expected a .py or .yaml file")
    return apply_overrides(cfg, overrides)


def _execute(file: Path) -> types.ModuleType:
    """Run a config file anew, inside throw-away packages that make its relative imports work."""
    prefix = f"_mimdet_config_{next(_counter)}"
    folders = [*reversed(file.parents)]
    name = prefix
    for folder in folders:
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
        parent, name = name, f"{name}.d"
    keep, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        return importlib.import_module(f"{parent}.{file.stem}")
    except SyntaxError as error:
        raise ValueError(f"config {error.filename}, line {error.lineno}: {error.msg}") from error
    finally:
        sys.dont_write_bytecode = keep
        for module in [m for m in sys.modules if m == prefix or m.startswith(prefix + ".")]:
            del sys.modules[module]


def _from_module(module: types.ModuleType) -> DictConfig:
    values = {
        key: OmegaConf.create(value, flags={"allow_objects": True}) if isinstance(value, (dict, list)) else value
        for key, value in vars(module).items()
        if not key.startswith("_") and isinstance(value, (dict, list, DictConfig, ListConfig))
    }
    return DictConfig(values, flags={"allow_objects": True})
