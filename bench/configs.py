"""The table of configs: title, parameters, the AP claimed for it, and the command."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import torch

from ..config import instantiate, load
from .experiments.backbone import paper
from .views import Column, grouped

COLUMNS: list[Column] = [
    ("config", "config", ""),
    ("what", "what", ""),
    ("parameters M", "parameters_m", ".2f"),
    ("AP box / mask, as claimed by", "claim", ""),
    ("command", "command", ""),
]
# Folders with parts of configs, and with the same configs for Detectron2.
_EXCLUDED = ("common", "detectron2")


def names(folder: Path) -> list[str]:
    """The configs below a folder, as ``--config-file`` takes them: its own before those of its folders."""
    files = (path.relative_to(folder).with_suffix("") for path in folder.rglob("*.py"))
    return [str(path) for path in sorted(files, key=lambda p: (len(p.parts), p)) if path.parts[0] not in _EXCLUDED]


def rows(folder: Path, page: Path) -> list[dict]:
    """One row of ``COLUMNS`` for each config below ``folder``, more where the paper has more of it.

    Args:
        page: folder of the page whose links lead to the configs.

    Raises:
        ValueError: a claim for a config that is not there, or a config without a docstring.
    """
    claims = grouped(paper()["claims"], "config")
    configs = names(folder)
    if unknown := set(claims) - set(configs):
        raise ValueError(f"{folder}: no config {', '.join(sorted(unknown))}, which paper.json names")
    table, link = [], Path(os.path.relpath(folder, page)).as_posix()
    for name in configs:
        file = folder / f"{name}.py"
        row = {"config": f"[`{name}`]({link}/{name}.py)", "what": _title(file)}
        with torch.device("meta"):
            row["parameters_m"] = sum(p.numel() for p in instantiate(load(file).model).parameters()) / 1e6
        for claim in claims.get(name, [{}]):
            claimed = f"{' / '.join(f'{ap:.1f}' for ap in claim['ap'])}, {claim['by']}" if "ap" in claim else ""
            train = " ".join(("mimdet train --config-file", name, *claim.get("words", ())))
            table.append({**row, "claim": claimed, "command": f"`{claim.get('command', train)}`"})
    return table


def _title(file: Path) -> str:
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    if not text:
        raise ValueError(f"{file}: a config begins with a docstring, whose first line says what it is")
    return text.splitlines()[0].rstrip(".")
