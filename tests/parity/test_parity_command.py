"""``mimdet parity``: its files, its exit statuses, and one clear line for whatever cannot be done."""

import dataclasses
import importlib.metadata
import json
import re
import sys
import threading
import time
import xml.etree.ElementTree as ET
from importlib.util import find_spec

import pytest
import torch
from support.command import run
from support.kernels import mocked_gpu, usable

from mimdet.kernels import OPS
from mimdet.kernels.bias_gelu import reference
from mimdet.parity import cases, models, report
from mimdet.parity import run as running
from mimdet.testing import RecordingError, recording

ONE = "bias_gelu-eager-cpu-fp32-contiguous-small-forward"


def parity(monkeypatch, *argv):
    """Exit status of ``mimdet parity argv...``."""
    return run(monkeypatch, "parity", *argv)


@pytest.fixture(scope="module")
def levels():
    return {level: cases.select(level, device="cpu")[0] for level in cases.LEVELS}


def test_levels_contain_one_another(levels):
    quick, default, full = (set(listed) for listed in levels.values())
    assert quick < default < full
    for listed in levels.values():
        assert len({case.id for case in listed}) == len(listed)


def test_every_operation_has_eager_in_every_dtype_and_direction(levels):
    quick = {(c.op, c.dtype, c.direction) for c in levels["quick"] if c.implementation == "eager"}
    for op in OPS:
        for dtype in cases.op_cases.dtypes_of(op):
            assert (op, dtype, "forward") in quick
            assert ((op, dtype, "backward") in quick) == (op in cases.DIFFERENTIABLE)


def test_files_and_the_table(monkeypatch, tmp_path, capsys):
    files = "--junit", tmp_path / "parity.xml", "--json", tmp_path / "parity.json"
    assert parity(monkeypatch, "--quick", "--only", "bias_gelu-[ec]*-small-*", *files) == 0
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "parity.json").read_text())
    rows = {row["id"]: row for row in content["cases"]}
    assert printed.splitlines()[-1] == f"{len(rows)} cases, all within their budgets"
    row = rows[ONE]
    assert {"op", "implementation", "dtype", "layout", "direction", "status", "seconds"} <= set(row)
    assert row["error"] <= row["budget"] == pytest.approx(2 * row["reference_error"] + 4 * row["ulp"] * 6**0, rel=1)
    assert content["environment"]["versions"]["torch"] == importlib.metadata.version("torch")
    assert content["auto"]["bias_gelu cpu fp32"] == ("cpp" if usable("bias_gelu", "cpp", "cpu") else "eager")
    suite = ET.parse(tmp_path / "parity.xml").getroot()[0]
    tests = {test.get("name"): test for test in suite.iter("testcase")}
    assert int(suite.get("tests")) == len(tests) >= len(rows)
    assert suite.get("failures") == "0"
    properties = {p.get("name"): p.get("value") for p in tests[ONE].iter("property")}
    assert float(properties["error"]) == row["error"]
    # What cannot run is skipped with its reason.
    skipped = [test for test in tests.values() if test.find("skipped") is not None]
    assert len(skipped) == len(content["unavailable"]) == int(suite.get("skipped"))
    for missing in content["unavailable"]:
        assert missing["reason"] in printed


def test_a_failed_case_is_in_all_of_them(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(reference, "bias_gelu", lambda x, bias: x + bias)
    files = "--junit", tmp_path / "parity.xml", "--json", tmp_path / "parity.json"
    assert parity(monkeypatch, "--only", ONE, *files) == 1
    printed = capsys.readouterr().out
    assert f"failed: {ONE}: output0: error" in printed
    assert printed.splitlines()[-1] == "1 of 1 cases failed"
    (row,) = json.loads((tmp_path / "parity.json").read_text())["cases"]
    assert row["status"] == "failed"
    (failure,) = ET.parse(tmp_path / "parity.xml").getroot().iter("failure")
    assert failure.get("message") == row["message"]


def test_an_error_inside_a_case_is_its_message(monkeypatch):
    def broken(x, bias):
        raise RuntimeError("no such memory\nand more")

    monkeypatch.setattr(reference, "bias_gelu", broken)
    (case,) = cases.select(only=ONE)[0]
    result = running.run_case(case)
    assert (result.status, result.message, result.error) == ("failed", "RuntimeError: no such memory", None)
    json.dumps(result.row(), allow_nan=False)


def test_ctrl_c_ends_the_interpreter_too(monkeypatch):
    started, seen = threading.Event(), []

    def interpret(self, case):
        seen.append(case)
        started.set()
        time.sleep(0.2)
        return running.Result(case, running.PASSED)

    def interrupted(case, original):
        started.wait()
        raise KeyboardInterrupt

    monkeypatch.setattr(running.Interpreter, "run", interpret)
    monkeypatch.setattr(running, "run_case", interrupted)
    native = cases.ParityCase("bias_gelu", "eager", "cpu", "fp32", "contiguous", "small", "forward")
    interpreted = [dataclasses.replace(native, implementation="triton", size=size) for size in ("small", "odd", "wide")]
    with pytest.raises(KeyboardInterrupt):
        running.run([*interpreted, native])
    assert len(seen) == 1


def test_an_interpreter_that_cannot_start_is_named(monkeypatch):
    def start():
        raise OSError("no memory for a process")

    interpreter = running.Interpreter()
    monkeypatch.setattr(interpreter, "_start", start)
    result = interpreter.run(cases.ParityCase("bias_gelu", "triton", "cpu", "fp32", "contiguous", "small", "forward"))
    assert result.message == "the interpreter's process cannot start: no memory for a process"


def test_a_gpu_has_its_implementations(monkeypatch):
    with mocked_gpu():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
        everywhere, _ = cases.select("quick")
        on_gpu, _ = cases.select("quick", device="cuda")
        interpreted, _ = cases.select("quick", device="cpu")
    assert {c.device for c in everywhere} == {"cpu", "cuda"}
    assert not [c for c in everywhere if c.interpreted]
    assert [c for c in interpreted if c.interpreted] or not find_spec("triton")
    chosen = {c.implementation for c in on_gpu}
    assert chosen >= {"auto", "cuda", "eager", "torch_varlen"}
    assert not chosen & {"cpp", "aten_cpu"}
    assert [c for c in on_gpu if c.op == "attention_varlen" and c.implementation == "sdpa"]


BAD = {
    "pattern": (["--only", "no_such_op"], "--only no_such_op: no case matches"),
    "cuda": (["--device", "cuda"], "--device cuda: PyTorch finds no GPU"),
    "nowhere": (
        ["--only", "bias_gelu-cpp", "--dtype", "fp16"],
        "--only bias_gelu-cpp with --dtype fp16: nothing that matches can run here: bias_gelu cpp: no kernel for",
    ),
    "both levels": (["--quick", "--full"], "--quick and --full: take one of them"),
    "folder": (["--json", "TMP/none/a.json"], "there is no folder"),
    "original": (["--original", "TMP"], "is not a checkout of the original MIMDet: it has no configs/"),
    "compare and more": (["--compare", "a.json", "b.json", "--quick"], "--compare runs nothing"),
    "compare nothing": (["--compare", "TMP/a.json", "TMP/b.json"], "a.json cannot be read: No such file"),
}


@pytest.mark.parametrize(("argv", "message"), BAD.values(), ids=BAD)
def test_bad_use_is_one_line_and_status_2(monkeypatch, capsys, tmp_path, argv, message):
    if "cuda" in argv and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert parity(monkeypatch, *[a.replace("TMP", str(tmp_path)) for a in argv]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not out


@pytest.mark.parametrize("change", ["missing", "altered"])
def test_recordings_are_checked(monkeypatch, tmp_path, capsys, change):
    name = "original_small.npz"
    for file in recording.SUMS:
        content = (recording.FOLDER / file).read_bytes()
        (tmp_path / file).write_bytes(content + b"\0" if (change, file) == ("altered", name) else content)
    if change == "missing":
        (tmp_path / name).unlink()
    monkeypatch.setattr(recording, "FOLDER", tmp_path)
    monkeypatch.setattr(recording.Recording.__init__, "__defaults__", (tmp_path,))
    monkeypatch.setattr(recording.read, "__defaults__", (tmp_path,))
    models.recorded.cache_clear()
    with pytest.raises(RecordingError, match=f"original_small.npz is {change}.*reinstall mimdet"):
        models.recorded()
    assert parity(monkeypatch, "--quick", "--device", "cpu") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: the recording .*{name} is {change}.*reinstall mimdet", line)
    # Cases of operations need none.
    assert parity(monkeypatch, "--only", ONE) == 0


def test_another_version_of_the_file(tmp_path):
    file = tmp_path / "a.json"
    for content, message in (
        ({"format": report.FORMAT, "version": 99}, "has version 99 of this format, mimdet .* reads 1: run mimdet"),
        ({"rows": []}, "has no results of mimdet parity"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(cases.BadUseError, match=message):
            report.read(file)
    file.write_text("not JSON")
    with pytest.raises(cases.BadUseError, match="is not JSON"):
        report.read(file)


def test_a_dead_interpreter_is_named_and_replaced(monkeypatch):
    if not [c for c in cases.select("quick", "bias_gelu-triton-cpu", device="cpu")[0] if c.interpreted]:
        pytest.skip("Triton is not installed")
    (case,) = cases.select("quick", "bias_gelu-triton-cpu-fp32-contiguous-small-forward", device="cpu")[0]
    interpreter = running.Interpreter()
    start = interpreter._start
    command = [sys.executable, "-c", "import sys; sys.stdin.readline(); sys.exit(7)"]
    monkeypatch.setattr(interpreter, "_start", lambda: running.subprocess.Popen(
        command, stdin=running.subprocess.PIPE, stdout=running.subprocess.PIPE, text=True
    ))  # fmt: skip
    result = interpreter.run(case)
    assert result.status == running.FAILED
    assert "interpreter's process ended with status" in result.message
    monkeypatch.setattr(interpreter, "_start", start)
    try:
        assert interpreter.run(case).status == running.PASSED
    finally:
        interpreter.close()
