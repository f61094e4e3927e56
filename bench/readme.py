"""``mimdet bench readme``: the README's tables of figures, made from the files of results that stand beside them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..files import write_bytes
from ..kernels.dispatch import WORDS
from . import configs
from .backbone import COMPARED, OVER
from .measure import paired_ratio
from .results import Results
from .roofline import STEP, by_component

# <!-- results: bench/results/<device>/ops.json dtype=fp32 --> table <!-- end of results -->
_PLACE = re.compile(r"(<!-- results: (\S+)((?: \w+=\S+)*) -->\n).*?(<!-- end of results -->)", re.DOTALL)
# <!-- configs: configs --> table <!-- end of configs -->
_CONFIGS = re.compile(r"(<!-- configs: (\S+) -->\n).*?(<!-- end of configs -->)", re.DOTALL)
_OURS = ("triton", "cuda", "cpp", "aten_cpu")


def fill(text: str, root: Path) -> str:
    """``text`` with every place for results filled from its file, which is named relative to ``root``.

    Words such as dtype=fp32 after the file's name choose its rows. A place for configs gets a row of each in the
    folder that it names.

    Raises:
        FileNotFoundError: a file that is not there.
        ResultsError: a file that holds something else.
        ValueError: no place at all, or one whose conditions no row meets.
    """
    if not _PLACE.search(text) and not _CONFIGS.search(text):
        raise ValueError(
            "no place for results: <!-- results: FILE --> and <!-- end of results --> on lines of their own"
        )

    def filled(place: re.Match) -> str:
        results = Results.read(root / place[2])
        for word in place[3].split():
            key, _, value = word.partition("=")
            results.rows = [row for row in results.rows if str(row.get(key)) == value]
        if not results.rows:
            raise ValueError(f"{place[2]}: no row with{place[3]}")
        return place[1] + render(results) + place[4]

    def listed(place: re.Match) -> str:
        return place[1] + _markdown(configs.COLUMNS, configs.rows(root / place[2]), right=(2,)) + place[3]

    return _CONFIGS.sub(listed, _PLACE.sub(filled, text))


def update(path: Path) -> bool:
    """Fill a file in place; whether it changed."""
    text = path.read_text(encoding="utf-8")
    filled = fill(text, path.parent)
    if filled != text:
        write_bytes(path, filled.encode())
    return filled != text


def render(results: Results) -> str:
    """A file of results as Markdown: the command and the machine, then the figures."""
    there = results.environment
    versions = ", ".join(
        f"{name} {there['versions'][name]}" for name in ("torch", "triton") if name in there["versions"]
    )
    kinds = {"ops": _ops, "backbone": _backbone, "forms": _forms, "packed": _packed, "roofline": _roofline}
    made = kinds[results.kind](results.rows)
    source = f"`{results.command}` on {there['device']}, {there['threads']} threads, {versions}, {there['date']}"
    return f"{source}:\n\n{made}"


_POINT = ("mode", "ratio", "depth")


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] | None = None) -> str:
    """A table; figures, in the columns ``right``, by default all but the first, to the right."""
    right = range(1, len(columns)) if right is None else right
    lines = [columns, ["--:" if i in right else "---" for i in range(len(columns))], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _speed(row: dict, peer: dict | None) -> str:
    if peer is None or not peer["samples_ms"] or not row["samples_ms"]:
        return ""
    return str(paired_ratio(peer["samples_ms"], row["samples_ms"]))


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _ops(rows: Sequence[dict]) -> str:
    """Each implementation of ours, against plain PyTorch, torch.compile and the fastest other form."""
    columns = ("operation, tensor", "direction", "ms", "of limit", "vs eager", "vs torch.compile", "vs best other form")
    groups: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if row["status"] == "ok":
            key = tuple(row[k] for k in ("op", "case", "shape", "dtype", "direction", "cache"))
            groups.setdefault(key, {})[row["impl"]] = row
    body = []
    for (op, case, shape, dtype, direction, cache), forms in groups.items():
        others = [row for name, row in forms.items() if name not in (*WORDS, "inductor")]
        best = min(others, key=lambda row: row["p50_ms"], default=None)
        for impl in _OURS:
            if impl in forms:
                row = forms[impl]
                name = f"`{op}` {impl}, {case} {shape} {dtype}" + (" cold" if cache == "cold" else "")
                speeds = [_speed(row, peer) for peer in (forms.get("eager"), forms.get("inductor"), best)]
                body.append((name, direction, f"{row['p50_ms']:.3g}", f"{row['of_limit']:.0%}", *speeds))
    return _markdown(columns, body)


def _backbone(rows: Sequence[dict]) -> str:
    """Time and memory of every model, and beside the paper's what is relative to the default row, if there are more."""
    rows = [row for row in rows if row["status"] == "ok"]
    bases = [base for base in OVER if any(row["model"] == base for row in rows)]
    varied = len({tuple(row[k] for k in _POINT) for row in rows}) > 1
    columns = ["mode, ratio, decoder depth", "model", "ms", "saved MiB", "peak MiB"]
    columns += [f"speed vs {base}" for base in bases]
    columns += COMPARED.values() if varied else []
    body = []
    for row in rows:
        peers = {r["model"]: r for r in rows if all(r[k] == row[k] for k in _POINT)}
        body.append([
            f"{row['mode']}, {row['ratio']:g}, {row['depth']}", row["model"], _number(row["p50_ms"], ".4g"),
            *(_number(row[k], ".0f") for k in ("saved_mib", "allocated_mib")),
            *("" if row["model"] == base else _speed(row, peers.get(base)) for base in bases),
            *(_number(row[k], ".2f") for k in COMPARED if varied),
        ])  # fmt: skip
    return _markdown(columns, body)


def _forms(rows: Sequence[dict]) -> str:
    """The forms of Table 8 beside the paper's parameters and hours."""
    columns = (
        "mode, form", "params M", "paper's", "ms", "time, relative", "paper's", "saved MiB", "peak MiB",
        "memory, relative",
    )  # fmt: skip
    body = [
        (
            f"{row['mode']}, {row['form']}", f"{row['parameters'] / 1e6:.1f}", f"{row['paper_parameters_m']:g}",
            _number(row["p50_ms"], ".4g"), _number(row["relative_time"], ".2f"), f"{row['paper_time']:.2f}",
            *(_number(row[k], ".0f") for k in ("saved_mib", "allocated_mib")), _number(row["relative_memory"], ".2f"),
        )
        for row in rows
        if row["status"] == "ok"
    ]  # fmt: skip
    return _markdown(columns, body)


def _packed(rows: Sequence[dict]) -> str:
    """The forms of a batch of different pictures."""
    columns = ("pictures, mode, ratio", "form", "ms", "saved MiB", "peak MiB", "speed vs canvas")
    body = []
    for row in rows:
        if row["status"] == "ok":
            canvas = next(r for r in rows if r["form"] == "canvas" and r["mode"] == row["mode"])
            body.append((
                f"{row['sizes']}, {row['mode']}, {row['ratio']:g}", row["form"], f"{row['p50_ms']:.4g}",
                *(_number(row[k], ".0f") for k in ("saved_mib", "peak_mib")),
                "" if row is canvas else _speed(row, canvas),
            ))  # fmt: skip
    return _markdown(columns, body)


def _roofline(rows: Sequence[dict]) -> str:
    """Components, forward and backward."""
    columns = ("component", "GFLOP", "MiB", "floor ms", "ms", "floor / measured")
    whole = next(row for row in rows if row["component"] == STEP)
    lines = [(f"{row['component']}, {row['direction']}", row) for row in by_component(rows)] + [(STEP, whole)]
    body = []
    for name, row in lines:
        figures = [f"{row[k]:.4g}" for k in ("gflop", "mib", "floor_ms", "p50_ms")]
        body.append((name, *figures, f"{row['floor_ms'] / row['p50_ms']:.0%}"))
    return _markdown(columns, body)
