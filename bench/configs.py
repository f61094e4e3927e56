"""The table of configs in the docs: what each is, its parameters, the AP that others claim for it, and its command."""

from __future__ import annotations

import ast
from pathlib import Path, PurePosixPath

import torch

from ..config import instantiate, load
from .backbone import paper

COLUMNS = ("config", "what", "parameters M", "AP box / mask, as claimed by", "command")
# Of these every file is a twin of another, or part of others.
_APART = ("common", "detectron2")


def names(folder: Path) -> list[str]:
    """The configs below a folder, as ``--config-file`` takes them: those that stand in it before its folders'."""
    found = (path.relative_to(folder).with_suffix("") for path in folder.rglob("*.py"))
    return [str(path) for path in sorted(found, key=lambda p: (len(p.parts), p)) if path.parts[0] not in _APART]


def rows(folder: Path, links: str = ".") -> list[tuple[str, ...]]:
    """One row of ``COLUMNS`` for each config below ``folder``, more where the paper has more of it.

    Args:
        folder: the configs.
        links: path from the page to the folder that holds ``folder``.

    Raises:
        ValueError: a claim for a config that is not there, or a config without a docstring.
    """
    claims: dict[str, list[dict]] = {}
    for claim in paper()["claims"]:
        claims.setdefault(claim["config"], []).append(claim)
    found = names(folder)
    if unknown := set(claims) - set(found):
        raise ValueError(f"{folder}: no config {', '.join(sorted(unknown))}, which paper.json names")
    made = []
    for name in found:
        file = folder / f"{name}.py"
        target = (PurePosixPath(links) / folder.name / f"{name}.py").as_posix()
        link, what, size = f"[`{name}`]({target})", _title(file), f"{_parameters(file) / 1e6:.2f}"
        for claim in claims.get(name, [{}]):
            made.append((link, what, size, _claimed(claim), f"`{_command(name, claim)}`"))
    return made


def _title(file: Path) -> str:
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    if not text:
        raise ValueError(f"{file}: a config begins with a docstring, whose first line says what it is")
    return text.splitlines()[0].rstrip(".")


def _parameters(file: Path) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in instantiate(load(file).model).parameters())


def _claimed(claim: dict) -> str:
    return f"{' / '.join(f'{ap:.1f}' for ap in claim['ap'])}, {claim['by']}" if "ap" in claim else ""


def _command(name: str, claim: dict) -> str:
    return claim.get("command") or " ".join(("mimdet train --config-file", name, *claim.get("words", ())))
