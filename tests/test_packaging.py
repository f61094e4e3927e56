"""The wheel: what is in it, and that it works away from the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The wheel's content alone, as site-packages would have it."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(code, cwd, path=None):
    env = {**os.environ, "PYTHONPATH": str(path) if path else ""}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)


def test_only_mimdet_is_installed(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"mimdet"}
    assert "mimdet/kernels/__init__.py" in names
    assert {"mimdet/bench/__main__.py", "mimdet/bench/paper.json"} <= set(names)
    assert "mimdet/configs/mimdet_b_mask_rcnn.py" in names
    assert "mimdet/configs/common/coco.py" in names
    assert not [n for n in names if "test" in n.lower()]


def test_installed_wheel_imports_and_finds_its_configs(installed, tmp_path):
    code = (
        "import mimdet, mimdet.kernels, torch\n"
        f"assert mimdet.__file__.startswith({str(installed)!r}), mimdet.__file__\n"
        f"assert mimdet.kernels.__file__.startswith({str(installed)!r}), mimdet.kernels.__file__\n"
        "cfg = mimdet.load('configs/mimdet_b_mask_rcnn.py')\n"
        "with torch.device('meta'): model = mimdet.instantiate(cfg.model)\n"
        "print(sum(p.numel() for p in model.parameters()))"
    )
    done = run(code, tmp_path, installed)
    assert done.stdout.strip() == "127954768", done.stderr


def test_import_is_light(installed, tmp_path):
    code = "import sys, mimdet, mimdet.kernels; print(sorted({'torch', 'triton', 'detectron2'} & set(sys.modules)))"
    assert run(code, tmp_path, installed).stdout.strip() == "[]"


def test_works_without_triton_and_detectron2(installed, tmp_path):
    code = (
        "import sys\n"
        "sys.modules['triton'] = sys.modules['detectron2'] = None\n"
        "from mimdet import Predictor, evaluate, instantiate, load, train\n"
        "import mimdet.cli; print('ok')"
    )
    done = run(code, tmp_path, installed)
    assert done.stdout.strip() == "ok", done.stderr


def test_checkout_does_not_shadow_the_other_kernels_package():
    done = run("import kernels", ROOT)
    assert "this folder is mimdet.kernels" in done.stderr


def test_checkout_works_without_installing(tmp_path):
    done = run("import mimdet.kernels, mimdet; print(mimdet.load('demo').train.output_dir)", ROOT)
    assert done.stdout.strip() == "output/demo", done.stderr


def test_unknown_attribute_is_an_attribute_error():
    import mimdet

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mimdet.nothing  # noqa: B018
    assert "train" in dir(mimdet)


GELU = (
    "import os; os.environ['MIMDET_BUILD'] = '0'\n"
    "import torch\n"
    "from mimdet.kernels.group_norm_gelu.api import group_norm_gelu\n"
    "arguments = torch.ones(1, 4, 2, 2), torch.ones(4), torch.zeros(4), 1e-6\n"
)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_wheel_carries_compiled_kernels_that_run(wheel, installed, tmp_path):
    assert (installed / "mimdet" / "kernels" / "mimdet_cpu.abi3.so").is_file()
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    code = (
        "import os; os.environ['MIMDET_BUILD'] = '0'\n" + GELU + "print(group_norm_gelu(*arguments, impl='cpp').sum())"
    )
    done = run(code, tmp_path, installed)
    assert done.stdout.strip() == "tensor(0.)", done.stderr


def test_wheel_without_compiled_kernels_runs_eager_with_one_note(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, env={**os.environ, "MIMDET_BUILD": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    wheel = next(tmp_path.glob("*.whl"))
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [n for n in archive.namelist() if n.endswith(".so")]
        archive.extractall(tmp_path / "site")
    code = GELU + "print([group_norm_gelu(*arguments).sum()] * 2)"
    done = run(code, tmp_path, tmp_path / "site")
    assert "tensor(0.)" in done.stdout, done.stderr
    assert done.stderr.count("C++ kernels are off") == 1
