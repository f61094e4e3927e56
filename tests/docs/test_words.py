"""One word for one thing, the field's, in code, comments, help, errors and documentation."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("mimdet", "kernels", "csrc", "bench", "configs", "tests", "docs", ".github")
SUFFIXES = {".py", ".md", ".toml", ".yml", ".sh", ".txt", ".h", ".cpp", ".cu", ".cuh", ".css"}
SKIPPED = ("bench/results/", "tests/recordings/", "tests/docs/test_words.py")

STEMS = ("normal", "initial", "serial", "optim", "raster", "vector", "general", "summar", "recogn", "parallel", "quant")

# Regex of a word -> the word to use. Case is ignored. An underscore ends a word: parts of names count too.
WORDS = {
    r"pictures?": "image",
    r"peers?": "baseline, implementation",
    r"upload(s|ed|ing)?": "to_device",
    r"twins?": "counterpart, a small model",
    r"(?<!page )faults?": "error, mutation",
    r"why_wrong|flaws?": "error",
    r"(lazy|another|other) forms?": "LazyConfig, format, variant",
    r"_inside": "valid_mask, zero_padding",
    r"outcomes?": "result",
    r"wanted": "expected",
    r"remade": "recomputed",
    r"waits? for (the )?backward": "is saved for backward, saved tensors, activation memory",
    r"dialects?|house|faces?": "interface, package",
    r"lies": "is",
    r"stands (?!for\b)": "is",
    r"(?<!HUE)_spread": "launch_distributed",
    r"(?<!standard )(?<!squared )deviations?": "std, x_centered",
    r"(?<!x_)hat|xhat": "x_hat",
    r"mu": "mean",
    # The config's value is written with quotes.
    r"(?<![\"'`=])lean(?![\"'`])": "selective recomputation",
    # American spelling, as PyTorch has it.
    r"centred|centres?|centring": "centered, center",
    rf"({'|'.join(STEMS)})is(e|ed|es|er|ers|ing|ation)": "-ize, -ization",
    r"colou?red|colours?": "color",
    r"neighbour(s|ing|hood)?": "neighbor",
    r"behaviours?": "behavior",
    r"grey": "gray",
    r"modell(ed|ing)": "modeling",
    r"labell(ed|ing)": "labeled",
    r"licence": "license",
}
# Text that is no such word here: taken out before the search.
EXCEPTIONS = (
    r"actions/upload-artifact",  # the name of an action
    r"--peers",  # a former option, in the recorded commands of results
)
# Names of variables and arguments say what they hold; these say only what happened to it.
NAMES = {"given", "made", "own", "wanted", "found", "outcome", "odd"}


def files():
    """Text files of the project, by their names; links, caches and recorded results are left out."""
    paths = [*ROOT.glob("*.*"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.*"))]
    for path in sorted(paths):
        name = path.relative_to(ROOT).as_posix()
        if path.is_file() and path.suffix in SUFFIXES and not name.startswith(SKIPPED):
            yield name, path.read_text(encoding="utf-8")


def wrong_words(name, text):
    """``file:line: word: use another`` for every word of the list."""
    for number, line in enumerate(text.splitlines(), 1):
        line = re.sub("|".join(EXCEPTIONS), " ", line)
        for word, use in WORDS.items():
            for match in re.finditer(rf"(?<![A-Za-z0-9])(?:{word})(?![A-Za-z0-9])", line, re.I):
                yield f"{name}:{number}: {match[0].strip()!r}: use {use}"


def wrong_names(name, text):
    """The same for variables and arguments of Python."""
    for node in ast.walk(ast.parse(text)):
        bound = node.arg if isinstance(node, ast.arg) else getattr(node, "id", None)
        if bound in NAMES and not isinstance(getattr(node, "ctx", None), ast.Load):
            yield f"{name}:{node.lineno}: {bound} is no name of a value: say what it is"


def test_the_fields_words_are_used():
    wrong = []
    for name, text in files():
        wrong += wrong_words(name, text)
        if name.endswith(".py"):
            wrong += wrong_names(name, text)
    assert not wrong, "\n" + "\n".join(wrong)


def test_every_folder_is_searched():
    names = {name.split("/")[0] for name, _ in files()}
    assert names >= {*FOLDERS, "README.md", "pyproject.toml", "setup.py"}


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("# Pictures stand in rows.", "'Pictures'"),
        ("peer_of(stem)", "'peer'"),
        ("the lean block", "'lean'"),
        ("xhat = x - mean", "'xhat'"),
        ("Normalised rows", "'Normalised'"),
    ],
)
def test_wrong_words_are_noticed(line, word):
    (wrong,) = wrong_words("a.py", f"\n{line}")
    assert wrong.startswith(f"a.py:2: {word}: use ")


def test_wrong_names_are_noticed():
    assert list(wrong_names("a.py", "def f(wanted):\n    found = wanted\n    x.made = 1\n")) == [
        "a.py:1: wanted is no name of a value: say what it is",
        "a.py:2: found is no name of a value: say what it is",
    ]


@pytest.mark.parametrize(
    "line",
    [
        'recompute="lean", batch_mode="canvas"',
        "model.backbone.bottom_up.encoder.recompute=lean",
        "platform, transform, performance, surface, believes",
        "the standard deviation; an x_hat; fewer than ten page faults",
        "- uses: actions/upload-artifact@v4",
    ],
)
def test_right_words_pass(line):
    assert not list(wrong_words("a.py", line))
