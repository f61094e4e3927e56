import errno
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from mimdet.checkpoint.read import CheckpointError
from mimdet.engine import Checkpointer
from mimdet.engine.lock import FolderInUseError, locked
from mimdet.files import write_atomically


def state(value, size=10):
    return {"model": {"w": torch.full((size,), float(value))}, "iteration": value}


def value_of(checkpointer):
    return checkpointer.load(checkpointer.latest())["iteration"]


def test_latest_is_the_last_saved(tmp_path):
    checkpointer = Checkpointer(tmp_path / "new" / "folder")
    assert checkpointer.latest() is None
    for iteration in (1, 2):
        path = checkpointer.save(f"model_{iteration:07d}", state(iteration))
    assert checkpointer.latest() == path == tmp_path / "new" / "folder" / "model_0000002.pth"
    assert (path.parent / "last_checkpoint").read_text() == "model_0000002.pth"
    assert value_of(checkpointer) == 2
    assert not list(path.parent.glob(".*"))


def test_only_the_newest_stay_and_the_final_one(tmp_path):
    checkpointer = Checkpointer(tmp_path, max_to_keep=2)
    (tmp_path / "model_best.pth").touch()
    for iteration in range(4):
        checkpointer.save(f"model_{iteration:07d}", state(iteration))
    checkpointer.save("model_final", state(4))
    names = sorted(path.name for path in tmp_path.glob("*.pth"))
    assert names == ["model_0000002.pth", "model_0000003.pth", "model_best.pth", "model_final.pth"]


def test_a_longer_earlier_run_does_not_evict_the_new_one(tmp_path):
    for iteration in (900, 950):
        old = Checkpointer(tmp_path).save(f"model_{iteration:07d}", state(iteration))
        os.utime(old, (iteration, iteration))
    for iteration in (1, 2):
        Checkpointer(tmp_path, max_to_keep=2).save(f"model_{iteration:07d}", state(iteration))
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["model_0000001.pth", "model_0000002.pth"]


def test_keeping_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="max_to_keep=0"):
        Checkpointer(tmp_path, max_to_keep=0)


@pytest.fixture
def small_disk():
    """Writes beyond 100 kB of a file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_last_good_one(tmp_path, small_disk):
    checkpointer = Checkpointer(tmp_path)
    good = checkpointer.save("model_0000001", state(1))
    with pytest.raises(CheckpointError) as caught:
        checkpointer.save("model_0000002", state(2, size=1_000_000))
    message = str(caught.value)
    assert str(tmp_path / "model_0000002.pth") in message
    assert "GB" in message
    assert f"Last good checkpoint: {good}" in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_0000001.pth"]
    assert value_of(checkpointer) == 1


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot save .*file.model_0000001\.pth"):
        Checkpointer(tmp_path / "file").save("model_0000001", state(1))


KILLED = """
import sys, torch
sys.path[:0] = {path!r}
from mimdet.engine.checkpoint import Checkpointer
checkpointer = Checkpointer({folder!r}, max_to_keep=2)
for iteration in range(100000):
    checkpointer.save(f"model_{{iteration:07d}}", {{"model": torch.zeros(500_000), "iteration": iteration}})
    print(iteration, flush=True)
"""


def test_kill_at_any_moment_leaves_a_loadable_one(tmp_path):
    script = KILLED.format(path=sys.path, folder=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        for delay in (0.011, 0.007, 0.013):
            time.sleep(delay)
            process.send_signal(signal.SIGSTOP)
            assert Checkpointer(tmp_path).load(Checkpointer(tmp_path).latest())["model"].numel() == 500_000
            process.send_signal(signal.SIGCONT)
        process.kill()
    assert value_of(Checkpointer(tmp_path)) >= 0


def test_the_next_save_clears_what_a_kill_left(tmp_path):
    (tmp_path / ".model_0000001.pth.abc.tmp").write_bytes(b"half")
    Checkpointer(tmp_path).save("model_0000002", state(2))
    assert not list(tmp_path.glob(".*"))


def saved(folder, *iterations, final=None):
    checkpointer = Checkpointer(folder)
    for iteration in iterations:
        checkpointer.save(f"model_{iteration:07d}", state(iteration))
    if final is not None:
        checkpointer.save("model_final", state(final))
    return checkpointer


def test_the_pointer_is_believed_while_it_holds(tmp_path, caplog):
    checkpointer = saved(tmp_path, 3, 6)
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth\n")
    path, content = checkpointer.newest()
    assert (path.name, content["iteration"]) == ("model_0000003.pth", 3)
    assert not caplog.records


@pytest.mark.parametrize(
    "pointer", [None, b"", b"\0\xff\xfe", b"model_0000007.pth", b"../elsewhere.pth", b"x" * 5000], ids=str
)
@pytest.mark.parametrize(
    ("final", "newest"), [(None, "model_0000006.pth"), (5, "model_0000006.pth"), (9, "model_final.pth")]
)
def test_a_lost_pointer_is_replaced_by_the_newest(tmp_path, caplog, pointer, final, newest):
    checkpointer = saved(tmp_path, 3, 6, final=final)
    (tmp_path / "last_checkpoint").unlink()
    if pointer is not None:
        (tmp_path / "last_checkpoint").write_bytes(pointer)
    path, content = checkpointer.newest()
    assert path.name == newest
    assert content["iteration"] == max(6, final or 0)
    assert caplog.messages[0].startswith(f"{tmp_path / 'last_checkpoint'} ")
    assert caplog.messages[0].endswith(f"taking the newest checkpoint, {tmp_path / newest}")


def test_without_a_pointer_damaged_ones_are_passed_over(tmp_path):
    checkpointer = saved(tmp_path, 3, 6, 9)
    (tmp_path / "last_checkpoint").unlink()
    (tmp_path / "model_0000009.pth").write_bytes(b"")
    assert checkpointer.newest()[0].name == "model_0000006.pth"


def test_a_damaged_last_one_is_refused_with_the_good_one_before(tmp_path):
    checkpointer = saved(tmp_path, 3, 6, 9)
    (tmp_path / "model_0000009.pth").write_bytes(b"")
    advice = (
        r"0000009\.pth cannot be read.* newest good one is .*model_0000006\.pth: delete model_0000009\.pth to resume"
    )
    with pytest.raises(CheckpointError, match=advice):
        checkpointer.newest()
    (tmp_path / "model_0000009.pth").unlink()
    assert checkpointer.newest()[0].name == "model_0000006.pth"


def test_only_damaged_ones_are_refused(tmp_path):
    checkpointer = saved(tmp_path, 3)
    (tmp_path / "model_0000003.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match="No other is good"):
        checkpointer.newest()
    (tmp_path / "last_checkpoint").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read: .*model_0000003\.pth"):
        checkpointer.newest()


def test_only_a_disk_gives_disk_errors(tmp_path):
    with pytest.raises(RuntimeError, match="from a handler") as caught:
        Checkpointer(tmp_path).save("model_0000001", {"model": Unsavable()})
    assert "Make room" not in str(caught.value)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"Not a directory.*Remove the cause") as caught:
        Checkpointer(tmp_path / "file" / "below").save("model_0000001", state(1))
    assert "Make room" not in str(caught.value)


class Unsavable:
    def __reduce__(self):
        raise RuntimeError("from a handler")


def test_a_full_disk_is_named_by_every_atomic_write(tmp_path, small_disk):
    for write in (lambda file: file.write(b"x" * 10**6), lambda file: torch.save(torch.zeros(10**6), file)):
        with pytest.raises(OSError, match=r"GB free: '.*predictions\.json'") as caught:
            write_atomically(tmp_path / "predictions.json", write)
        assert caught.value.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())


HOLD = """
import sys, time
from pathlib import Path
sys.path[:0] = {path!r}
from mimdet.engine.lock import locked
with locked(Path({folder!r})):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_one_training_at_a_time_in_a_folder(tmp_path):
    script = HOLD.format(path=sys.path, folder=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        holder = rf"process {process.pid} on {re.escape(socket.gethostname())}"
        with pytest.raises(FolderInUseError, match=holder), locked(tmp_path):
            pass
        process.kill()
        process.wait()
        with locked(tmp_path):
            assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    with locked(tmp_path):
        pass
    assert "cannot be locked (No locks available)" in caplog.text


@pytest.mark.parametrize("name", ["config.yaml", "log.txt", "."])
def test_a_pointer_to_a_file_that_is_no_checkpoint_is_not_believed(tmp_path, name):
    """The advice to delete that file would lose it."""
    checkpointer = saved(tmp_path, 3, 6)
    (tmp_path / "config.yaml").write_text("model: {}")
    (tmp_path / "log.txt").write_text("saved")
    (tmp_path / "last_checkpoint").write_text(name)
    assert checkpointer.newest()[0].name == "model_0000006.pth"


def test_a_changed_byte_of_the_last_one_is_found(tmp_path):
    """torch.load does not compare checksums."""
    checkpointer = saved(tmp_path, 3, 6)
    content = bytearray((tmp_path / "model_0000006.pth").read_bytes())
    content[content.index(torch.full((10,), 6.0).numpy().tobytes())] ^= 1
    (tmp_path / "model_0000006.pth").write_bytes(content)
    message = r"0000006\.pth is damaged: .*data/0 in it does not match its checksum.*good one is .*model_0000003\.pth"
    with pytest.raises(CheckpointError, match=message):
        checkpointer.newest()


def test_a_pointer_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "last_checkpoint").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot save .*model_0000001\.pth: .*last_checkpoint: Is a directory"):
        saved(tmp_path, 1)


def test_a_lock_on_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(socket, "gethostname", full)
    with pytest.raises(OSError, match=r"No space left on device, .* free: '.*\.lock'"), locked(tmp_path):
        pass
