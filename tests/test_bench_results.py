"""Files of figures: what is written is read, and nothing else."""

import json

import pytest

from mimdet.bench.results import COLUMNS, KEYS, Results, ResultsError

VALUES = {"str": "a, b", "int": 3, "float": 0.5, "float?": 1.25, "floats": [1.5, 2.0]}


def results(kind, **changes):
    rows = [{column: VALUES[form] for column, form in COLUMNS[kind].items()} for _ in range(2)]
    rows[1] |= {column: None for column, form in COLUMNS[kind].items() if form.endswith("?")}
    rows[1]["samples_ms"] = []
    environment = {"device": "an abacus, 2 rods", "versions": {"torch": "2"}, "load_average": [0.1, 0.2, 0.3]}
    return Results(kind, "mimdet bench", environment, {"copy_gb_s": 1.0}, rows)


@pytest.mark.parametrize("suffix", [".json", ".csv"])
@pytest.mark.parametrize("kind", COLUMNS)
def test_round_trip(tmp_path, kind, suffix):
    path = tmp_path / f"figures{suffix}"
    written = results(kind)
    written.write(path)
    assert Results.read(path) == written


@pytest.mark.parametrize("kind", COLUMNS)
def test_keys_are_columns(kind):
    assert set(KEYS[kind]) < set(COLUMNS[kind])


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
    "newer": (edited(lambda c: c.update(schema=99)), "schema 99, this version reads 1"),
    "kind": (edited(lambda c: c.update(kind="cakes")), "kind 'cakes' is none of ops, backbone"),
    "no rows": (edited(lambda c: c.pop("rows")), "'rows' is missing"),
    "more": (edited(lambda c: c.update(extra=1)), r"unknown entries \['extra'\]"),
    "no column": (edited(lambda c: c["rows"][1].pop("p50_ms")), r"row 1 has not the columns of 'ops': \['p50_ms'\]"),
    "text": (edited(lambda c: c["rows"][0].update(p50_ms="fast")), "row 0: p50_ms is 'fast', not float"),
    "nan": (edited(lambda c: c["rows"][0].update(p50_ms=float("nan"))), "row 0: p50_ms is nan"),
    "bool": (edited(lambda c: c["rows"][0].update(rounds=True)), "row 0: rounds is True, not int"),
}


@pytest.mark.parametrize(("edit", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_named_and_explained(tmp_path, edit, message):
    path = tmp_path / "figures.json"
    results("ops").write(path)
    path.write_text(edit(path.read_text()))
    with pytest.raises(ResultsError, match=message) as caught:
        Results.read(path)
    assert "figures.json" in str(caught.value)


CSV_BROKEN = {
    "no comment": (lambda lines: lines[1:], "no comment with the schema"),
    "short line": (lambda lines: [*lines[:-1], lines[-1].split(",")[0]], "cut short"),
    "long line": (lambda lines: [*lines[:-1], lines[-1] + ",1"], "has not the columns"),
    "text": (lambda lines: [*lines[:-1], lines[-1].replace(",3,", ",many,")], "many"),
}


@pytest.mark.parametrize(("edit", "message"), CSV_BROKEN.values(), ids=CSV_BROKEN)
def test_broken_csv(tmp_path, edit, message):
    path = tmp_path / "figures.csv"
    results("ops").write(path)
    path.write_text("\n".join(edit(path.read_text().splitlines())))
    with pytest.raises(ResultsError, match=message):
        Results.read(path)


def test_what_cannot_be_read_is_not_written(tmp_path):
    wrong = results("ops")
    wrong.rows[0]["p50_ms"] = float("inf")
    with pytest.raises(ResultsError, match="p50_ms is inf"):
        wrong.write(tmp_path / "figures.json")
    assert not list(tmp_path.iterdir())
