"""Files of results: written and read again; others are refused."""

import json

import pytest

from mimdet.bench.row import COLUMNS, Results, ResultsError, key

VALUES = {str: "a, b", int: 3, float: 0.5, list: [1.5, 2.0]}


def results():
    """A row with every column, and one with the required ones."""
    rows = [
        {column: VALUES[kind] for column, kind in COLUMNS.items()},
        {"experiment": "ops", "implementation": "cpp", "status": "wrong: output 0"},
    ]
    environment = {"device": "an abacus, 2 rods", "versions": {"torch": "2"}, "load_average": [0.1, 0.2, 0.3]}
    return Results("mimdet bench", environment, {"copy_gb_s": 1.0}, rows)


@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_round_trip(tmp_path, suffix):
    path = tmp_path / f"figures{suffix}"
    results().write(path)
    assert Results.read(path) == results()


def test_rows_are_equal_in_their_keys():
    row = {"experiment": "ops", "operation": "bias_gelu", "batch": 2, "implementation": "cpp", "p50_ms": 1.0}
    assert key(row) == key(row | {"p50_ms": 2.0, "status": "ok"}) != key(row | {"batch": 3})
    assert key(row, "implementation") == key(row | {"implementation": "eager"}, "implementation")


def edited(change):
    def edit(text):
        content = json.loads(text)
        change(content)
        return json.dumps(content)

    return edit


BROKEN = {
    "cut": (lambda text: text[:-20], "not a file of results"),
    "empty": (lambda text: "", "not a file of results"),
    "binary": (lambda text: "\x00\x01", "not a file of results"),
    "list": (lambda text: "[1]", "no schema number"),
    "newer": (edited(lambda c: c.update(schema=99)), "schema 99, this version reads 2"),
    "no rows": (edited(lambda c: c.pop("rows")), "'rows' is missing"),
    "more": (edited(lambda c: c.update(extra=1)), r"unknown entries \['extra'\]"),
    "no column": (edited(lambda c: c["rows"][1].pop("status")), r"row 1: missing columns \['status'\]"),
    "new column": (edited(lambda c: c["rows"][1].update(joules=1.0)), r"row 1: .* unknown columns \['joules'\]"),
    "text": (edited(lambda c: c["rows"][0].update(p50_ms="fast")), "row 0: p50_ms is 'fast', not float"),
    "nan": (edited(lambda c: c["rows"][0].update(p50_ms=float("nan"))), "row 0: p50_ms is nan"),
    "bool": (edited(lambda c: c["rows"][0].update(rounds=True)), "row 0: rounds is True, not int"),
}


@pytest.mark.parametrize(("edit", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_named_and_explained(tmp_path, edit, message):
    path = tmp_path / "figures.json"
    results().write(path)
    path.write_text(edit(path.read_text()))
    with pytest.raises(ResultsError, match=message) as caught:
        Results.read(path)
    assert "figures.json" in str(caught.value)


CSV_BROKEN = {
    "no comment": (lambda lines: lines[1:], "no comment with the schema"),
    "short line": (lambda lines: [*lines[:-1], lines[-1].split(",")[0]], "too few or too many cells"),
    "long line": (lambda lines: [*lines[:-1], lines[-1] + ",1"], "too few or too many cells"),
    "text": (lambda lines: [*lines[:2], lines[2].replace(",3,", ",many,"), *lines[3:]], "many"),
}


@pytest.mark.parametrize(("edit", "message"), CSV_BROKEN.values(), ids=CSV_BROKEN)
def test_broken_csv(tmp_path, edit, message):
    path = tmp_path / "figures.csv"
    results().write(path)
    path.write_text("\n".join(edit(path.read_text().splitlines())))
    with pytest.raises(ResultsError, match=message):
        Results.read(path)


def test_what_cannot_be_read_is_not_written(tmp_path):
    wrong = results()
    wrong.rows[0]["p50_ms"] = float("inf")
    with pytest.raises(ResultsError, match="p50_ms is inf"):
        wrong.write(tmp_path / "figures.json")
    assert not list(tmp_path.iterdir())
