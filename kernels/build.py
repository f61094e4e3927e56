"""Compile and load the libraries of ``csrc``. Neither depends on the Python version:

``mimdet_cpu``
    CPU loops, compiled once for each instruction set, registered through torch's stable ABI: a build for torch 2.11
    runs with every later torch.
``mimdet_cuda``
    CUDA kernels with C entry points that take pointers, without torch.

A library built at installation is beside this file; else it is compiled at first use into torch's extension cache.
``setup.py`` runs this module too, so its top imports only the standard library.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

# Not resolve(): in a checkout the package reaches kernels/ and csrc/ through symbolic links.
CSRC = Path(__file__).absolute().parent.parent / "csrc"
SWITCH = "MIMDET_BUILD"  # 0: never compile at first use

CPU_LIBRARY = "mimdet_cpu.abi3.so"
CUDA_LIBRARY = "mimdet_cuda.so"

_COMMON = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-w")
_X86 = ("x86_64", "AMD64")
_ISA_FLAGS = {
    "baseline": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": (
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mfma",
        "-mf16c",
        "-mprefer-vector-width=512",
    ),
}
# Files ending in CPU.cpp in which every operation is rounded once, as PyTorch's are.
_NOT_FUSED = ("MatchBoxesCPU.cpp",)
_CUDA_ARCHITECTURES = "80;86;90"


class BuildError(RuntimeError):
    """The compiler is missing or failed; the message ends with its last lines."""


@cache
def cpp_unavailable() -> str | None:
    """None once the CPU library is loaded (compiling it if need be), else the reason."""
    import torch

    try:
        _load(CPU_LIBRARY, compile_cpu, torch.ops.load_library)
    except BuildError as error:
        warnings.warn(f"mimdet: C++ kernels are off, plain PyTorch runs instead: {error}", stacklevel=2)
        return str(error)
    return None


@cache
def cuda_unavailable() -> str | None:
    """None once the CUDA library is loaded (compiling it if need be), else the reason."""
    try:
        cuda_library()
    except BuildError as error:
        return str(error)
    return None


@cache
def cuda_library() -> ctypes.CDLL:
    """The CUDA library; BuildError or OSError if there is none."""
    return _load(CUDA_LIBRARY, compile_cuda, ctypes.CDLL)


def _load(name: str, compile_library: Callable[[Path], Path], load: Callable[[str], Any]) -> Any:
    library = _find(name, compile_library)
    try:
        return load(str(library))
    except OSError as error:
        shipped = library.parent == Path(__file__).resolve().parent
        what = "reinstall mimdet, or delete the file and it is compiled here" if shipped else "delete it"
        raise BuildError(f"{library} cannot be loaded: {error} ({what})") from error


def _find(name: str, compile_library) -> Path:
    shipped = Path(__file__).resolve().parent / name
    if shipped.is_file():
        return shipped
    if os.environ.get(SWITCH) == "0":
        raise BuildError(f"{name} was not built at installation and {SWITCH}=0 forbids building it now")
    return compile_library(cache_folder())


def cache_folder() -> Path:
    """Of compiled libraries, see docs/kernels.md."""
    # torch.utils.cpp_extension uses the same folder, but importing it prints a warning where there is no GPU.
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(cache) / "torch_extensions") / "mimdet"


def compile_cpu(folder: Path) -> Path:
    """Compile ``csrc/*.cpp`` into ``folder``; files ending in ``CPU.cpp`` once for each instruction set.

    Names of objects and of the library are hashes of all that they depend on but the sources' folder: nothing is
    compiled twice, nothing stale is loaded. A digest of the content is written beside each, last: a file that a crash
    or a full disk truncated, or that something overwrote, is compiled again.

    Raises:
        BuildError: no compiler, it failed, or ``folder`` cannot be written.
    """
    if sys.platform == "win32":
        raise BuildError("the C++ kernels are not built on Windows")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        raise BuildError("no C++ compiler found (install g++, or set CXX)")
    import torch

    includes = ["-isystem", str(Path(torch.__file__).parent / "include")]
    isas = _ISA_FLAGS if platform.machine() in _X86 else {"baseline": ()}
    jobs = []
    for source in sorted(CSRC.glob("*.cpp")):
        if source.name.endswith("CPU.cpp"):
            exact = ["-ffp-contract=off"] * (source.name in _NOT_FUSED)
            for isa, flags in isas.items():
                jobs.append((source, [*_COMMON, "-fopenmp-simd", *exact, *flags, f"-DMIMDET_ISA={isa}"]))
        else:
            # Nothing here gains by a * b + c in one rounding, and the rasterizer and NMS must round twice.
            jobs.append(
                (source, [*_COMMON, "-ffp-contract=off", "-DTORCH_TARGET_VERSION=0x020b000000000000", *includes])
            )
    commands = [[*compiler.split(), *flags, "-I.", "-c", source.name] for source, flags in jobs]
    lib = Path(torch.__file__).parent / "lib"
    link = [*compiler.split(), "-shared", f"-L{lib}", "-ltorch_cpu"]
    if sys.platform == "darwin":
        link = [*compiler.split(), "-shared", "-undefined", "dynamic_lookup"]
    identity = _digest(_version(compiler.split()), torch.__version__)
    return _compile(folder, CPU_LIBRARY, commands, link, identity)


def compile_cuda(folder: Path, architectures: str | None = None, runtime: Path | None = None) -> Path:
    """Compile ``csrc/*.cu`` into ``folder`` for MIMDET_CUDA_ARCHS (such as "80;90"), else for the GPUs found, else for
    80, 86 and 90.

    Args:
        architectures: in place of these.
        runtime: C++ source that defines what host code calls of the CUDA runtime, in place of it.

    Raises:
        BuildError: no nvcc, it failed, or ``folder`` cannot be written.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("no nvcc found (install the CUDA toolkit, or set CUDA_HOME)")
    names = architectures or os.environ.get("MIMDET_CUDA_ARCHS") or _gpu_architectures() or _CUDA_ARCHITECTURES
    arch = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in names.replace(".", "").split(";")]
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", *arch]
    commands = [[nvcc, *flags, "-I.", "-c", source.name] for source in sorted(CSRC.glob("*.cu"))]
    link = [nvcc, "-shared"]
    if runtime is not None:
        commands.append([nvcc, *flags[:4], "-c", str(runtime)])
        link += ["-cudart", "none"]
    return _compile(folder, CUDA_LIBRARY, commands, link, _digest(_version([nvcc])))


def find_nvcc() -> str | None:
    """Path of nvcc: of CUDA_HOME, of /usr/local/cuda, or on PATH."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and (Path(home) / "bin" / "nvcc").is_file():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def _gpu_architectures() -> str:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return ""
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ";".join(f"{major}{minor}" for major, minor in sorted(capabilities))


def _compile(folder: Path, name: str, commands: list[list[str]], link: list[str], identity: str) -> Path:
    if not commands:
        raise BuildError(f"no sources for {name} in {CSRC}")
    headers = _digest(*(path.read_bytes() for path in sorted(CSRC.glob("*.h"))))
    folder = folder.resolve()
    objects = [folder / f"{_digest(identity, headers, *c, (CSRC / c[-1]).read_bytes())}.o" for c in commands]
    library = folder / _digest(identity, *link, *(path.name for path in objects)) / name
    if _is_intact(library):
        return library
    jobs = workers()
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder), concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            if _is_intact(library):
                return library
            missing = [(c, o) for c, o in zip(commands, objects, strict=True) if not _is_intact(o)]
            list(pool.map(lambda job: _run_to(*job), missing))
            # The linker wants libraries after the objects that use them.
            _run_to([*link[:1], *map(str, objects), *link[1:]], library)
    except OSError as error:
        raise BuildError(f"cannot build in {folder}: {error} (set TORCH_EXTENSIONS_DIR to another folder)") from error
    return library


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """flock: one build at a time in ``folder``, for the processes of a training job start together."""
    with open(folder / "lock", "w") as file:
        # Without flock (some network file systems, Windows) several build the same; os.replace keeps each file whole.
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
            _remove_scratch(folder)
        yield


def _remove_scratch(folder: Path) -> None:
    """Delete temporary folders of killed builds; under the lock no other build runs."""
    for scratch in (*folder.glob("tmp*"), *folder.glob("*/tmp*")):
        if re.fullmatch(r"tmp[a-z0-9_]{8}", scratch.name) and scratch.is_dir():
            shutil.rmtree(scratch, ignore_errors=True)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers() -> int:
    """Compilers that may run at once: MAX_JOBS, else the cores of this process."""
    asked = os.environ.get("MAX_JOBS") or str(cores())
    if not asked.isdecimal() or int(asked) < 1:
        raise BuildError(f"MAX_JOBS must be a positive whole number, got {asked!r}")
    return int(asked)


def _run_to(command: list[str], output: Path) -> None:
    """Run a compiler in ``csrc``; os.replace lets ``output`` appear whole or not at all."""
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        built = Path(scratch) / output.name
        try:
            done = subprocess.run([*command, "-o", str(built)], capture_output=True, text=True, cwd=CSRC)
        except OSError as error:
            raise BuildError(f"{command[0]} cannot be run: {error}") from error
        if done.returncode:
            errors = (done.stderr + done.stdout)[-2000:]
            raise BuildError(f"{Path(command[0]).name} failed (exit {done.returncode}) on {command[-1]}:\n{errors}")
        digest = Path(scratch) / "digest"
        digest.write_text(_content_digest(built))
        for file, target in ((built, output), (digest, _digest_file(output))):
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
            os.replace(file, target)


def _is_intact(file: Path) -> bool:
    """Whether a file has the content of its digest: loading a truncated library kills the process."""
    try:
        return _digest_file(file).read_bytes() == _content_digest(file).encode()
    except OSError:
        return False


def _content_digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _digest_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def _version(compiler: list[str]) -> str:
    try:
        return subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    except OSError as error:
        raise BuildError(f"{compiler[0]} cannot be run: {error}") from error


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:20]
