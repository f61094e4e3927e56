"""Without Detectron2 only mimdet.detectron2 fails to import, with an error that names the remedy."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT


def loaded():
    """Modules of Detectron2 and of ``mimdet.detectron2``."""
    return [n for n in sys.modules if n.split(".")[0] == "detectron2" or n.startswith("mimdet.detectron2")]


@pytest.fixture
def unloaded():
    """Removes these modules from sys.modules before and after a test."""
    with pytest.MonkeyPatch.context() as patch:
        for name in loaded():
            patch.delitem(sys.modules, name)
        yield patch
        for name in loaded():
            del sys.modules[name]


def test_absent(unloaded):
    unloaded.setitem(sys.modules, "detectron2", None)
    with pytest.raises(ImportError) as caught:
        importlib.import_module("mimdet.detectron2")
    message = str(caught.value)
    assert message.startswith("mimdet.detectron2 needs Detectron2, which is not installed; get it with: pip install")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"__init__.py": "__version__ = '0.4'", "config.py": ""}, r"Detectron2 0\.4 in \S+ .*LazyConfig"),
        ({"__init__.py": "", "config.py": "import package_that_is_missing"}, "package_that_is_missing"),
        ({"__init__.py": "", "config.py": "import os; os.LINEAR"}, "AttributeError: .*LINEAR"),
        ({"config/none.txt": ""}, r"\(no version\).*LazyConfig"),
    ],
    ids=["too old", "lacks a package", "does not fit", "a bare folder"],
)
def test_useless(unloaded, tmp_path, files, reason):
    for name, text in files.items():
        file = tmp_path / "detectron2" / name
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text(text)
    unloaded.syspath_prepend(tmp_path)
    if "__init__.py" not in files:  # a folder without it gives way to any package behind it
        others = [p for p in sys.path if not (Path(p) / "detectron2" / "__init__.py").exists()]
        unloaded.setattr(sys, "path", [str(tmp_path), *others])
    with pytest.raises(ImportError, match=reason) as caught:
        importlib.import_module("mimdet.detectron2")
    assert "get its newest state with: pip install" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_else_imports_it():
    """The command prints it in one line."""
    code = (
        "import sys, runpy; sys.modules['detectron2'] = None\n"
        "import mimdet.cli, mimdet.engine, mimdet.predict\n"
        "sys.argv = ['x']\n"
        "runpy.run_module('mimdet.detectron2', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "mimdet.detectron2 needs Detectron2, which is not installed" in done.stderr.strip().splitlines()[-1]


def test_no_missing_module_of_ours_skips_a_test():
    """``importorskip`` skips for every module that is missing: one that has moved, too."""
    for file in (ROOT / "tests").rglob("*.py"):
        for name in re.findall(r'importorskip\(\s*"(\w+)', file.read_text()):
            assert name not in ("mimdet", "support"), file
