"""``mimdet bench gpu`` with parts that need no GPU: order, resuming, failures, budgets, interruption."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mimdet.bench import gpu
from mimdet.bench.experiments import backbone, ops, roofline
from mimdet.bench.gpu import MINUTES, PARTS, Part, run_gpu

ROOT = Path(__file__).resolve().parents[2]
# SIGINT may be ignored in pytest's parent, and children inherit that.
HEAR = "import os, signal, sys, time; signal.signal(signal.SIGINT, signal.default_int_handler); "
WAIT = "try:\n time.sleep(60)\nexcept KeyboardInterrupt:\n print('kept', flush=True)"


@pytest.fixture
def python(tmp_path, monkeypatch):
    """A part that runs a few lines of Python."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    (tmp_path / "modules").mkdir()

    def make(name, code, seconds=30.0, suffix=".txt"):
        (tmp_path / "modules" / f"part_{name}.py").write_text(code)
        return Part(name, seconds, (f"part_{name}",), suffix)

    return make


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_in_order_and_only_what_is_missing(python, tmp_path, capsys):
    folder, log = tmp_path / "results", tmp_path / "log"
    note = f"open({str(log)!r}, 'a').write(__name__ and sys.argv[0].split('part_')[1][0])"
    code = f"import sys; {note}; print('figures')"
    parts = [python("a", code), python("b", code), python("c", code)]
    assert run_gpu(parts[1:2], folder)
    assert run_gpu(parts, folder)
    assert log.read_text() == "bac"
    assert contents(folder) == dict.fromkeys(("a.txt", "b.txt", "c.txt"), "figures\n")
    assert "1 of 3 parts are there already" in capsys.readouterr().out
    assert run_gpu(parts, folder)
    assert log.read_text() == "bac"
    assert run_gpu(parts, folder, force=True)
    assert log.read_text() == "bacabc"


FAILING = {
    "raises": ("print('before'); raise MemoryError('of this part')", "exit status 1", "MemoryError: of this part"),
    "dies": ("import os; os.kill(os.getpid(), 9)", "exit status -9", ""),
    "writes nothing": ("print('nothing to say')", "wrote no bad.json", "nothing to say"),
    "too large": ("import sys; open(sys.argv[2], 'w').write(400_001 * ' ')", "bad.json has 400001 bytes", ""),
}


@pytest.mark.parametrize(("code", "reason", "detail"), FAILING.values(), ids=FAILING)
def test_a_failed_part_says_why_and_the_others_go_on(python, tmp_path, capsys, code, reason, detail):
    folder = tmp_path / "results"
    bad, good = python("bad", code, suffix=".json"), python("good", "print('figures')")
    assert not run_gpu([bad, good], folder)
    assert contents(folder)["good.txt"] == "figures\n"
    error = contents(folder)["bad.error.txt"]
    assert error.startswith(reason)
    assert detail in error
    out = capsys.readouterr().out
    assert f"bad: {reason}" in out
    assert "failed: bad" in out
    # The next run succeeds and removes the error file.
    code = "import sys; option, path = sys.argv[1:]; assert option == '--output'; open(path, 'w').write('{}')"
    mended = python("bad", code, suffix=".json")
    assert run_gpu([mended, good], folder)
    assert set(contents(folder)) == {"bad.json", "good.txt"}


def test_a_budget_ends_a_part_and_its_children(python, tmp_path):
    child = "import subprocess; c = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    slow = python("slow", f"{HEAR}{child}print(c.pid, flush=True)\n{WAIT}", seconds=3.0)
    start = time.monotonic()
    assert not run_gpu([slow, python("next", "print('figures')")], tmp_path / "results")
    assert time.monotonic() - start < 50
    files = contents(tmp_path / "results")
    child, kept = files["slow.txt"].split()
    assert kept == "kept"
    assert files["slow.error.txt"].startswith("stopped after its budget of 3 s")
    assert files["next.txt"] == "figures\n"
    assert ends(int(child))


def test_what_does_not_hear_is_killed(python, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_GRACE", 0.2)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    start = time.monotonic()
    assert not run_gpu([python("deaf", deaf, seconds=3.0)], tmp_path / "results")
    assert time.monotonic() - start < 50
    assert contents(tmp_path / "results")["deaf.txt"] == "up\n"


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM"])
def test_interruption_keeps_what_is_done(python, tmp_path, sent):
    folder = tmp_path / "results"
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)
    # The answer may come before the next line runs: it must be awaited from the first.
    rounds = f"try:\n print('rounds', flush=True); os.kill(os.getppid(), signal.{sent}); time.sleep(60)\n"
    interrupts = python("b", f"{HEAR}\n{rounds}except KeyboardInterrupt:\n print('kept', flush=True)")
    parts = [python("a", "print('figures')"), interrupts, python("c", "print('figures')")]
    try:
        with pytest.raises(KeyboardInterrupt):
            run_gpu(parts, folder)
    finally:
        signal.signal(signal.SIGINT, before[0])
    assert signal.getsignal(signal.SIGTERM) is before[1]
    files = contents(folder)
    assert files == {"a.txt": "figures\n", "b.txt": "rounds\nkept\n", "b.error.txt": "interrupted\n"}
    assert [part.done(folder) for part in parts] == [True, False, False]


def test_killed_while_measuring_is_not_done(python, tmp_path):
    """SIGKILL: a partly written result does not count as done."""
    folder = tmp_path / "results"
    code = "import os, signal, sys; open(sys.argv[2], 'w').write('half'); os.kill(os.getppid(), signal.SIGKILL)"
    part = python("table", code, suffix=".json")
    script = f"from mimdet.bench.gpu import *; run_part({part!r}, Path({str(folder)!r}), 30)"
    path = os.pathsep.join([str(ROOT), str(tmp_path / "modules")])
    killed = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path}, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert contents(folder)["table.json"] == "half"
    assert not part.done(folder)


def test_no_part_begins_that_could_outlast_the_run(python, tmp_path, capsys):
    folder = tmp_path / "results"
    parts = [python("long", "print(1)", seconds=60 * MINUTES), python("short", "print(2)")]
    assert not run_gpu(parts, folder, minutes=MINUTES)
    assert contents(folder) == {"short.txt": "2\n"}
    assert "no time left for: long" in capsys.readouterr().out


def test_names_of_folders_are_left_out(python, tmp_path):
    assert run_gpu([python("paths", f"print({str(ROOT / 'tests')!r})")], tmp_path / "results")
    assert contents(tmp_path / "results") == {"paths.txt": "./tests\n"}


def test_every_part_fits_into_a_run():
    assert len({part.name for part in PARTS}) == len(PARTS)
    assert MINUTES < 9
    for part in PARTS:
        assert part.seconds + gpu._GRACE < 60 * MINUTES


def test_real_parts_are_commands_that_exist(bench, monkeypatch, tmp_path):
    """The subcommands accept the parts' options."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = {}
    for module in (ops, backbone, roofline):
        monkeypatch.setattr(module, "run", lambda options: asked.update({options.output.stem: options}))
    for part in PARTS:
        if not part.text:
            assert bench(*part.arguments[1:], "--output", tmp_path / part.file) == 0
    assert set(asked) == {part.name for part in PARTS if not part.text}
    assert {options.device for options in asked.values()} == {"cuda"}
    measured = [options for options in asked.values() if isinstance(options, ops.Options)]
    assert {(d, b) for options in measured for d in options.dtypes for b in options.batches} == {
        (dtype, batch) for dtype in ("bf16", "fp32") for batch in (1, 8)
    }
    assert len(asked["table1"].ratios) == 5
    assert len(asked["table7"].depths) == 4
    for batch in (1, 8):
        step = asked[f"detector_batch{batch}"]
        assert (step.batch, step.part, step.modes) == (batch, "detector", ("train",))
    parity = next(part for part in PARTS if part.name == "parity")
    files = [argument for argument in parity.arguments if argument.endswith(".py")]
    assert len(files) >= 7
    assert all(Path(file).is_file() for file in files)


def test_command(bench, monkeypatch, tmp_path, capsys, python):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200 (test)")
    monkeypatch.setattr(gpu, "PARTS", (python("a", "print('figures')"), python("b", "raise SystemExit(3)")))
    monkeypatch.chdir(tmp_path)
    assert bench("gpu", "--part", "a") == 0
    folder = tmp_path / "bench/results/nvidia-h200-test"
    assert set(contents(folder)) == {"a.txt"}
    assert bench("gpu", "--output", folder) == 1
    assert contents(folder)["b.error.txt"].startswith("exit status 3")
    assert bench("gpu", "--part", "cake") == 1
    assert "no part cake; choose from a, b" in capsys.readouterr().err


def test_without_a_gpu(bench, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench("gpu") == 2
    error = capsys.readouterr().err
    assert "no GPU found" in error
    assert "--device cpu" in error


def test_script_runs_from_a_checkout(tmp_path):
    env = {**os.environ, "PYTHON": sys.executable, "COLUMNS": "100"}
    done = subprocess.run([ROOT / "bench/run_gpu.sh", "--help"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--minutes" in done.stdout


def ends(pid):
    """Whether a process ends within seconds; a zombie has ended."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False
