"""``mimdet parity --compare``: which errors grew, by how many units in the last place, and what auto changed."""

import json

import pytest
from support.command import run

from mimdet.parity import compare, report

ULP = 2.0**-23


def write(path, *rows, auto="cpp", **environment):
    """A file of these cases: id, error in ulps, status."""
    listed = [
        {
            "id": name,
            "tensor": "output0",
            "error": None if error is None else error * ULP,
            "budget": 8 * ULP,
            "ulp": ULP,
            "status": status,
        }
        for name, error, status in rows
    ]
    about = {"versions": {"torch": environment.get("torch", "2.14.0")}, "variables": {}, "processor": "A", "date": path}
    content = {"format": report.FORMAT, "version": report.VERSION, "environment": about, "auto": {"op cpu fp32": auto}}
    path.write_text(json.dumps({**content, "cases": listed}, default=str))
    return path


def command(monkeypatch, *argv):
    return run(monkeypatch, "parity", "--compare", *argv)


def test_growth_in_units_in_the_last_place(tmp_path):
    first = write(
        tmp_path / "a.json", ("same", 1, "passed"), ("little", 1, "passed"), ("much", 1, "passed"),
        ("less", 3, "passed"), ("gone", 1, "passed"), ("fails", 7, "passed"), ("broken", None, "failed"),
        ("mended", None, "failed"),
    )  # fmt: skip
    second = write(
        tmp_path / "b.json", ("same", 1.4, "passed"), ("little", 2, "passed"), ("much", 5, "passed"),
        ("less", 1, "passed"), ("fails", 9, "failed"), ("broken", None, "failed"), ("new", 1, "passed"),
        ("mended", 2, "passed"), auto="eager", torch="2.15.0",
    )  # fmt: skip
    result = compare.compare(first, second)
    grown = {growth.id: growth.ulps for growth in result.grown}
    assert grown == {"fails": pytest.approx(2), "much": pytest.approx(4), "little": pytest.approx(1)}
    assert next(iter(grown)) == "fails"
    assert (result.shrunk, result.same) == (2, 2)
    assert result.newly_failed == ["fails"]
    assert (result.only_first, result.only_second) == (["gone"], ["new"])
    assert result.auto == [("op cpu fp32", "cpp", "eager")]
    assert result.environment == [("torch", "2.14.0", "2.15.0")]


def test_the_command_prints_them(tmp_path, monkeypatch, capsys):
    first, second = write(tmp_path / "a.json", ("x", 1, "passed")), write(tmp_path / "b.json", ("x", 3, "passed"))
    assert command(monkeypatch, first, second) == 0
    out = capsys.readouterr().out
    assert "2.0 ulp" in out
    assert out.splitlines()[-1] == "1 cases in both: 1 errors grew, 0 shrank, 0 are the same"
    write(second, ("x", 30, "failed"), auto="eager")
    assert command(monkeypatch, first, second) == 1
    out = capsys.readouterr().out
    assert "auto chooses another implementation" in " ".join(out.split())
    assert out.splitlines()[-1].endswith("1 passed in A and fail in B")


def test_a_result_compared_with_itself(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "parity", "--quick", "--only", "nms_slots-eager", "--json", tmp_path / "a.json") == 0
    result = compare.compare(tmp_path / "a.json", tmp_path / "a.json")
    assert not any((result.grown, result.shrunk, result.auto, result.environment))
    assert result.same > 2


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("environment", [1]),
        ("environment.versions", [1]),
        ("auto", ["a"]),
        ("auto", {"op": 1}),
        ("cases", {"a": 1}),
        ("cases[0]", 1),
        ("cases[0].id", ["x"]),
        ("cases[0].tensor", None),
        ("cases[0].status", ["failed"]),
        ("cases[0].error", "1"),
        ("cases[0].budget", True),
        ("cases[0].ulp", float("nan")),
    ],
)
def test_a_file_that_was_changed_is_refused(tmp_path, monkeypatch, capsys, place, value):
    good = write(tmp_path / "good.json", ("x", 1, "passed"))
    content = json.loads(good.read_text())
    node, *path = [content, *place.replace("[0]", ".0").split(".")]
    for key in path[:-1]:
        node = node[int(key) if key.isdigit() else key]
    node[int(path[-1]) if path[-1].isdigit() else path[-1]] = value
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(content))
    for pair in ((good, bad), (bad, good)):
        assert command(monkeypatch, *pair) == 2
        assert f"bad.json: {place} is not as mimdet parity --json writes it" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000, "9" * 5000, ""])
def test_a_file_that_is_no_json_is_refused(tmp_path, monkeypatch, capsys, text):
    (tmp_path / "bad.json").write_text(text)
    assert command(monkeypatch, tmp_path / "bad.json", tmp_path / "bad.json") == 2
    assert "bad.json" in capsys.readouterr().err


def test_text_of_a_file_is_shown_as_it_is(tmp_path, monkeypatch, capsys):
    """Neither rich's markup nor a terminal's commands."""
    first = write(tmp_path / "a.json", ("[/x]\x1b]0;title\x07", 1, "passed"), torch="[red]2")
    second = write(tmp_path / "b.json", ("[/x]\x1b]0;title\x07", 9, "passed"), auto="[/bold]")
    assert command(monkeypatch, first, second) == 0
    out = capsys.readouterr().out
    assert all(text in out for text in ("[/x] ]0;title ", "[red]2", "[/bold]"))
    assert "\x1b]" not in out
