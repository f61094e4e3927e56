"""Tables of README.md and docs/*.md equal the committed files of results."""

from pathlib import Path

import pytest

from mimdet.bench import configs
from mimdet.bench.experiments.backbone import paper
from mimdet.bench.readme import fill, pages, update
from mimdet.bench.row import Results, ResultsError
from mimdet.config import load

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "bench" / "results").rglob("*.json"))
PLACE = "<!-- results: r.json -->\nold\n<!-- end of results -->"


@pytest.mark.parametrize("page", pages(ROOT), ids=lambda page: page.name)
def test_tables_are_what_the_results_say(page):
    text = page.read_text(encoding="utf-8")
    assert fill(text, page.parent) == text, "run: mimdet bench readme"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_committed_results_can_be_read_and_name_nobody(path):
    results = Results.read(path)
    assert results.command.startswith("mimdet bench")
    assert results.environment["commit"]
    text = path.read_text(encoding="utf-8")
    assert "/root" not in text
    assert '"schema": 2' in text
    assert path.stat().st_size < 400_000
    assert len(text.splitlines()) < len(results.rows) + 50, "one row a line"


@pytest.mark.parametrize("folder", ["", "docs"])
def test_changed_figures_are_noticed(tmp_path, folder):
    """Pages in docs name files as README.md does."""
    (tmp_path / "r.json").write_bytes(FILES[0].read_bytes())
    (tmp_path / folder).mkdir(exist_ok=True)
    page = tmp_path / folder / "page.md"
    page.write_text(f"a\n{PLACE}\nb\n")
    assert update(page)
    assert not update(page)
    filled = page.read_text()
    assert filled.startswith("a\n<!-- results: r.json -->\n`mimdet bench")
    assert filled.endswith("<!-- end of results -->\nb\n")
    assert "old" not in filled


def test_the_command_finds_the_pages(tmp_path, monkeypatch, bench, capsys):
    (tmp_path / "r.json").write_bytes(FILES[0].read_bytes())
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("no table")
    (tmp_path / "docs" / "benchmarks.md").write_text(PLACE)
    monkeypatch.chdir(tmp_path)
    assert bench("readme") == 0
    assert capsys.readouterr().out.splitlines() == ["docs/benchmarks.md: filled"]
    assert bench("readme", "README.md") == 1
    assert "no markers for results" in capsys.readouterr().err


def test_every_config_has_a_row(tmp_path, monkeypatch):
    folder = tmp_path / "configs"
    for name in ("tiny", "ablations/more", "common/part"):
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        model = "model = dict(_target_='torch.nn.Linear', in_features=999, out_features=1000)"
        path.write_text(f'"""What it is.\n\nMore of it."""\n{model}')
    claims = [
        {"config": "tiny", "ap": [50.0, 40.25], "by": "Table 0", "words": ["a=1"]},
        {"config": "tiny", "command": "run"},
    ]
    monkeypatch.setattr(configs, "paper", lambda: {"claims": claims})
    page = "<!-- configs: configs -->\nold\n<!-- end of configs -->"
    train = "mimdet train --config-file"
    assert fill(page, tmp_path).splitlines()[2:] == [
        "| --- | --- | --: | --- | --- |",
        f"| [`tiny`](configs/tiny.py) | What it is | 1.00 | 50.0 / 40.2, Table 0 | `{train} tiny a=1` |",
        "| [`tiny`](configs/tiny.py) | What it is | 1.00 |  | `run` |",
        f"| [`ablations/more`](configs/ablations/more.py) | What it is | 1.00 |  | `{train} ablations/more` |",
        "<!-- end of configs -->",
    ]
    (tmp_path / "docs").mkdir()
    assert "[`tiny`](../configs/tiny.py)" in fill(page, tmp_path / "docs")
    claims.append({"config": "absent"})
    with pytest.raises(ValueError, match="no config absent"):
        fill(page, tmp_path)
    claims.pop()
    (folder / "tiny.py").write_text("model = dict()")
    with pytest.raises(ValueError, match="begins with a docstring"):
        fill(page, tmp_path)


def test_the_papers_claims_are_of_shipped_configs():
    claims = paper()["claims"]
    claimed, shipped = {claim["config"] for claim in claims}, set(configs.names(ROOT / "configs"))
    assert claimed <= shipped
    assert shipped - claimed == {"ablations/stem_layer_norm", "mimdet_tiny_mask_rcnn"}
    assert len({str(claim) for claim in claims}) == len(claims)
    for claim in claims:
        load(claim["config"], [word for word in claim.get("words", ()) if "=" in word])


def test_no_file_and_no_row(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"r\.json"):
        fill(PLACE, tmp_path)
    (tmp_path / "r.json").write_bytes(FILES[0].read_bytes())
    with pytest.raises(ValueError, match="no row with dtype=fp8"):
        fill(PLACE.replace(".json", ".json dtype=fp8"), tmp_path)
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(ResultsError, match=r"r\.json: not a file of results"):
        fill(PLACE, tmp_path)
