"""Package layout, and compilation of the C++ kernels. Everything declarative is in pyproject.toml."""

import os
import runpy
import shutil
import sys
from pathlib import Path

from setuptools import find_namespace_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel, get_platform
from setuptools.command.build_py import build_py

BUILD = Path(__file__).absolute().parent / "mimdet" / "kernels" / "build.py"


class BuildKernels(build_py):
    """Copies the package, and adds compiled kernels where torch and a compiler are available.

    MIMDET_BUILD=0 leaves them out; MIMDET_BUILD=1 makes a failure fatal; MIMDET_BUILD_CUDA=1 compiles for CUDA too.
    Without torch or a compiler (pip's isolated builds have no torch) the package is pure Python and compiles at first
    use on the user's machine.
    """

    def run(self):
        super().run()
        folder = Path(self.build_lib) / "mimdet" / "kernels"
        for stale in folder.glob("*.so"):
            stale.unlink()
        if os.environ.get("MIMDET_BUILD") == "0" or self.editable_mode:
            return  # an editable install compiles at first use, and again whenever a source changes
        build = runpy.run_path(str(BUILD))
        builds = ["compile_cpu"] + (["compile_cuda"] if os.environ.get("MIMDET_BUILD_CUDA") == "1" else [])
        for name in builds:
            try:
                library = build[name](Path(self.get_finalized_command("build").build_temp).resolve())
            except (ImportError, build["BuildError"]) as error:
                if os.environ.get("MIMDET_BUILD") == "1":
                    raise
                message = f"mimdet: kernels not compiled now ({name}); they will be at first use. Reason: {error}"
                print(message, file=sys.stderr)
                continue
            shutil.copy(library, folder / library.name)


class PlatformWheel(bdist_wheel):
    """A wheel for any Python 3: of this platform if it has compiled kernels, else of any platform."""

    def get_tag(self):
        folder = Path(self.get_finalized_command("build_py").build_lib) / "mimdet" / "kernels"
        if any(folder.glob("*.so")):
            return "py3", "none", get_platform(self.bdist_dir).replace("-", "_").replace(".", "_")
        return "py3", "none", "any"


setup(
    # kernels/, csrc/, bench/ and configs/ are symbolic links inside mimdet/, so that the package is one tree.
    packages=find_namespace_packages(include=["mimdet", "mimdet.*"], exclude=["mimdet.bench.results*"]),
    package_data={"mimdet.csrc": ["*"], "mimdet.bench": ["*.json"], "mimdet.testing.recordings": ["*"]},
    cmdclass={"build_py": BuildKernels, "bdist_wheel": PlatformWheel},
)
