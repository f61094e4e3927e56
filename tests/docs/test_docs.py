"""The documentation holds: links resolve, commands parse or run, Python blocks run, figures are what their code draws.

A shell or Python block without a comment before it is run here. ``<!-- needs: coco, weights -->`` says what it would
take; such a block is only parsed, against the command line and the configs.
"""

import os
import re
import runpy
import shlex
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
import yaml
from markdown_it import MarkdownIt
from support.command import run

from mimdet import demo
from mimdet.cli.app import app
from mimdet.config import find_config, load
from mimdet.parity import pytest_plugin

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
NEEDS = {"coco", "weights", "data", "gpu", "detectron2", "network", "time"}
ANY_CONFIG = "mimdet_b_mask_rcnn"
# What a block that runs here trains: the same commands, short.
TRAIN_WORDS = ("train.max_iter=1", "dataloader.train.total_batch_size=2")


class Block(NamedTuple):
    """A fenced block."""

    page: str
    line: int
    language: str
    text: str
    needs: frozenset[str]


class Page(NamedTuple):
    """What the tests read of a Markdown file."""

    links: list[str]
    codes: list[str]
    blocks: list[Block]
    anchors: set[str]
    prose: str


def name(path):
    return path.relative_to(ROOT).as_posix()


@cache
def read(path):
    text = path.read_text(encoding="utf-8")
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    page = Page([], [], [], set(), "")
    prose, generated = [], False
    for i, token in enumerate(tokens):
        if token.type == "html_block":
            generated = bool(re.match(r"<!-- (results|configs): ", token.content)) or (
                generated and "<!-- end of" not in token.content
            )
        if token.type == "fence":
            before = tokens[i - 1].content if i and tokens[i - 1].type == "html_block" else ""
            needs = re.search(r"<!-- needs: (.+?) -->\s*$", before)
            words = frozenset(re.split(r",\s*", needs[1])) if needs else frozenset()
            assert words <= NEEDS, f"{name(path)}:{token.map[0]}: needs one of {sorted(NEEDS)}"
            page.blocks.append(Block(name(path), token.map[0] + 1, token.info, token.content, words))
        for child in token.children or ():
            page.links.extend(child.attrs[k] for k in ("href", "src") if k in child.attrs)
            if child.type == "code_inline":
                page.codes.append(child.content)
            elif child.type == "text" and not generated:
                prose.append(child.content)
        if token.type == "heading_open":
            heading = "".join(c.content for c in tokens[i + 1].children if c.type in ("text", "code_inline"))
            # As GitHub and MyST make anchors.
            page.anchors.add(re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-"))
    return page._replace(prose="\n".join(prose))


def broken_links(path, links):
    """Those of a page's links that lead to no file of the checkout, or to no heading of it."""
    broken = []
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not (target.exists() and target.is_relative_to(ROOT)):
            broken.append(f"{link}: no such file")
        elif anchor and anchor not in read(target).anchors:
            broken.append(f"{link}: no such heading; there are {sorted(read(target).anchors)}")
    return broken


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_and_anchors_resolve(path):
    assert not broken_links(path, read(path).links)


def test_broken_links_are_noticed():
    page = ROOT / "docs" / "glossary.md"
    good = ["#keep-ratio", "glossary.md#ids_keep-ids_mask-ids_restore", "../README.md#in-python", "https://a.org/x#y"]
    assert not broken_links(page, good)
    bad = ["#no-such-heading", "no_such_page.md", "../README.md#no-such-heading", "../../outside.md"]
    assert [line.split(": ")[0] for line in broken_links(page, bad)] == bad


def commands(block):
    """The command lines of a shell block, as words."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def check_command(words):
    """Raise where a command line cannot be right."""
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    program, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "torchrun":
        program, arguments = "python", arguments[arguments.index("-m") :]
    if program in ("python", "python3") and arguments[:1] == ["-m"]:
        program, arguments = arguments[1], arguments[2:]
    if program == "mimdet":
        check_mimdet(arguments)
    elif program == "mimdet.detectron2" or program.startswith("DETECTRON2/"):
        config = find_config(arguments[arguments.index("--config-file") + 1])
        # Detectron2's configs have the keys of the native ones of the same name.
        load(config.stem, [word for word in arguments if re.match(r"[\w.]+=", word)])
    elif program == "pytest" and "--mimdet-parity" in arguments:
        parser = pytest.Parser()
        pytest_plugin.pytest_addoption(parser)
        _, others = parser.parse_known_and_unknown_args(arguments)
        assert not [word for word in others if word.startswith("--mimdet")], "no such option of the plugin"
    elif program == "pytest":
        files = [word for word in arguments if word.endswith(".py")]
        assert files, "names no file"
        assert all((ROOT / file).is_file() for file in files), "no such test"
    elif program == "make":
        assert set(arguments) <= make_targets(), f"no such target; there are {sorted(make_targets())}"
    elif program == "bash":
        assert (ROOT / arguments[0]).is_file(), "no such script"
    elif program == "pip":
        extras = {e for word in arguments for e in re.findall(r"^\.\[(.+)\]$", word) for e in e.split(",")}
        known = set(re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.M))
        assert extras <= known, f"no such extra; there are {sorted(known)}"
    elif program.startswith("mimdet."):
        assert find_spec(program), "no such module"
    elif program == "python":
        assert arguments[0] == "-c"
        compile(arguments[1], "-c", "exec")
    else:
        assert program in (".ci/run", "curl", "git", "source", "."), "this test does not know the program"


def make_targets():
    return set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.M))


def check_mimdet(arguments):
    """Options, config and overrides of a ``mimdet`` command."""
    command = typer.main.get_command(app)
    while hasattr(command, "commands") and arguments:
        assert arguments[0] in command.commands, f"no command {arguments[0]}; there are {sorted(command.commands)}"
        command, arguments = command.commands[arguments[0]], arguments[1:]
    if not arguments:
        return
    values = command.make_context(command.name, list(arguments)).params
    config = values.get("config_file") or values.get("config") or ANY_CONFIG
    if not config.isupper():  # NAME, a placeholder
        load(config, [*(values.get("opts") or ()), *(values.get("override") or ())])


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_commands_can_be_right(path):
    page = read(path)
    lines = [(block.line, words) for block in page.blocks if block.language == "sh" for words in commands(block)]
    # In the text, a command is code that begins with its name; an override is key=value.
    for code in page.codes:
        if re.match(r"(mimdet|pytest|pip install|python -m mimdet\S*|make|bash|torchrun) ", code) and "|" not in code:
            lines.append(("text", shlex.split(code)))
        elif re.fullmatch(r"(model|train|dataloader|optimizer|lr_multiplier|mae_checkpoint)(\.\w+)+=\S+", code):
            lines.append(("text", ["mimdet", "eval", "--config-file", ANY_CONFIG, code]))
    wrong = []
    for line, words in lines:
        try:
            check_command(words)
        except Exception as error:
            wrong.append(f"{name(path)}:{line}: {shlex.join(words)}: {getattr(error, 'message', error)}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line",
    [
        "mimdet train --config-file demo --no-such-option",
        "mimdet train --config-file no_such_config",
        "mimdet train --config-file demo train.no_such_key=1",
        "mimdet bench no_such_command",
        "mimdet predict photos/",
        "python -m mimdet.detectron2 --config-file configs/detectron2/no_such_config.py",
        "pytest tests/no_such_test.py",
        "pytest --mimdet-parity --mimdet-parity-no-such-option",
        "make no-such-target",
        'pip install ".[no-such-extra]"',
        "no-such-program",
    ],
)
def test_wrong_commands_are_noticed(line):
    with pytest.raises(Exception, match=r"(?i)no.such|missing|does not know"):
        check_command(shlex.split(line))


def test_every_block_has_a_known_language():
    """A block of another word than these would be neither run nor parsed."""
    languages = {block.language.split()[0] for path in PAGES for block in read(path).blocks}
    assert languages == {"sh", "python", "yaml", "bash", "bibtex", "text", "{toctree}", "{eval-rst}", "{include}"}


def scripts(block):
    """The command lines of a CI configuration or of a script."""
    if block.language == "bash":
        subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
        lines = block.text.splitlines()
    else:
        jobs = yaml.safe_load(block.text)
        jobs = jobs.get("jobs", jobs).values()
        steps = [step for job in jobs for step in job.get("steps", ())]
        lines = [line for step in steps for line in step.get("run", "").splitlines()]
        lines += [line for job in jobs for line in job.get("script", ())]
    for line in lines:
        words = shlex.split(re.sub(r"\$\{\{.*?\}\}", "VALUE", line), comments=True)
        if words and words[0] != "set":
            yield words


@pytest.mark.parametrize(
    "block",
    [b for path in PAGES for b in read(path).blocks if b.language in ("yaml", "bash")],
    ids=lambda b: f"{b.page}:{b.line}",
)
def test_ci_files_parse_and_their_commands_can_be_right(block):
    lines = list(scripts(block))
    for words in lines:
        check_command(words)
    assert any(words[0] == "mimdet" for words in lines)


def test_a_wrong_ci_file_is_noticed():
    text = "jobs:\n  a:\n    steps:\n      - run: mimdet parity --no-such-option\n"
    (words,) = scripts(Block("page", 1, "yaml", text, frozenset()))
    with pytest.raises(Exception, match=r"(?i)no such option"):
        check_command(words)
    with pytest.raises(subprocess.CalledProcessError):
        list(scripts(Block("page", 1, "bash", "if true; then", frozenset())))


def test_commands_that_need_nothing_run(tmp_path, monkeypatch, capsys):
    """In one folder, in the order of the pages, each command once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "NUM_TRAIN", 4)
    monkeypatch.setattr(demo, "NUM_VAL", 2)
    blocks = [b for path in PAGES for b in read(path).blocks if b.language == "sh" and not b.needs]
    done = []
    # The demo first: other commands read what it wrote.
    for block in sorted(blocks, key=lambda b: not b.text.startswith("mimdet demo")):
        for words in commands(block):
            if words in done:
                continue
            done.append(words)
            assert words[0] == "mimdet", f"{block.page}:{block.line}: mark what it needs: {shlex.join(words)}"
            extra = TRAIN_WORDS if words[1] in ("demo", "train") else ()
            status, printed = run(monkeypatch, *words[1:], *extra), capsys.readouterr()
            assert status == 0, f"{block.page}:{block.line}: {shlex.join(words)}: {printed.err[-500:]}"
    assert ["mimdet", "demo"] in done


PYTHON_BLOCKS = [b for path in PAGES for b in read(path).blocks if b.language == "python"]


@pytest.mark.parametrize("block", PYTHON_BLOCKS, ids=lambda b: f"{b.page}:{b.line}")
def test_python_blocks_run(block, tmp_path, monkeypatch):
    code = compile(block.text, f"{block.page}:{block.line}", "exec")
    if not block.needs:
        monkeypatch.chdir(tmp_path)
        exec(code, {"__name__": "block"})


def test_the_readmes_python_runs_and_is_short():
    (block,) = [b for b in PYTHON_BLOCKS if b.page == "README.md"]
    assert not block.needs
    assert len(block.text.splitlines()) <= 12


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 140


def table(path, header):
    """Rows of the table with this header line, as cells."""
    lines = path.read_text(encoding="utf-8").split(header + "\n")[1].splitlines()[1:]
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines[: lines.index("")]]


def test_the_readmes_models_are_those_of_the_full_table():
    models = table(ROOT / "README.md", "| config | parameters M | AP box / mask, as claimed |")
    assert len(models) == 8
    page = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
    for config, parameters, claimed in models:
        config = config.replace("(configs/", "(../configs/")
        assert re.search(rf"^\| {re.escape(config)} \| [^|]+ \| {parameters} \| {re.escape(claimed)} ?\|", page, re.M)


def drawn(svg):
    """An SVG's content, without what differs between versions of Matplotlib: digits far behind the point."""
    return re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.1f}", svg)


def test_the_architecture_figure_is_what_its_code_draws(tmp_path):
    figures = ROOT / "docs" / "figures"
    runpy.run_path(str(figures / "architecture.py"))["draw"](tmp_path / "architecture.svg")
    actual = (tmp_path / "architecture.svg").read_text(encoding="utf-8")
    assert drawn(actual) == drawn((figures / "architecture.svg").read_text(encoding="utf-8")), "run: make figures"
    assert os.fspath(ROOT) not in actual


WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def test_the_workflow_runs_what_ci_runs():
    """Every command of the workflow is a make target, and it has all that ``.ci/run`` has."""
    jobs = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]
    lines = [line for job in jobs.values() for step in job["steps"] for line in step.get("run", "").splitlines()]
    actual = set()
    for line in lines:
        words = [word for word in shlex.split(line) if "=" not in word]
        check_command(words)
        if words[0] == "make":
            actual.update(words[1:])
    ours = set(re.findall(r"^make (\w+)", (ROOT / ".ci" / "run").read_text(), re.M))
    assert ours
    assert ours <= actual
