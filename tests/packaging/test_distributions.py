"""Source archive and wheel: what is in them, and that the wheel works away from the checkout."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from support.paths import ROOT

from mimdet.kernels import build
from mimdet.testing import recording

HAS_COMPILER = any(map(shutil.which, ("g++", "c++", "clang++")))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the packaged files: building leaves files beside the sources."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("mimdet", "kernels", "csrc", "bench", "configs"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    # Reuses what other tests compiled.
    (folder / "setup.cfg").write_text(f"[build]\nbuild_temp = {build.cache_folder()}\n")
    return folder


def make(source, folder, *options, **variables):
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), *options, str(source)]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def archives(source, tmp_path_factory):
    """The source archive, and the wheel made from it with all that can be compiled here."""
    folder = tmp_path_factory.mktemp("archives")
    cuda = {"MIMDET_BUILD_CUDA": "1", "MIMDET_CUDA_ARCHS": "90"} if build.find_nvcc() else {}
    make(source, folder, **cuda)
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(archives):
    return archives[1]


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The unpacked wheel, as in site-packages."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(code, cwd, path=None, **variables):
    env = {**os.environ, "PYTHONPATH": str(path) if path else "", **variables}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)


def names_in(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_only_mimdet_is_installed(wheel):
    names = names_in(wheel)
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"mimdet"}
    assert "mimdet/kernels/__init__.py" in names
    assert {"mimdet/bench/cli.py", "mimdet/bench/paper.json"} <= set(names)
    assert "mimdet/configs/mimdet_b_mask_rcnn.py" in names
    assert "mimdet/configs/common/coco.py" in names
    assert not [n for n in names if "tests" in n.split("/") or n.rsplit("/", 1)[-1].startswith("test_")]


def test_recordings_are_in_the_wheel_and_small(wheel):
    with zipfile.ZipFile(wheel) as archive:
        sizes = {Path(i.filename).name: i.file_size for i in archive.infolist() if "/recordings/" in i.filename}
    assert set(sizes) == set(recording.SUMS)
    assert sum(sizes.values()) < 3e6


def test_the_pytest_plugin_is_announced(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/entry_points.txt")]
        assert "[pytest11]\nmimdet_parity = mimdet.parity.pytest_plugin\n" in archive.read(name).decode()


def test_parity_runs_from_the_wheel_in_any_folder(installed, tmp_path):
    code = (
        "import sys; from mimdet.cli import main; "
        "sys.argv = ['mimdet', 'parity', '--quick', '--only', 'bias_gelu-[et]*-small-forward']; main()"
    )
    done = run(code, tmp_path, installed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith("cases, all within their budgets")


def test_archives_carry_the_sources_of_the_kernels(archives):
    sources = {p.name for p in build.CSRC.iterdir()}
    assert {n.rsplit("/", 1)[1] for n in names_in(archives[1]) if "/csrc/" in n} == sources
    with tarfile.open(archives[0]) as archive:
        names = [n.split("/", 1)[1] for n in archive.getnames() if "/" in n]
    assert {n.rsplit("/", 1)[1] for n in names if n.startswith("mimdet/csrc/")} == sources
    assert {"setup.py", "pyproject.toml", "LICENSE", "mimdet/kernels/build.py"} <= set(names)


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
def test_wheel_is_for_this_platform_and_any_python_3(wheel):
    assert "mimdet/kernels/" + build.CPU_LIBRARY in names_in(wheel)
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")


@pytest.mark.skipif(build.find_nvcc() is None, reason="no nvcc (install the CUDA toolkit, or set CUDA_HOME)")
def test_wheel_carries_cuda_kernels_where_asked_for(wheel):
    assert "mimdet/kernels/" + build.CUDA_LIBRARY in names_in(wheel)


# Away from the checkout, without what is optional, and forbidden to compile.
ALONE = """
import json, sys, warnings
sys.modules["triton"] = sys.modules["detectron2"] = None
import mimdet, mimdet.kernels
light = sorted({"torch", "numpy"} & set(sys.modules))
import mimdet.cli, torch
from mimdet import Predictor, evaluate, instantiate, load, train
from mimdet.kernels import table
from mimdet.kernels.group_norm_gelu.api import group_norm_gelu
with torch.device("meta"):
    model = instantiate(load("configs/mimdet_b_mask_rcnn.py").model)
results = [group_norm_gelu(torch.ones(1, 4, 2, 2), torch.ones(4), torch.ones(4), 1e-6) for _ in range(2)]
print(json.dumps({
    "files": [mimdet.__file__, mimdet.kernels.__file__],
    "light": light,
    "parameters": sum(p.numel() for p in model.parameters()),
    "chosen": sorted({row.impl for row in table("cpu") if row.chosen}),
    "reasons": sorted({row.reason for row in table("cpu") if not row.usable}),
    "result": results[1].flatten()[0].item(),
}))
"""


@pytest.fixture(scope="module")
def alone(installed, tmp_path_factory):
    done = run(ALONE, tmp_path_factory.mktemp("elsewhere"), installed, MIMDET_BUILD="0")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"stderr": done.stderr}


def test_the_wheel_alone_has_what_a_model_needs(alone, installed):
    """Importing it loads the standard library alone."""
    assert all(Path(file).is_relative_to(installed) for file in alone["files"]), alone["files"]
    assert alone["light"] == []
    assert alone["parameters"] == 127954768
    assert "Triton is not installed (pip install triton)" in alone["reasons"]
    assert alone["result"] == pytest.approx(0.841345, abs=1e-6)


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
def test_wheel_runs_its_compiled_kernels(alone):
    assert alone["chosen"] == ["aten_cpu", "cpp"]
    assert alone["stderr"] == ""


@pytest.fixture(scope="module")
def pure(source, tmp_path_factory):
    """The wheel that MIMDET_BUILD=0 makes."""
    folder = tmp_path_factory.mktemp("pure")
    make(source, folder, "--wheel", MIMDET_BUILD="0")
    return next(folder.glob("*.whl"))


def test_wheel_without_compiled_kernels_is_for_every_platform(pure):
    assert pure.name.endswith("-py3-none-any.whl")
    assert not [n for n in names_in(pure) if n.endswith(".so")]


def test_wheel_without_compiled_kernels_runs_eager_with_one_note(pure, tmp_path):
    with zipfile.ZipFile(pure) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import torch\n"
        "from mimdet.kernels.bias_gelu.api import bias_gelu\n"
        "results = [bias_gelu(torch.zeros(2), torch.ones(2)) for _ in range(2)]\n"
        "print(f'{results[1][0].item():.4f}')"
    )
    done = run(code, tmp_path, tmp_path / "site", MIMDET_BUILD="0")
    assert done.stdout.strip() == "0.8413", done.stderr
    assert done.stderr.count("mimdet: C++ kernels are off, plain PyTorch runs instead") == 1
    assert "MIMDET_BUILD=0 forbids building it now" in done.stderr


# setup.py with torch out of reach, as in pip's isolated builds.
ISOLATED = """
import runpy, sys
sys.modules["torch"] = None
sys.argv = ["setup.py", "-q", "build", "-b", sys.argv[1]]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.mark.parametrize("insist", [False, True], ids=["default", "MIMDET_BUILD=1"])
def test_building_without_torch_fails_only_where_kernels_are_insisted_on(source, tmp_path, insist):
    variables = {"MIMDET_BUILD": "1"} if insist else {}
    command = [sys.executable, "-c", ISOLATED, str(tmp_path)]
    done = subprocess.run(command, cwd=source, env={**os.environ, **variables}, capture_output=True, text=True)
    if insist:
        assert done.returncode != 0
        assert "import of torch halted" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert "kernels not compiled now (compile_cpu); they will be at first use" in done.stderr
    assert (tmp_path / "lib" / "mimdet" / "csrc").is_dir()


def test_checkout_does_not_shadow_the_other_kernels_package():
    done = run("import kernels", ROOT)
    assert "this folder is mimdet.kernels" in done.stderr


def test_checkout_works_without_installing():
    done = run("import mimdet.kernels, mimdet; print(mimdet.load('demo').train.output_dir)", ROOT)
    assert done.stdout.strip() == "output/demo", done.stderr


def test_unknown_attribute_is_an_attribute_error():
    import mimdet

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mimdet.nothing  # noqa: B018
    assert "train" in dir(mimdet)
