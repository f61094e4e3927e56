"""Comparing two files, and drawing one."""

import pytest
from test_cli import run

from mimdet.bench.compare import agreement, compare
from mimdet.bench.plot import plot
from mimdet.bench.results import COLUMNS, Results

ENVIRONMENT = {"device": "an abacus", "threads": 1, "versions": {"torch": "2"}, "date": "today", "commit": "abc"}


def row(kind, milliseconds, **changes):
    empty = {"str": "x", "int": 1, "float": 1.0, "float?": None, "floats": []}
    made = {column: empty[form] for column, form in COLUMNS[kind].items()} | {"status": "ok"} | changes
    if milliseconds:
        samples = [milliseconds * (1 + 0.01 * (i % 3)) for i in range(15)]
        made |= {"samples_ms": samples, "p20_ms": samples[0], "p50_ms": samples[1], "p80_ms": samples[2], "rounds": 15}
    return made


def ops_results(*milliseconds):
    forms = ("eager", "cpp", "inductor")
    rows = [
        row("ops", ms, op=op, impl=form, direction=direction, gb_s=10 / ms if ms else None)
        for op in ("bias_gelu", "scatter_fill")
        for direction in ("forward", "backward")
        for form, ms in zip(forms, milliseconds, strict=False)
    ]
    return Results("ops", "mimdet bench ops", ENVIRONMENT, {"copy_gb_s": 20.0}, rows)


def curve_results():
    rows = [
        row("backbone", 10 * ratio * slow, mode=mode, ratio=ratio, depth=4, model=model, relative_time=2 * ratio,
            relative_memory=ratio + 0.5, relative_saved=ratio, paper_memory=None,
            paper_time=1.5 * ratio if mode == "train" else None)
        for mode in ("train", "inference")
        for model, slow in (("ours", 1), ("original", 2))
        for ratio in (0.25, 0.5, 1.0)
    ]  # fmt: skip
    return Results("backbone", "mimdet bench table1", ENVIRONMENT, {"copy_gb_s": 20.0}, rows)


def test_a_change_is_seen_and_its_absence_too():
    changes = compare(ops_results(1.2, 1.0, 0.0), ops_results(1.0, 1.0, 1.0))
    assert len(changes) == 12
    faster, same, missing = changes[:3]
    assert faster.name.split()[-1] == "eager"
    assert str(faster.speedup).startswith("1.20x")
    assert str(same.speedup).startswith("no difference")
    assert missing.speedup is None
    assert missing.before_ms is None


def test_only_common_rows_of_one_kind_are_compared():
    assert len(compare(ops_results(1.0, 1.0), ops_results(1.0))) == 4
    with pytest.raises(ValueError, match="different kinds"):
        compare(ops_results(1.0), curve_results())
    with pytest.raises(ValueError, match="no row in common"):
        compare(ops_results(1.0), Results("ops", "", {}, {}, []))


def test_speedups_of_two_runs_agree_where_their_intervals_overlap():
    def results(low, median, high):
        speed = {"vs_eager": median, "vs_eager_low": low, "vs_eager_high": high}
        return Results("ops", "", {}, {}, [row("ops", 1.0, impl=impl, **speed) for impl in ("cpp", "triton")])

    assert agreement(results(1.0, 1.1, 1.2), results(1.2, 1.3, 1.4)) == (2, 2)
    assert agreement(results(1.0, 1.1, 1.2), results(1.3, 1.4, 1.5)) == (2, 0)
    assert agreement(ops_results(1.0), results(1.0, 1.1, 1.2)) == (0, 0)


def test_compare_by_command(monkeypatch, tmp_path, capsys):
    other = ops_results(0.5, 1.0, 2.0)
    other.environment = ENVIRONMENT | {"threads": 2}
    ops_results(1.0, 1.0).write(tmp_path / "a.json")
    other.write(tmp_path / "b.csv")
    assert run(monkeypatch, "bench", "compare", tmp_path / "a.json", tmp_path / "b.csv") == 0
    out = capsys.readouterr().out
    for word in (
        "8 rows in both",
        "2.00x [",
        "no difference [",
        "the runs differ in threads",
        "4 rows are in one file",
    ):
        assert word in out


def test_compare_says_which_file_is_broken(monkeypatch, tmp_path, capsys):
    ops_results(1.0).write(tmp_path / "a.json")
    (tmp_path / "b.json").write_text("{")
    assert run(monkeypatch, "bench", "compare", tmp_path / "a.json", tmp_path / "b.json") == 1
    assert "b.json: not a file of results" in capsys.readouterr().err


def test_pictures(monkeypatch, tmp_path, capsys):
    ops_results(1.0, 0.5, 0.0).write(tmp_path / "ops.json")
    curve_results().write(tmp_path / "table1.json")
    files = [tmp_path / "ops.json", tmp_path / "table1.json"]
    assert run(monkeypatch, "bench", "plot", *files, "--output", tmp_path / "out") == 0
    pictures = [tmp_path / "out" / name for name in ("ops.png", "table1.png")]
    assert capsys.readouterr().out.split() == list(map(str, pictures))
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_nothing_to_plot_is_said(tmp_path):
    with pytest.raises(ValueError, match="no row has a figure"):
        plot(ops_results(0.0), tmp_path / "x.png")


@pytest.mark.parametrize("command", ["compare", "plot"])
def test_help_teaches(monkeypatch, capsys, command):
    assert run(monkeypatch, "bench", command, "--help") == 0
    assert len(capsys.readouterr().out.splitlines()) > 8
