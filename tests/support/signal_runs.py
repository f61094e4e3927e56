"""Trainings in processes of their own that say where they are and wait there, for tests that send them signals.

A request on stdin is a line of JSON; the process forks for each, so that imports are paid for once.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import torch
from support.engine_fakes import FakeDetector, FakeEvaluator, fake_config
from torch.utils.data import DataLoader

import mimdet.data.loader
from mimdet.engine import checkpoint, train


def wait_at(folder, place):
    """Say where we are and which workers live; go on when the test says so."""
    pids = [child.pid for child in multiprocessing.active_children()]
    print("AT", json.dumps([place, pids]), flush=True)
    deadline = time.monotonic() + 60
    while not (folder / "go").exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def stop_at(folder, moment, count):
    """Wait at the ``count``-th step, save, batch of an evaluation, evaluation or start of workers."""
    owner, name = {
        "step": (FakeDetector, "forward"),
        "save": (checkpoint.torch, "save"),
        "evaluation": (FakeEvaluator, "process"),
        "between": (FakeEvaluator, "evaluate"),
        "workers start": (DataLoader, "__iter__"),
    }[moment]
    original, calls = getattr(owner, name), iter(range(10**6))

    def waiting(*args, **kwargs):
        due = (moment != "step" or args[0].training) and next(calls) == count
        if due and moment != "workers start":
            wait_at(folder, moment)
        result = original(*args, **kwargs)
        if due and moment == "workers start":
            wait_at(folder, moment)
        return result

    setattr(owner, name, waiting)


def run(folder, moment, count, start_method="fork", workers=2):
    torch.set_num_threads(1)
    multiprocessing.set_start_method(start_method)
    folder = Path(folder)
    stop_at(folder, moment, count)
    cfg = fake_config(folder / "run", max_iter=6)
    cfg.dataloader.train.num_workers = workers
    cfg.dataloader.test.num_workers = 1
    train(cfg)


def main():
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup around the tests has it ignored, and so would a training
    mimdet.data.loader._CHECK_SECONDS = 0.1
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            with open(Path(request["folder"]) / "output.txt", "ab") as output:
                for descriptor in (1, 2):
                    os.dup2(output.fileno(), descriptor)
            run(**request)
            return
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
