"""No arrow upward: packages import what CONTRIBUTING.md's table says that they may."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINKED = ("kernels", "bench", "configs")  # symbolic links inside the package


def allowed():
    """Package -> what it may import, from the table; None is everything."""
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("| package | may import |\n")[1]
    rows = re.findall(r"^\| `(\w+)` \| ?(.*?) ?\|$", section.split("\n\n")[0], re.M)
    return {name: None if text.startswith("everything") else set(re.findall(r"`(\w+)`", text)) for name, text in rows}


def packages():
    """Package or module of mimdet -> its files."""
    folder = ROOT / "mimdet"
    files = {path.name: sorted(path.rglob("*.py")) for path in folder.iterdir() if any(path.glob("*.py"))}
    files |= {name: sorted((ROOT / name).rglob("*.py")) for name in LINKED}
    return files | {p.stem: [p] for p in folder.glob("*.py") if not p.stem.startswith("__")}


def imports(package, file):
    """The other packages of mimdet that a file imports, at its top or inside functions."""
    base = ROOT if package in LINKED else ROOT / "mimdet"
    parts = ["mimdet", *file.relative_to(base).parts]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            start = parts[: len(parts) - node.level] if node.level else []
            module = [*start, *(node.module or "").split(".")] if node.module else start
            names = [module] if len(module) > 1 else [[*module, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            continue
        yield from {name[1] for name in names if name[0] == "mimdet" and len(name) > 1} - {package}


def test_every_package_has_a_row():
    assert set(packages()) == set(allowed())


@pytest.mark.parametrize("package", sorted(packages()))
def test_imports_are_allowed(package):
    may = allowed()[package]
    if may is not None:
        known = set(allowed())
        wrong = {
            f"{file.relative_to(ROOT)} imports {name}"
            for file in packages()[package]
            for name in imports(package, file)
            if name in known - may
        }
        assert not wrong


def test_an_import_upward_is_noticed(tmp_path, monkeypatch):
    file = tmp_path / "mimdet" / "modeling" / "upward.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "from ..engine import train\nfrom mimdet import cli\nimport mimdet.bench.cli\nfrom .vit import Block\n"
    )
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert set(imports("modeling", file)) == {"engine", "cli", "bench"}
