"""Read a config file: a Python LazyConfig, or the YAML that a run saved."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import itertools
import os
import re
import sys
import textwrap
import traceback
import types
from collections.abc import Iterable, Iterator
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .from_detectron2 import is_detectron2, to_native
from .overrides import apply_overrides
from .serialize import from_yaml
from .stand_ins import OLD_STYLE, PREFIX, Run, configs_of, imports_detectron2
from .trusted import UntrustedConfigError, checked

SHIPPED = Path(__file__).absolute().parents[1] / "configs"
_WIDTH = 100  # characters of a line in the list of shipped configs
_OLD_KEYS = {"_BASE_", "DATASETS", "INPUT", "MODEL", "SOLVER"}  # of Detectron2's YAML configs
_counter = itertools.count()


def find_config(path: str | Path) -> Path:
    """The config file ``path``, or the shipped config of that name.

    ``configs/mimdet_b_mask_rcnn.py`` and ``mimdet_b_mask_rcnn`` both work from any folder.

    Raises:
        FileNotFoundError: with the names of the shipped configs.
    """
    file = Path(path).expanduser()
    if file.is_file():
        return Path(os.path.abspath(file))
    relative = Path(*file.parts[1:]) if file.parts[:1] == (SHIPPED.name,) else file
    for candidate in (SHIPPED / relative, SHIPPED / f"{relative}.py"):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(_no_config(path, relative))


def _no_config(path: str | Path, relative: Path) -> str:
    """Error message for an unknown config: the nearest name, then all names by kind."""
    names = {file.relative_to(SHIPPED).with_suffix("").as_posix() for file in SHIPPED.rglob("*.py")}
    names = sorted((name for name in names if not name.startswith("common/")), key=lambda n: (n.rpartition("/")[0], n))
    asked = re.sub(r"\.(py|ya?ml)$", "", relative.as_posix())
    near = difflib.get_close_matches(asked, names, n=1) or [n for n in names if n.endswith(f"/{Path(asked).name}")]
    groups: dict[str, list[str]] = {"detectors": [], "demo": []}
    for name in names:
        folder = name.rpartition("/")[0] or ("demo" if name.startswith("demo") else "detectors")
        groups.setdefault(folder, []).append(name)
    lines = [
        f"no config file {str(path)!r}; " + (f"did you mean {near[0]!r}? " if near else "") + "shipped with mimdet:"
    ]
    for group, members in groups.items():
        shown = textwrap.wrap("  ".join(members), _WIDTH, break_on_hyphens=False, break_long_words=False)
        lines += [f"  {group}:", *(f"    {line}" for line in shown)] if members else []
    return "\n".join(lines)


def load(path: str | Path, overrides: Iterable[str] = ()) -> DictConfig:
    """Load a config and apply ``key=value`` overrides.

    A config of Detectron2's, or of the original MIMDet's, becomes a native one: see :mod:`.from_detectron2`.

    Args:
        path: a Python config (its module-level dicts and lists become the keys; relative imports reach
            other config files) or a ``.yaml`` saved by a run.
        overrides: such as ``"train.max_iter=100"``; values are read as YAML.

    A Python config is code of the caller. A ``.yaml``, which comes with weights, builds only what is listed in
    ``mimdet.config.trusted``.

    Raises:
        FileNotFoundError: no such file.
        UntrustedConfigError: a YAML file names a target that is not listed.
        ValueError: the file does not parse, or raises, with file and line; or it is a Detectron2 config with parts that
            have no native counterpart, all of which the message names.
        ImportError: the file imports a module that does not exist.
        KeyError: an override names a key that does not exist; the message suggests the nearest.
    """
    file = find_config(path)
    if file.suffix in (".yaml", ".yml"):
        try:
            cfg = from_yaml(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"config {file}: {error}") from error
        if _OLD_KEYS & set(cfg):
            raise ValueError(f"config {file} {OLD_STYLE}")
        return apply_overrides(_checked(to_native(cfg, str(file)) if is_detectron2(cfg) else cfg, file), overrides)
    if file.suffix != ".py":
        raise ValueError(f"config {file}: expected a .py or .yaml file")
    if imports_detectron2(file):
        run = Run()
        with _explained(file, run.prefix):
            sections = configs_of(run.execute(file))
        return apply_overrides(to_native(sections, str(file), run), overrides)
    cfg = _from_module(_execute(file), file)
    if is_detectron2(cfg):
        cfg = to_native(cfg, str(file))
    return apply_overrides(cfg, overrides)


def _checked(cfg: DictConfig, file: Path) -> DictConfig:
    try:
        return checked(cfg)
    except UntrustedConfigError as error:
        raise UntrustedConfigError(
            f"config {file} is refused, and nothing of it was run: {error}. A YAML config may build only what the "
            "shipped configs build. If you trust it, pass the Python config that it was saved from "
            "(--config-file CONFIG.py)"
        ) from error


def _execute(file: Path) -> types.ModuleType:
    """Import a config file afresh, inside temporary packages that make its relative imports work."""
    prefix = f"{PREFIX}{next(_counter)}"
    folders = [*reversed(file.parents)]
    name = prefix
    for folder in folders:
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
        parent, name = name, f"{name}.d"
    keep, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        with _explained(file, prefix):
            return importlib.import_module(f"{parent}.{file.stem}")
    finally:
        sys.dont_write_bytecode = keep
        for module in [m for m in sys.modules if m == prefix or m.startswith(prefix + ".")]:
            del sys.modules[module]


@contextlib.contextmanager
def _explained(file: Path, prefix: str) -> Iterator[None]:
    """Errors of config files, whose modules have names of this prefix, get file and line."""
    try:
        yield
    except SyntaxError as error:
        line = f", line {error.lineno}" if error.lineno else ""
        raise ValueError(f"config {error.filename or file}{line}: {error.msg}") from error
    except Exception as error:
        kind = ImportError if isinstance(error, ImportError) else ValueError
        raise kind(f"config {_where(error, prefix) or file}: {_what(error, prefix)}") from error


def _where(error: Exception, prefix: str) -> str:
    """File and line of the innermost config frame in a traceback; "" if there is none."""
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__", "").startswith(f"{prefix}."):
            place = f"{frame.f_code.co_filename}, line {line}"
    return place


def _what(error: Exception, prefix: str) -> str:
    """An error as one line, without the names of the temporary packages."""
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    text = re.sub(rf"{prefix}(\.d)*\.?", "", str(message))
    text = " ".join(text.split())
    return text if isinstance(error, ImportError) else f"{type(error).__name__}: {text}"


def _from_module(module: types.ModuleType, file: Path) -> DictConfig:
    values = {}
    for key, value in vars(module).items():
        if key.startswith("_") or not isinstance(value, (dict, list, DictConfig, ListConfig)):
            continue
        try:
            values[key] = (
                OmegaConf.create(value, flags={"allow_objects": True}) if isinstance(value, (dict, list)) else value
            )
        except OmegaConfBaseException as error:
            raise ValueError(f"config {file}: {key}: {_what(error, module.__name__)}") from error
    return DictConfig(values, flags={"allow_objects": True})
