"""Signals to trainings with loader workers: nothing is lost, and resuming gives the uninterrupted run."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.engine_fakes import FakeDataset, fake_config, fake_mapper
from support.paths import TESTS

from mimdet.checkpoint.read import read_checkpoint
from mimdet.config.serialize import to_yaml
from mimdet.data import build_detection_test_loader, build_detection_train_loader
from mimdet.data.loader import LoaderWorkerError, stop_signals
from mimdet.engine import train


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "OMP_NUM_THREADS": "1"}


class Runs:
    """Starts trainings of ``signal_runs`` and sends them signals."""

    def __init__(self):
        self.server = subprocess.Popen(
            [sys.executable, str(TESTS / "support" / "signal_runs.py")],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, folder, moment, count, **options):
        """Start a training; returns its pid and its workers', once it waits at the requested place."""
        folder.mkdir(parents=True, exist_ok=True)
        print(json.dumps({"folder": str(folder), "moment": moment, "count": count, **options}), file=self.server.stdin)
        self.server.stdin.flush()
        pid = int(self.server.stdout.readline())
        for _ in range(6000):
            text = self.output(folder)
            places = [json.loads(line[3:]) for line in text.splitlines(True) if line.startswith("AT ") and "\n" in line]
            if places:
                return pid, places[-1][1]
            time.sleep(0.01)
        pytest.fail(f"it did not come to {moment}: {text}")

    def output(self, folder):
        path = folder / "output.txt"
        return path.read_text() if path.exists() else ""

    def end(self, folder):
        """Let it continue; returns exit status and output."""
        (folder / "go").touch()
        return int(self.server.stdout.readline()), self.output(folder)


@pytest.fixture(scope="module")
def runs():
    runs = Runs()
    with runs.server:
        yield runs
        runs.server.stdin.close()


def without_evaluation(folder):
    cfg = fake_config(folder, max_iter=6)
    cfg.dataloader.evaluator = None
    return cfg


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Weights of the uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    train(without_evaluation(folder))
    return read_checkpoint(folder / "model_final.pth")["model"]


def assert_resumes(folder, whole):
    train(without_evaluation(folder / "run"), resume=True)
    resumed = read_checkpoint(folder / "run" / "model_final.pth")["model"]
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def to_group(pid, signum):
    os.killpg(pid, signum)


@pytest.mark.parametrize(
    ("moment", "count", "signum", "send", "saved"),
    [
        ("step", 3, signal.SIGTERM, to_group, "model_0000003.pth"),
        ("step", 3, signal.SIGTERM, os.kill, "model_0000003.pth"),
        ("step", 0, signal.SIGINT, to_group, "model_0000000.pth"),
        ("workers start", 0, signal.SIGTERM, to_group, "model_0000000.pth"),
        ("step", 4, signal.SIGHUP, to_group, "model_0000004.pth"),
        ("step", 4, signal.SIGUSR1, to_group, "model_0000004.pth"),
        ("save", 0, signal.SIGTERM, to_group, "model_0000003.pth"),
        ("evaluation", 1, signal.SIGTERM, to_group, "model_0000001.pth"),
        ("evaluation", 7, signal.SIGTERM, to_group, "model_final.pth"),
        ("between", 0, signal.SIGHUP, to_group, "model_0000002.pth"),
    ],
    ids=[
        *("step", "process-alone", "first-step-sigint", "workers-start", "sighup", "sigusr1"),
        *("save", "evaluation", "final-evaluation", "between"),
    ],
)  # fmt: skip
def test_a_signal_saves_with_workers_alive(runs, whole, tmp_path, moment, count, signum, send, saved):
    pid, workers = runs.start(tmp_path, moment, count)
    assert len(workers) == (3 if moment == "evaluation" else 2)
    send(pid, signum)
    status, output = runs.end(tmp_path)
    assert status == 128 + signum, output
    assert output.count(f"{signum.name}: finishing this step") == 1
    assert f"saved in {tmp_path / 'run' / saved}" in output.splitlines()[-1], "nothing follows our message"
    assert "Traceback" not in output
    assert "Warning" not in output
    assert_resumes(tmp_path, whole)


def test_repeated_sigterm_does_not_abort(runs, whole, tmp_path):
    """Slurm and systemd signal torchrun, which forwards it, and its processes too."""
    pid, _ = runs.start(tmp_path, "step", 3)
    for _ in range(3):
        os.killpg(pid, signal.SIGTERM)
    status, output = runs.end(tmp_path)
    assert status == 143, output
    assert_resumes(tmp_path, whole)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_second_ctrl_c_aborts_with_workers_alive(runs, tmp_path, first):
    pid, workers = runs.start(tmp_path, "step", 4)
    os.killpg(pid, first)
    time.sleep(0.1)
    os.killpg(pid, signal.SIGINT)
    assert int(runs.server.stdout.readline()) in (130, -signal.SIGINT)
    assert [path.name for path in (tmp_path / "run").glob("*.pth")] == ["model_0000002.pth"]
    assert_gone(workers)


@pytest.mark.parametrize(("moment", "count"), [("step", 4), ("save", 0), ("evaluation", 1), ("between", 0)])
def test_a_killed_worker_is_explained_and_nothing_lost(runs, whole, tmp_path, moment, count):
    _, workers = runs.start(tmp_path, moment, count)
    os.kill(workers[-1 if moment == "evaluation" else 0], signal.SIGKILL)
    time.sleep(0.1)
    status, output = runs.end(tmp_path)
    assert status == 1, output
    message = output.splitlines()[-1]
    assert "is killed by signal: Killed. The system probably ran out of memory: use fewer workers" in message
    assert "dataloader.train.num_workers" in message
    # Prefetched batches are still trained on, so the last checkpoint depends on the loader's speed.
    saved = re.search(r"saved in (\S+\.pth)", message)[1]
    assert Path(saved).parent == tmp_path / "run"
    assert Path(saved).is_file()
    assert_resumes(tmp_path, whole)


def test_spawned_workers_outlive_a_signal_while_they_import(runs, whole, tmp_path):
    pid, _ = runs.start(tmp_path, "workers start", 0, start_method="spawn", workers=1)
    os.killpg(pid, signal.SIGTERM)
    status, output = runs.end(tmp_path)
    assert status == 143, output
    assert "Traceback" not in output
    assert "model_0000000.pth" in output.splitlines()[-1]
    assert_resumes(tmp_path, whole)


def assert_gone(pids):
    for _ in range(1000):
        pids = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        if not pids:
            return
        time.sleep(0.01)
    pytest.fail(f"still alive: {pids}")


def test_workers_end_with_their_parent(runs, tmp_path):
    pid, workers = runs.start(tmp_path, "step", 4)
    os.killpg(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGKILL)
    assert int(runs.server.stdout.readline()) == -signal.SIGKILL
    assert_gone(workers)


def stuck_mapper(record, rng):
    if record["image_id"] % 2:
        time.sleep(1000)
    return fake_mapper(record, rng)


def test_a_stuck_worker_ends_with_its_loader(monkeypatch):
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    loader = build_detection_train_loader(FakeDataset(), stuck_mapper, 1, num_workers=2)
    batches = iter(torch.utils.data.DataLoader.__iter__(loader))
    workers = batches._workers
    del batches
    assert [worker.exitcode for worker in workers] == [0, 0]


def killed_mapper(record, rng):
    if record["image_id"] == 103:
        os.kill(os.getpid(), signal.SIGKILL)
    return fake_mapper(record, rng)


def assert_killed_worker_is_explained():
    with pytest.raises(LoaderWorkerError, match=r"a loader worker died: .* probably ran out of memory"):
        list(build_detection_test_loader(FakeDataset(), killed_mapper, num_workers=1))


def test_a_killed_worker_is_explained_without_a_training():
    assert_killed_worker_is_explained()
    subprocess.run(["true"], check=True)  # its SIGCHLD must not report the worker again


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), EOFError(), FileNotFoundError(2, "no socket")])
def test_a_worker_killed_while_its_tensors_are_fetched_is_explained(monkeypatch, error):
    def rebuild(*args):
        raise error

    monkeypatch.setattr(torch.utils.data.dataloader._MultiProcessingDataLoaderIter, "_try_get_data", rebuild)
    assert_killed_worker_is_explained()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_missing_file_is_not_a_dead_worker(num_workers):
    with pytest.raises(FileNotFoundError, match="no image"):
        list(build_detection_test_loader(FakeDataset(), missing_mapper, num_workers=num_workers))


def missing_mapper(record, rng):
    raise FileNotFoundError("no image")


def test_torchrun_passes_a_signal_on_and_ends_quietly(tmp_path):
    """SIGTERM to torchrun and, as Slurm does, to its processes; `--num-gpus` starts it."""
    cfg = fake_config(tmp_path / "run", max_iter=10**6, batch_size=4)
    cfg.dataloader.train.num_workers = 1
    cfg.dataloader.evaluator = None
    cfg.optimizer._target_ = "torch.optim.AdamW"
    (tmp_path / "fake.py").write_text(
        f"from mimdet.config import from_yaml\nglobals().update(from_yaml({to_yaml(cfg)!r}))"
    )
    command = [sys.executable, "-m", "mimdet", "train", "--config-file", str(tmp_path / "fake.py"), "--num-gpus", "2"]
    with subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        seen = ""
        while "10/1000000" not in seen and (line := process.stdout.readline()):
            seen += line
        ranks = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        os.kill(process.pid, signal.SIGTERM)
        for rank in ranks:
            os.kill(rank, signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, seen + output
    assert "Traceback" not in output
    assert "To go on, run the same command with --resume" in output.splitlines()[-1], output
    last = (tmp_path / "run" / "last_checkpoint").read_text()
    assert read_checkpoint(tmp_path / "run" / last)["iteration"] >= 9


@pytest.mark.parametrize(("handler", "hangup"), [(signal.SIG_IGN, False), (signal.SIG_DFL, True)])
def test_torchrun_gets_no_hangup_that_nohup_ignores(handler, hangup):
    """``--num-gpus`` names the signals that torchrun passes on."""
    before = signal.signal(signal.SIGHUP, handler)
    try:
        assert (signal.SIGHUP in stop_signals()) is hangup
        assert {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1} <= set(stop_signals())
    finally:
        signal.signal(signal.SIGHUP, before)
