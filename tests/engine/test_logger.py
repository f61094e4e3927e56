import errno
import io
import json
import logging
import math
import os
import sys
import threading

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mimdet.engine import logger as logger_module
from mimdet.engine.logger import MetricsWriter, RunLog, TrainingProgress, flatten

logger = logging.getLogger("mimdet.test")


def test_messages_reach_stdout_and_log_txt(tmp_path, capsys):
    with RunLog(tmp_path / "run"):
        logger.info("hello %d", 1)
        logger.warning("careful")
        logger.debug("hidden")
    logger.warning("after the end")
    text = (tmp_path / "run" / "log.txt").read_text()
    assert text == capsys.readouterr().out
    assert [line.split(" ", 2)[2] for line in text.splitlines()] == ["hello 1", "WARNING careful"]


def test_a_second_run_appends(tmp_path):
    for text in ("one", "two"):
        with RunLog(tmp_path):
            logger.info(text)
    assert [line.split()[-1] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["one", "two"]


def test_an_exception_is_written_to_the_file_alone(tmp_path, capsys):
    with pytest.raises(ValueError, match="broken"), RunLog(tmp_path):
        raise ValueError("broken annotation")
    assert "ERROR ValueError: broken annotation" in (tmp_path / "log.txt").read_text()
    assert "broken" not in "".join(capsys.readouterr()), "whoever catches it prints it"


def test_a_deferred_file_gets_what_was_said_before(tmp_path):
    with RunLog(tmp_path / "run", deferred=True) as log:
        logger.info("one")
        assert not (tmp_path / "run").exists()
        log.open_file()
        logger.info("two")
    assert [line.split()[-1] for line in (tmp_path / "run" / "log.txt").read_text().splitlines()] == ["one", "two"]


def test_a_refused_run_leaves_no_log(tmp_path):
    with pytest.raises(ValueError, match="refused"), RunLog(tmp_path / "run", deferred=True):
        raise ValueError("refused")
    assert not (tmp_path / "run").exists()


def test_a_pipe_without_a_reader_is_no_error(tmp_path, capfd, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with RunLog(tmp_path):
            logger.info("one")
            logger.info("two")
            print("by a library", flush=True)
    assert [line.split()[-1] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["one", "two"]
    assert capfd.readouterr().err == ""


def test_a_closed_stdout_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with RunLog(tmp_path):
        logger.info("one")
    assert (tmp_path / "log.txt").read_text().endswith("one\n")


def test_a_lost_terminal_is_no_error(tmp_path, monkeypatch):
    """SIGHUP, as when ssh disconnects."""
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setenv("TERM", "xterm")
        with RunLog(tmp_path) as log:
            progress = TrainingProgress(max_iter=4, start=0, batch_size=1, log_period=1, console=log.console)
            assert log.console is not None
            os.close(ours)
            progress.step(0, {"loss_cls": 0.5}, 1e-4, 2.0, 0.5)
            logger.warning("stopped")
            progress.close()
    assert "WARNING stopped" in (tmp_path / "log.txt").read_text()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_said_once_for_the_log_and_named_for_the_metrics(tmp_path, capsys):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with RunLog(tmp_path):
        logger.info("one")
        logger.info("two")
    out, err = capsys.readouterr()
    assert out.count("cannot write") == 1
    assert "log.txt: [Errno 28]" in out
    assert "Traceback" not in err
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    writer = MetricsWriter(tmp_path, start_iteration=0)
    with pytest.raises(OSError, match=r"No space left on device, .* free: '.*metrics\.jsonl'"):
        writer.write(0, {"x": 1.0})
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        writer.close()


def test_other_ranks_print_warnings_only(tmp_path, capsys):
    with RunLog(tmp_path / "run", rank=3):
        logger.info("hello")
        logger.warning("careful")
    assert "[rank 3] WARNING careful" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_logging_is_left_as_it_was(tmp_path):
    package = logging.getLogger("mimdet")
    before = (package.level, package.propagate, list(package.handlers))
    with RunLog(tmp_path):
        assert not package.propagate
    assert (package.level, package.propagate, list(package.handlers)) == before


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_are_one_object_a_line_and_scalars(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(19, {"loss_cls": 0.5, "lr": 1e-4})
    writer.write(19, flatten({"bbox": {"AP": 0.25, "APs": math.nan}, "bbox_per_class": {"a cat": 0.25}}))
    writer.close()
    assert read(tmp_path / "metrics.jsonl") == [
        {"iteration": 19, "loss_cls": 0.5, "lr": 1e-4},
        {"iteration": 19, "bbox/AP": 0.25, "bbox/APs": None, "bbox_per_class/a cat": 0.25},
    ]
    board = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss_cls")] == [(19, 0.5)]
    assert [(event.step, event.value) for event in board.Scalars("bbox/AP")] == [(19, 0.25)]


def test_resuming_drops_later_and_broken_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 8, "x": 1}\n{"iteration": 9, "x": 2}\n{"iteration": 10, "x": 3}\n{"itera')
    writer = MetricsWriter(tmp_path, start_iteration=10)
    writer.write(10, {"x": 4})
    writer.close()
    assert [(line["iteration"], line["x"]) for line in read(path)] == [(8, 1), (9, 2), (10, 4)]


def test_a_fresh_run_keeps_the_earlier_file_aside(tmp_path):
    for value in (1, 2, 3):
        writer = MetricsWriter(tmp_path)
        writer.write(0, {"x": value})
        writer.close()
    values = {path.name: read(path)[0]["x"] for path in tmp_path.glob("metrics*.jsonl")}
    assert values == {"metrics.1.jsonl": 1, "metrics.2.jsonl": 2, "metrics.jsonl": 3}


def test_plain_lines_come_every_period_and_first_and_last(tmp_path, capsys):
    with RunLog(tmp_path):
        progress = TrainingProgress(max_iter=25, start=3, batch_size=8, log_period=10)
        for iteration in range(3, 25):
            progress.step(iteration, {"total_loss": 1.0, "loss_cls": 0.5}, 1e-4, 2.0, 0.5)
        progress.close()
    lines = [line.split(" ", 2)[2] for line in capsys.readouterr().out.splitlines()]
    assert [line.split("/")[0] for line in lines] == ["4", "10", "20", "25"]
    expected = "10/25 total_loss 1 cls 0.5 lr 0.0001 2.000 s/it (data 0.500) 4.0 images/s eta 0:00:30"
    assert lines[1].removesuffix(lines[1][len(expected) :]) == expected


def test_figures_are_medians_of_the_last_20(tmp_path, capsys):
    with RunLog(tmp_path):
        progress = TrainingProgress(max_iter=100, start=0, batch_size=1, log_period=50)
        for iteration in range(50):
            loss = 1000.0 if iteration < 30 or iteration == 45 else 2.0
            progress.step(iteration, {"loss_cls": loss}, 1.0, 1.0, 0.0)
    assert "50/100 cls 2 " in capsys.readouterr().out


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_a_bar_and_the_file_the_lines(tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with RunLog(tmp_path) as log:
        assert isinstance(log.console, Console)
        progress = TrainingProgress(max_iter=4, start=0, batch_size=1, log_period=2, console=log.console)
        for iteration in range(4):
            progress.step(iteration, {"loss_cls": 0.5}, 1.0, 1.0, 0.0)
            if iteration == 1:
                logger.info("saved [red]model[/red]")
        progress.close()
    shown, written = terminal.getvalue(), (tmp_path / "log.txt").read_text()
    assert "4/4" in shown
    assert "━" in shown
    assert "saved [red]model[/red]" in shown
    assert "saved [red]model[/red]" in written
    assert "2/4 cls 0.5" in written
    assert "━" not in written


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_dumb_terminal_gets_plain_lines(tmp_path, monkeypatch, term):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", term)
    with RunLog(tmp_path) as log:
        assert log.console is None


@pytest.mark.parametrize("method", ["__init__", "add_scalar", "close"])
def test_a_full_disk_ends_tensorboards_file_alone(tmp_path, monkeypatch, caplog, method):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(logger_module.SummaryWriter, method, full)
    hook = threading.excepthook
    writer = MetricsWriter(tmp_path)
    for iteration in range(2):
        writer.write(iteration, {"total_loss": 1.0})
    writer.close()
    assert caplog.messages == [f"cannot write TensorBoard's file in {tmp_path}: No space left on device"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert threading.excepthook is hook
