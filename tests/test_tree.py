"""The package is one tree: every import of it resolves, and none goes up a floor."""

import ast
import importlib
from pathlib import Path

import griffe
import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "mimdet"

# A module imports from its own floor's package or from floors below it.
FLOORS = (
    {"kernels", "files", "pos_embed"},
    {"config", "checkpoint", "info"},
    {"modeling", "data", "visualize"},
    {"detection", "evaluation"},
    {"engine"},
    {"predict"},
    {"demo", "detectron2"},
    {"bench"},
    {"cli"},
    {"__main__"},
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def sources(folder=PACKAGE):
    """Every module of the package but the configs, which import the package as a user's file does."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in ("configs", "csrc", "results", "__pycache__"):
            yield from sources(path)
        elif path.suffix == ".py":
            yield path


def imported(path):
    """(subpackage of mimdet, line) of what a module imports from other subpackages."""
    package = ["mimdet", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            names = [[*base, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            continue
        yield from ((name[1], node.lineno) for name in names if name[0] == "mimdet" and len(name) > 1)


def test_no_import_goes_up_a_floor():
    wrong = []
    for path in sources():
        module = path.relative_to(PACKAGE).with_suffix("")
        here = module.parts[0]
        if here == "__init__":
            continue  # exports lazily what is above it
        for target, line in imported(path):
            if target != here and FLOOR.get(target, -1) >= FLOOR[here]:
                wrong.append(f"{module}, line {line}: {target} is on floor {FLOOR[target]}, {here} on {FLOOR[here]}")
    assert not wrong, "\n".join(wrong)


def test_every_module_has_a_floor():
    assert {p.relative_to(PACKAGE).with_suffix("").parts[0] for p in sources()} - {"__init__"} == set(FLOOR)


def test_a_static_analyser_resolves_every_import():
    loader = griffe.GriffeLoader(search_paths=[str(PACKAGE.parent)])
    package = loader.load("mimdet")
    unresolved, _ = loader.resolve_aliases(implicit=True, external=False)
    aliases = (package.get_member(name.removeprefix("mimdet.")) for name in unresolved)
    inside = {a.path: a.target_path for a in aliases if a.target_path.split(".")[0] == "mimdet"}
    assert not inside
    assert "group_norm_gelu" in package["kernels"].modules  # links are followed


@pytest.mark.parametrize("name", ["mimdet.setup", "mimdet.mimdet", "mimdet.tests"])
def test_the_checkout_is_not_in_the_package(name):
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)
