"""Comparing two files, and drawing one."""

import pytest

from mimdet.bench import views
from mimdet.bench.compare import agreement, compare
from mimdet.bench.plot import plot
from mimdet.bench.row import Results

ENVIRONMENT = {"device": "an abacus", "threads": 1, "versions": {"torch": "2"}, "date": "today", "commit": "abc"}
SHAPE = {"case": "encoder", "shape": "1x2x3", "dtype": "fp32", "cache": "warm"}
MODEL = {"part": "backbone", "size": "64x64", "batch": 1, "dtype": "fp32", "depth": 4}


def timed(milliseconds, **columns):
    samples = [milliseconds * (1 + 0.01 * (i % 3)) for i in range(15)]
    times = {"samples_ms": samples, "p20_ms": samples[0], "p50_ms": samples[1], "p80_ms": samples[2], "rounds": 15}
    return {**columns, "status": "ok", **(times if milliseconds else {})}


def ops_results(*milliseconds):
    rows = [
        timed(ms, experiment="ops", operation=op, implementation=name, direction=direction, of_limit=0.5, **SHAPE)
        for op in ("bias_gelu", "scatter_fill")
        for direction in ("forward", "backward")
        for name, ms in zip(("eager", "cpp", "inductor"), milliseconds, strict=False)
    ]
    return Results("mimdet bench ops", ENVIRONMENT, {"copy_gb_s": 20.0}, rows)


def curve_results():
    rows = [
        timed(10 * ratio * slow, experiment="backbone", mode=mode, ratio=ratio, implementation=name, **MODEL)
        | {"relative_time": 2 * ratio, "relative_memory": ratio + 0.5}
        | ({"paper_time": 1.5 * ratio, "relative_activation": ratio} if mode == "train" else {})
        for mode in ("train", "inference")
        for name, slow in (("ours", 1), ("original", 2))
        for ratio in (0.25, 0.5, 1.0)
    ]
    return Results("mimdet bench table1", ENVIRONMENT, {"copy_gb_s": 20.0}, rows)


def test_a_change_is_seen_and_its_absence_too():
    changes = compare(ops_results(1.2, 1.0, 0.0), ops_results(1.0, 1.0, 1.0))
    assert len(changes) == 12
    faster, same, missing = changes[:3]
    assert faster["name"].split()[-1] == "eager"
    assert str(faster["speedup"]).startswith("1.20x")
    assert str(same["speedup"]).startswith("no difference")
    assert missing["speedup"] is missing["before_ms"] is None


def test_only_common_rows_are_compared():
    assert len(compare(ops_results(1.0, 1.0), ops_results(1.0))) == 4
    with pytest.raises(ValueError, match="no row in common"):
        compare(ops_results(1.0), curve_results())


def test_speedups_of_two_runs_agree_where_their_intervals_overlap():
    assert agreement(ops_results(2.0, 1.0), ops_results(4.0, 2.0)) == (4, 4)
    assert agreement(ops_results(2.0, 1.0), ops_results(3.0, 1.0)) == (4, 0)
    assert agreement(ops_results(1.0), ops_results(1.0, 1.0)) == (0, 0)


def test_compare_by_command(bench, tmp_path, capsys):
    other = ops_results(0.5, 1.0, 2.0)
    other.environment = ENVIRONMENT | {"threads": 2}
    ops_results(1.0, 1.0).write(tmp_path / "a.json")
    other.write(tmp_path / "b.csv")
    assert bench("compare", tmp_path / "a.json", tmp_path / "b.csv") == 0
    out = capsys.readouterr().out
    differences = ("2.00x [", "no difference [", "the runs differ in threads", "4 rows are in one file")
    for words in ("8 rows in both", *differences, "of 4 in both files, 0 have"):
        assert words in out


def test_a_table_is_the_same_view_everywhere():
    """Empty columns are left out; a failed row shows its status instead of numbers."""
    rows = [
        {"name": "a", "ms": 1.234, "status": "ok"},
        {"name": "b", "status": "wrong: output 0"},
        {"name": "c", "ms": None},
    ]
    columns = [("what", "name", ""), ("nothing", "absent", ".1f"), ("ms", "ms", ".2f")]
    assert views.cells(columns, rows)[1][1][1] == "wrong: output 0"
    assert views.markdown(columns[::2], rows[::2]) == "| what | ms |\n| --- | --: |\n| a | 1.23 |\n| c |  |\n"
    table = views.terminal("title", columns[::2], rows)
    assert [column.header for column in table.columns] == ["what", "ms"]
    assert [column.justify for column in table.columns] == ["left", "right"]
    assert list(table.columns[1].cells) == ["1.23", "wrong: output 0", ""]


def test_plots(bench, tmp_path, capsys):
    ops_results(1.0, 0.5, 0.0).write(tmp_path / "ops.json")
    curve_results().write(tmp_path / "table1.json")
    files = [tmp_path / "ops.json", tmp_path / "table1.json"]
    assert bench("plot", *files, "--output", tmp_path / "out") == 0
    figures = [tmp_path / "out" / name for name in ("ops.png", "table1.png")]
    assert capsys.readouterr().out.split() == list(map(str, figures))
    assert all(figure.read_bytes().startswith(b"\x89PNG") for figure in figures)


def test_nothing_to_plot_is_said(tmp_path):
    with pytest.raises(ValueError, match="no row has a time"):
        plot(ops_results(0.0), tmp_path / "x.png")
    unknown = Results("", {}, {}, [timed(1.0, experiment="cakes", implementation="ours")])
    with pytest.raises(ValueError, match="no experiment 'cakes'"):
        plot(unknown, tmp_path / "x.png")
