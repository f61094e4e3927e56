"""``pytest --mimdet-parity``: the cases as tests of another project, and nothing without the option."""

import os
import subprocess
import sys

import pytest
from support.paths import ROOT

CASE = "bias_gelu-eager-cpu-fp32-contiguous-small-forward"
# Whatever plugins are installed here, this one is loaded once.
COMMAND = [sys.executable, "-m", "pytest", "-p", "mimdet.parity.pytest_plugin", "-p", "no:cacheprovider", "-q"]


@pytest.fixture
def project(tmp_path):
    """A project with one test, which sees what pytest has imported."""
    (tmp_path / "test_light.py").write_text(
        "import sys\n\n\ndef test_light():\n"
        "    assert 'mimdet.parity.pytest_plugin' in sys.modules\n"
        "    assert not {'torch', 'numpy', 'mimdet.parity.cases', 'mimdet.testing'} & set(sys.modules)\n"
    )
    return tmp_path


def run(project, *options):
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""}
    return subprocess.run([*COMMAND, *options], cwd=project, env=env, capture_output=True, text=True)


def test_without_the_option_nothing_is_imported(project):
    done = run(project)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


def test_cases_are_tests(project):
    options = "--mimdet-parity", "--mimdet-parity-level", "quick", "-vv", "-m", "mimdet_parity"
    done = run(project, *options, "-k", "bias_gelu-eager-cpu-fp32-contiguous-small or no_such_test")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"mimdet-parity::{CASE} PASSED" in done.stdout
    assert "2 passed" in done.stdout


def test_a_failed_case_is_one_line(project):
    (project / "conftest.py").write_text(
        "from mimdet.kernels.bias_gelu import reference\n\nreference.bias_gelu = lambda x, bias: x + bias\n"
    )
    done = run(project, "--mimdet-parity", "--mimdet-parity-level", "quick", "-k", CASE)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{CASE}: output0: error" in done.stdout
    assert "Traceback" not in done.stdout


def test_the_entry_point_is_announced():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.entry-points.pytest11]\nmimdet_parity = "mimdet.parity.pytest_plugin"\n' in text
