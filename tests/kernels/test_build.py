"""Compiling: in parallel, once, into a cache, with errors that name the remedy."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mimdet.kernels import build


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler")
def test_our_sources_compile():
    """Without the library, tests of C++ are skipped and plain PyTorch runs: both would hide an error in the sources."""
    assert build.cpp_unavailable() is None


@pytest.mark.parametrize("source", ["MatchBoxesCPU.cpp", "NmsSlots.cpp", "RasterizePolygons.cpp"])
def test_exact_sources_do_not_fuse_products_with_sums(monkeypatch, tmp_path, source):
    commands = []
    monkeypatch.setattr(build, "_compile", lambda folder, name, parts, *others: commands.extend(parts))
    try:
        build.compile_cpu(tmp_path)
    except build.BuildError as error:
        pytest.skip(str(error))
    commands = [command for command in commands if command[-1] == source]
    assert commands
    assert all("-ffp-contract=off" in command for command in commands)


# Logs its start and end, and writes its output file.
FAKE = """#!/bin/sh
case $1 in --version) echo fake; exit 0;; esac
for output; do :; done
echo start >> {log}
sleep 0.02
echo built > "$output"
echo end >> {log}
"""


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """A fake compiler; returns its log."""
    log, script = tmp_path / "log", tmp_path / "cxx"
    script.write_text(FAKE.format(log=log))
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return log


def most_at_once(log):
    running = peak = 0
    for line in log.read_text().split():
        running += 1 if line == "start" else -1
        peak = max(peak, running)
    return peak


@pytest.mark.parametrize("jobs", [1, 3])
def test_max_jobs_is_honored(compiler, monkeypatch, tmp_path, jobs):
    monkeypatch.setenv("MAX_JOBS", str(jobs))
    build.compile_cpu(tmp_path / "objects")
    assert most_at_once(compiler) <= jobs
    if jobs > 1:
        assert most_at_once(compiler) > 1


@pytest.mark.parametrize("jobs", ["0", "-2", "many"])
def test_max_jobs_must_be_a_number(compiler, monkeypatch, tmp_path, jobs):
    monkeypatch.setenv("MAX_JOBS", jobs)
    with pytest.raises(build.BuildError, match=f"MAX_JOBS must be a positive whole number, got '{jobs}'"):
        build.compile_cpu(tmp_path / "objects")


def test_nothing_is_compiled_twice(compiler, tmp_path):
    library = build.compile_cpu(tmp_path / "objects")
    compiled = compiler.read_text().count("start")
    assert build.compile_cpu(tmp_path / "objects") == library
    library.unlink()
    build.compile_cpu(tmp_path / "objects")
    assert compiler.read_text().count("start") == compiled + 1  # linked again
    assert [p for p in (tmp_path / "objects").iterdir() if p.is_dir()] == [library.parent]


def test_a_changed_source_is_compiled_alone(compiler, monkeypatch, tmp_path):
    sources = tmp_path / "csrc"
    sources.mkdir()
    for name in ("a.cpp", "b.cpp", "c.h"):
        (sources / name).write_text("// one")
    monkeypatch.setattr(build, "CSRC", sources)

    def compiled():
        before = compiler.read_text().count("start") if compiler.exists() else 0
        build.compile_cpu(tmp_path / "objects")
        return compiler.read_text().count("start") - before

    assert compiled() == 3  # two objects and the library
    (sources / "a.cpp").write_text("// two")
    assert compiled() == 2
    (sources / "c.h").write_text("// two")
    assert compiled() == 3


# build.py without the package, and a fake torch with version and folder.
PROCESS = """
import runpy, sys, types
from pathlib import Path
torch = sys.modules["torch"] = types.ModuleType("torch")
torch.__file__, torch.__version__ = "/torch/__init__.py", "0"
print(runpy.run_path(sys.argv[1])["compile_cpu"](Path(sys.argv[2])))
"""


def test_processes_that_start_together_build_once(compiler, tmp_path):
    command = [sys.executable, "-c", PROCESS, build.__file__, str(tmp_path / "objects")]
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda _: subprocess.run(command, capture_output=True, text=True, check=True), range(3)))
    (library,) = {d.stdout.strip() for d in done}
    assert Path(library).is_file()
    objects = len(list((tmp_path / "objects").glob("*.o")))
    assert compiler.read_text().count("start") == objects + 1


DAMAGES = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "empty": lambda file: file.write_bytes(b""),
    "garbage": lambda file: file.write_bytes(b"garbage"),
    "without-digest": lambda file: build._digest_file(file).unlink(),
    "empty-digest": lambda file: build._digest_file(file).write_bytes(b""),
    "garbage-digest": lambda file: build._digest_file(file).write_bytes(b"\xff" * 64),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_library_is_linked_again(compiler, tmp_path, damage):
    library = build.compile_cpu(tmp_path / "objects")
    content, compiled = library.read_bytes(), compiler.read_text().count("start")
    damage(library)
    for _ in range(2):
        assert build.compile_cpu(tmp_path / "objects") == library
        assert library.read_bytes() == content
        assert compiler.read_text().count("start") == compiled + 1


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_object_is_compiled_again(compiler, tmp_path, damage):
    library = build.compile_cpu(tmp_path / "objects")
    object_file = next((tmp_path / "objects").glob("*.o"))
    content, compiled = object_file.read_bytes(), compiler.read_text().count("start")
    damage(object_file)
    library.unlink()
    build.compile_cpu(tmp_path / "objects")
    assert object_file.read_bytes() == content
    assert compiler.read_text().count("start") == compiled + 2  # it and the library


def test_another_library_in_its_place_is_not_loaded(compiler, monkeypatch, tmp_path):
    ours = build.compile_cpu(tmp_path / "ours")
    content = ours.read_bytes()
    other = tmp_path / "other.so"
    other.write_bytes(b"another compiler's library, whole")
    shutil.copy(other, ours)
    assert build.compile_cpu(tmp_path / "ours").read_bytes() == content


def test_scratch_of_killed_builds_is_removed(compiler, tmp_path):
    folder = tmp_path / "objects"
    library = build.compile_cpu(folder)
    left = [folder / "tmpab12cd_9", library.parent / "tmpzzzzzzzz"]
    others = [folder / "tmp", folder / "tmpfiles", library.parent / "tmp_mine_too"]
    for path in (*left, *others):
        path.mkdir()
        (path / "half.o").write_bytes(b"half")
    assert build.compile_cpu(folder) == library
    assert all(path.exists() for path in left), "nothing is built, so another build's scratch may be in use"
    library.unlink()
    build.compile_cpu(folder)
    assert not any(path.exists() for path in left)
    assert all((path / "half.o").exists() for path in others)


def test_scratch_stays_where_nothing_can_be_locked(compiler, monkeypatch, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    folder = tmp_path / "objects"
    folder.mkdir()
    (folder / "tmpab12cd_9").mkdir()

    def refuse(*args):
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    build.compile_cpu(folder)
    assert (folder / "tmpab12cd_9").exists()


def test_every_file_is_on_the_disk_before_it_has_its_name(compiler, monkeypatch, tmp_path):
    synced, replace, fsync = set(), os.replace, os.fsync

    def recorded_sync(handle):
        synced.add(os.fstat(handle).st_ino)
        fsync(handle)

    def checked_replace(source, target):
        assert os.stat(source).st_ino in synced, target
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_sync)
    monkeypatch.setattr(os, "replace", checked_replace)
    library = build.compile_cpu(tmp_path / "objects")
    assert build._is_intact(library)


def test_a_shipped_library_that_cannot_be_loaded_is_named(monkeypatch, tmp_path):
    import torch

    for folder, advice in ((tmp_path, "reinstall mimdet"), (tmp_path / "cache", "delete it")):
        folder.mkdir(exist_ok=True)
        (folder / build.CPU_LIBRARY).write_bytes(b"no library")
        monkeypatch.setattr(build, "__file__", str(tmp_path / "build.py"))
        monkeypatch.setattr(build, "_find", lambda *_, folder=folder: folder / build.CPU_LIBRARY)
        build.cpp_unavailable.cache_clear()
        try:
            with pytest.warns(UserWarning, match=r"mimdet_cpu\.abi3\.so cannot be loaded: .*" + advice):
                assert "cannot be loaded" in build.cpp_unavailable()
            with pytest.raises(build.BuildError, match="cannot be loaded"):
                build._load(build.CPU_LIBRARY, build.compile_cpu, torch.ops.load_library)
        finally:
            build.cpp_unavailable.cache_clear()


def test_a_cache_that_cannot_be_written_names_the_variable(compiler, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(build.BuildError, match="set TORCH_EXTENSIONS_DIR to another folder"):
        build.compile_cpu(tmp_path / "file" / "objects")


def test_a_cache_that_cannot_be_written_may_be_read(compiler, monkeypatch, tmp_path):
    library = build.compile_cpu(tmp_path / "objects")

    def refuse(*args, **kwargs):
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert build.compile_cpu(tmp_path / "objects") == library
    with pytest.raises(build.BuildError, match="read-only"):
        build.compile_cpu(tmp_path / "others")


def test_without_a_compiler_auto_is_eager_and_says_so_once(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("MIMDET_BUILD", raising=False)
    build.cpp_unavailable.cache_clear()
    try:
        with pytest.warns(UserWarning, match="C\\+\\+ kernels are off, plain PyTorch runs instead") as noted:
            reasons = [build.cpp_unavailable() for _ in range(2)]
        assert len(noted) == 1
        assert all("cannot be run" in reason for reason in reasons)
    finally:
        build.cpp_unavailable.cache_clear()


def test_building_can_be_forbidden(monkeypatch):
    monkeypatch.setenv("MIMDET_BUILD", "0")
    with pytest.raises(build.BuildError, match="MIMDET_BUILD=0"):
        build._find(build.CPU_LIBRARY + ".absent", build.compile_cpu)


def test_a_failing_compiler_shows_its_words(compiler, tmp_path):
    Path(os.environ["CXX"]).write_text(
        "#!/bin/sh\ncase $1 in --version) exit 0;; esac\necho 'no such luck' >&2\nexit 1\n"
    )
    with pytest.raises(build.BuildError, match=r"cxx failed \(exit 1\) on \w+\.cpp:\nno such luck"):
        build.compile_cpu(tmp_path / "objects")
    assert not list((tmp_path / "objects").rglob("*.o"))


def test_windows_is_told_apart(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(build.BuildError, match="not built on Windows"):
        build.compile_cpu(tmp_path)
