"""One word for one thing: the field's word in code, comments, help, errors and documentation, never a private one."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("mimdet", "kernels", "csrc", "bench", "configs", "tests", "docs", ".github")
SUFFIXES = {".py", ".md", ".toml", ".yml", ".sh", ".txt", ".h", ".cpp", ".cu", ".cuh", ".css"}
SKIPPED = ("bench/results/", "tests/recordings/", "tests/docs/test_words.py")

STEMS = ("normal", "initial", "serial", "optim", "raster", "vector", "general", "summar", "recogn", "parallel", "quant")

# Regex of a word -> the word to use. Case is ignored; an underscore ends a word, so that parts of names count too.
WORDS = {
    r"pictures?": "image",
    r"peers?": "baseline, implementation",
    r"upload(s|ed|ing)?": "to_device",
    r"twins?": "counterpart, a small model",
    r"(?<!page )faults?": "error, mutation",
    r"why_wrong": "error",
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
}
# Text that is no such word here: taken out before the search.
EXCEPTIONS = (
    r"actions/upload-artifact",  # the name of an action
    r"--peers",  # a former option, in the recorded commands of results
)
# Names of variables and arguments say what they hold; these say only what happened to it.
NAMES = {"given", "made", "own", "wanted", "found", "outcome", "odd"}


def tracked():
    """Text files of the checkout that hold words of this project."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        top = name.split("/")[0]
        ours = top in FOLDERS or (top == name and path.suffix in (".md", ".toml", ".py"))
        if ours and path.suffix in SUFFIXES and not name.startswith(SKIPPED) and path.is_file():
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
    for name, text in tracked():
        wrong += wrong_words(name, text)
        if name.endswith(".py"):
            wrong += wrong_names(name, text)
    assert not wrong, "\n" + "\n".join(wrong)
