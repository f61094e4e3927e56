"""Run a Detectron2 config file without Detectron2: names stand in for its modules, classes and functions.

Only config files see the stand-ins: each runs with an ``__import__`` of its own in its ``__builtins__``, and neither
``sys.modules`` nor ``sys.meta_path`` changes. Relative imports are Detectron2's: every import statement runs the file
anew, and the dicts that it takes become configs.
"""

from __future__ import annotations

import ast
import builtins
import itertools
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from . import model_zoo
from .counterparts import ORIGINAL
from .lazy import LazyCall

PREFIX = "_mimdet_config_"  # dotted_name refuses to save what a module of this name defines
_OURS = "mimdet.detectron2"
_ROOTS = ("detectron2", "fvcore", "models", _OURS)
_ORIGINAL_MODULES = ("modeling", "mimdet", "benchmarking")
OLD_STYLE = (
    "is of Detectron2's YAML configs, whose keys are not those of a LazyConfig: write a LazyConfig in Python, or start "
    "from a shipped config, such as mimdet_b_mask_rcnn"
)
SECTIONS = ("dataloader", "lr_multiplier", "mae_checkpoint", "model", "optimizer", "train")  # of a whole config
_FACTS = "__facts__"
_counter = itertools.count()


@dataclass(frozen=True)
class Facts:
    """What is known of a stand-in.

    Attributes:
        name: dotted name.
        run: the load that it belongs to.
        needs_detectron2: whether it is of a user's module that imports Detectron2, which is not installed.
        target, args, kwargs, where: of a call: what is called with which arguments, in which file and line.
    """

    name: str
    run: Run
    needs_detectron2: bool = False
    target: Facts | None = None
    args: tuple = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""


class StandIn:
    """A dotted name of Detectron2, or of a module that needs it: attributes, calls and subclasses are names too.

    All its attributes but ``facts_of`` are names of the module.
    """

    def __init__(self, facts: Facts):
        self.__dict__[_FACTS] = facts

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        facts = facts_of(self)
        return facts.kwargs[name] if name in facts.kwargs else facts.run.attribute(facts, name)

    def __call__(self, *args: Any, **kwargs: Any) -> StandIn:
        return facts_of(self).run.call(facts_of(self), args, kwargs)

    def __mro_entries__(self, bases: tuple) -> tuple[type]:
        module, _, name = facts_of(self).name.rpartition(".")
        return (type(name, (), {"__module__": module, "__qualname__": name}),)

    def __deepcopy__(self, memo: dict) -> StandIn:
        return self  # omegaconf copies the values that it takes

    def __or__(self, other: Any) -> StandIn:
        return self  # in annotations

    __ror__ = __or__

    def _no_value(self, *_: Any) -> Any:
        raise TypeError(f"{self!r} has no value, as Detectron2's code is not run: write the value itself")

    __iter__ = __len__ = __getitem__ = __float__ = __int__ = __index__ = _no_value
    __add__ = __mul__ = __truediv__ = __setattr__ = __setitem__ = __delattr__ = _no_value

    def __repr__(self) -> str:
        return facts_of(self).name


def facts_of(stand_in: StandIn) -> Facts:
    """What is known of a stand-in."""
    return vars(stand_in)[_FACTS]


class Run:
    """One load of a config: its files, the calls of stand-ins in it, and the datasets that it registers.

    Attributes:
        calls: calls of stand-ins, in order.
        datasets: name -> (annotation file, folder of images).
        skipped: modules of the user's that a config imports and that need Detectron2, which is not installed.
    """

    def __init__(self) -> None:
        self.prefix = f"{PREFIX}{next(_counter)}"
        self.calls: list[Facts] = []
        self.datasets: dict[str, tuple[str, str]] = {}
        self.skipped: list[str] = []
        self._original = _models_are_the_originals()
        self._special = {
            "detectron2.LazyCall": lambda: LazyCall,
            "detectron2.LazyConfig": lambda: types.SimpleNamespace(load=self.load, load_rel=self._load_relative),
            "detectron2.get_config": lambda: self._get_config,
            "detectron2.register_coco_instances": lambda: self._register,
            "detectron2.get_cfg": lambda: _refuse_yaml("get_cfg"),
            "detectron2.CfgNode": lambda: _refuse_yaml("CfgNode"),
            f"{_OURS}.from_native": lambda: _from_native,
            f"{_OURS}.use_detectron2": lambda: lambda *sections: None,
        }

    def execute(self, file: Path) -> dict[str, Any]:
        """The variables of a config file after it ran."""
        names = {
            "__name__": f"{self.prefix}.{file.stem}",
            "__file__": str(file),
            "__package__": self.prefix,
            "__builtins__": {**vars(builtins), "__import__": self._import},
        }
        exec(compile(file.read_bytes(), str(file), "exec", dont_inherit=True), names)
        return names

    def load(self, filename: str, keys: str | tuple[str, ...] | None = None) -> Any:
        """As ``LazyConfig.load``: all sections of a file, or those of ``keys``."""
        from .loader import find_config, load

        file = find_config(filename)
        if file.suffix != ".py":
            sections: Any = load(file)
        else:
            sections = self.execute(file) if imports_detectron2(file) else load(file)
        if isinstance(keys, str):
            return as_config(sections[keys])
        if keys is not None:
            return tuple(as_config(sections[key]) for key in keys)
        return DictConfig(configs_of(sections), flags={"allow_objects": True})

    def attribute(self, of: Facts, name: str) -> Any:
        """An attribute of a stand-in."""
        root = _OURS if of.name == _OURS else of.name.partition(".")[0]
        special = self._special.get(f"{root}.{name}")
        return special() if special else StandIn(Facts(f"{of.name}.{name}", self, of.needs_detectron2))

    def call(self, target: Facts, args: tuple, kwargs: dict[str, Any]) -> StandIn:
        """The result of a call of a stand-in."""
        frame = sys._getframe(1)
        while frame is not None and not frame.f_globals.get("__name__", "").startswith(PREFIX):
            frame = frame.f_back
        where = f"{frame.f_code.co_filename}, line {frame.f_lineno}" if frame else ""
        facts = Facts(f"{target.name}()", self, target.needs_detectron2, target, args, kwargs, where)
        self.calls.append(facts)
        return StandIn(facts)

    def _import(self, name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        """``__import__`` of config files."""
        if level:
            return self._import_relative(name, Path(globals["__file__"]), fromlist or (), level)
        root = _root(name)
        if root is not None and (root != "models" or self._original):
            if "*" in (fromlist or ()):
                raise ImportError(f"from {name} import *: name what the config uses, as Detectron2's code is not run")
            return StandIn(Facts(name if fromlist else root.partition(".")[0], self))
        try:
            return builtins.__import__(name, globals, locals, fromlist, level)
        except ModuleNotFoundError as error:
            if _root(error.name or "") is None:
                raise
            self.skipped.append(name)
            return StandIn(Facts(name if fromlist else name.partition(".")[0], self, needs_detectron2=True))

    def _import_relative(self, name: str, file: Path, fromlist: tuple[str, ...], level: int) -> types.ModuleType:
        path = _relative_file(name, file, level)
        if path is None:
            raise ImportError(f"cannot import {'.' * level}{name}: a relative import takes another config file")
        values = self.execute(path)
        module = types.ModuleType(values["__name__"])
        vars(module).update((key, value) for key, value in values.items() if key != "__builtins__")
        for key in fromlist:
            if key != "*" and key not in values:
                raise ImportError(f"cannot import name {key!r} from {path}")
        for key in values if "*" in fromlist else fromlist:
            if not key.startswith("__"):
                setattr(module, key, as_config(values[key]))
        return module

    def _load_relative(self, filename: str, keys: Any = None) -> Any:
        folder = Path(sys._getframe(1).f_code.co_filename).parent
        return self.load(str(folder / filename), keys)

    def _get_config(self, path: str, trained: bool = False) -> DictConfig:
        """As ``detectron2.model_zoo.get_config``: of the values here, or of the files of an installed Detectron2."""
        if trained:
            raise ValueError(f"model_zoo.get_config({path!r}, trained=True): the weights are of another backbone")
        if path in model_zoo.PARTS:
            return model_zoo.PARTS[path]()
        spec = PathFinder.find_spec("detectron2")
        for folder in spec.submodule_search_locations or () if spec else ():
            for configs in (Path(folder, "model_zoo", "configs"), Path(folder).parent / "configs"):
                if path.endswith(".py") and (configs / path).is_file():
                    return self.load(str(configs / path))
        raise ImportError(
            f"model_zoo.get_config({path!r}) needs the files of Detectron2, which is not installed: copy that file "
            f"beside your config and import it relatively. Without Detectron2 there are {', '.join(model_zoo.PARTS)}"
        )

    def _register(self, name: str, metadata: Any, json_file: str, image_root: str) -> None:
        self.datasets[name] = (str(json_file), str(image_root))


def imports_detectron2(file: Path, seen: set[Path] | None = None) -> bool:
    """Whether a config file, or one that it imports relatively, imports what has a stand-in.

    A file that does not parse does not: loading it says why.
    """
    seen = set() if seen is None else seen
    if file in seen or not file.is_file():
        return False
    seen.add(file)
    try:
        nodes = [*ast.walk(ast.parse(file.read_bytes()))]
    except (SyntaxError, ValueError):
        return False
    imported = [(alias.name, ()) for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    imported += [(node.module, [a.name for a in node.names]) for node in froms if not node.level]
    if any(_stands_in(module, names) for module, names in imported):
        return True
    relative = [_relative_file(node.module or "", file, node.level) for node in froms if node.level]
    return any(path is not None and imports_detectron2(path, seen) for path in relative)


def configs_of(values: Any) -> dict[str, Any]:
    """The sections among the variables of a config file: dicts and configs, as Detectron2 chooses them.

    A stand-in as a section of a whole config is one too, for the conversion to report.
    """
    kinds = (dict, DictConfig, ListConfig)
    return {
        key: as_config(values[key])
        for key in values
        if not key.startswith("_")
        and (isinstance(values[key], kinds) or (key in SECTIONS and isinstance(values[key], StandIn)))
    }


def as_config(value: Any) -> Any:
    """A dict as a ``DictConfig``; other values unchanged."""
    return OmegaConf.create(value, flags={"allow_objects": True}) if isinstance(value, dict) else value


def _stands_in(module: str, names: list[str] | tuple) -> bool:
    root = _root(module)
    if root != "models":
        return root is not None
    known = {*ORIGINAL, *_ORIGINAL_MODULES}
    return {*module.split(".")[1:2], *names} <= known and _models_are_the_originals()


def _root(module: str) -> str | None:
    return next((root for root in _ROOTS if module == root or module.startswith(f"{root}.")), None)


def _models_are_the_originals() -> bool:
    """Whether ``import models`` would find the original MIMDet's package, or none."""
    spec = PathFinder.find_spec("models")
    if spec is None or spec.origin is None:  # a folder of weights may be called models: a namespace package
        return True
    return any(Path(folder, "mimdet.py").is_file() for folder in spec.submodule_search_locations or ())


def _relative_file(name: str, file: Path, level: int) -> Path | None:
    if not name or level > len(file.parents):
        return None
    path = file.parents[level - 1].joinpath(*name.split("."))
    path = path.with_name(f"{path.name}.py")
    return path if path.is_file() else None


def _from_native(file: str) -> list[Any]:
    """The sections of the native config of the same name, as they are."""
    from .loader import load

    path = Path(file).absolute()
    folder = next(parent for parent in path.parents if parent.name == "detectron2")
    cfg = load(folder.parent / path.relative_to(folder))
    return [cfg[name] for name in sorted(cfg)]


def _refuse_yaml(name: str) -> Any:
    raise ValueError(f"detectron2.config.{name} {OLD_STYLE}")
