"""The figures in README and docs are those of the committed files of results."""

import re
from pathlib import Path

import pytest
from test_cli import run

from mimdet.bench.backbone import paper
from mimdet.bench.configs import names
from mimdet.bench.readme import PAGES, fill, update
from mimdet.bench.results import Results, ResultsError
from mimdet.config import load

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "bench" / "results").rglob("*.json"))


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_what_the_results_say(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert fill(text, ROOT, (ROOT / page).parent) == text, "run: mimdet bench readme"


def test_every_page_with_a_place_is_filled():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    marked = {str(p.relative_to(ROOT)) for p in pages if re.search(r"^<!-- (results|configs): ", p.read_text(), re.M)}
    assert marked == set(PAGES)


def test_a_page_in_a_folder_names_files_from_the_checkout(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "docs").mkdir()
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.py").write_text("'''What it is.'''\nmodel = dict(_target_='torch.nn.Identity')")
    page = tmp_path / "docs" / "page.md"
    page.write_text("<!-- configs: configs -->\n<!-- end of configs -->\n")
    monkeypatch.setattr("mimdet.bench.configs.paper", lambda: {"claims": []})
    assert update(page)
    assert "| [`tiny`](../configs/tiny.py) | What it is |" in page.read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_committed_results_can_be_read_and_name_nobody(path):
    found = Results.read(path)
    assert found.command.startswith("mimdet bench")
    assert found.environment["commit"]
    assert "/root" not in path.read_text(encoding="utf-8")
    assert path.stat().st_size < 400_000


def test_changed_figures_are_noticed(tmp_path):
    (tmp_path / "r.json").write_bytes(FILES[0].read_bytes())
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- results: r.json -->\nold\n<!-- end of results -->\nb\n")
    assert update(page)
    assert not update(page)
    filled = page.read_text()
    assert filled.startswith("a\n<!-- results: r.json -->\n`mimdet bench")
    assert filled.endswith("<!-- end of results -->\nb\n")
    assert "old" not in filled


def test_every_config_has_a_row(tmp_path):
    configs = tmp_path / "configs"
    (configs / "ablations").mkdir(parents=True)
    (configs / "common").mkdir()
    for name in ("tiny", "ablations/more", "common/part"):
        lines = (
            '"""What it is.\n\nMore of it."""',
            "model = dict(_target_='torch.nn.Linear', in_features=999, out_features=1000)",
        )
        (configs / f"{name}.py").write_text("\n".join(lines))
    claims = [
        {"config": "tiny", "ap": [50.0, 40.25], "by": "Table 0", "words": ["a=1"]},
        {"config": "tiny", "command": "run"},
    ]
    page = "<!-- configs: configs -->\nold\n<!-- end of configs -->"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mimdet.bench.configs.paper", lambda: {"claims": claims})
        lines = fill(page, tmp_path).splitlines()
        claims.append({"config": "absent"})
        with pytest.raises(ValueError, match="no config absent"):
            fill(page, tmp_path)
        claims.pop()
        (configs / "tiny.py").write_text("model = dict()")
        with pytest.raises(ValueError, match="begins with a docstring"):
            fill(page, tmp_path)
    assert lines[2] == "| --- | --- | --: | --- | --- |"
    assert lines[3:6] == [
        "| [`tiny`](configs/tiny.py) | What it is | 1.00 | 50.0 / 40.2, Table 0 | "
        "`mimdet train --config-file tiny a=1` |",
        "| [`tiny`](configs/tiny.py) | What it is | 1.00 |  | `run` |",
        "| [`ablations/more`](configs/ablations/more.py) | What it is | 1.00 |  | "
        "`mimdet train --config-file ablations/more` |",
    ]
    assert lines[6:] == ["<!-- end of configs -->"]


def test_the_papers_claims_are_of_shipped_configs():
    claims = paper()["claims"]
    shipped = names(ROOT / "configs")
    assert {claim["config"] for claim in claims} <= set(shipped)
    assert set(shipped) - {claim["config"] for claim in claims} == {"mimdet_tiny_mask_rcnn"}
    assert len({str(claim) for claim in claims}) == len(claims)
    for claim in claims:
        load(claim["config"], [word for word in claim.get("words", ()) if "=" in word])


def test_no_place_and_no_file(tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="no place for results"):
        fill("text", tmp_path)
    place = "<!-- results: absent.json -->\n<!-- end of results -->"
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        fill(place, tmp_path)
    (tmp_path / "absent.json").write_bytes(FILES[0].read_bytes())
    with pytest.raises(ValueError, match="no row with dtype=fp8"):
        fill(place.replace(".json", ".json dtype=fp8"), tmp_path)
    (tmp_path / "absent.json").write_text("{}")
    with pytest.raises(ResultsError, match=r"absent\.json: not a file of results"):
        fill(place, tmp_path)
    (tmp_path / "page.md").write_text("text")
    assert run(monkeypatch, "bench", "readme", tmp_path / "page.md") != 0
    assert "no place for results" in capsys.readouterr().err
