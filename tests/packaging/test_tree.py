"""The package is one tree: a static analyzer finds all of it, and nothing else is in it."""

import importlib

import griffe
import pytest
from support.paths import ROOT

PACKAGE = ROOT / "mimdet"


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
