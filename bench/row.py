"""Rows of results and their files: JSON or CSV with the same content, checked when written and when read.

A row is a flat dict about one measurement. ``KEYS`` identify it: rows with equal keys are comparable, in one file or in
two. ``VALUES`` are its results: the status, the time with its samples, memory, FLOPs and bytes. A column that does not
apply is absent, so a new experiment only adds columns here. Speed-ups and the like are not stored: tables and plots
compute them from the samples.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files import write_bytes

SCHEMA = 2
KEYS = {
    "experiment": str,  # name of its file in bench/experiments
    "model": str,
    "part": str,
    "operation": str,
    "case": str,
    "config": str,
    "component": str,
    "shape": str,
    "size": str,  # HxW of the images
    "batch": int,
    "dtype": str,
    "ratio": float,
    "depth": int,
    "mode": str,
    "direction": str,
    "kind": str,
    "cache": str,
    "implementation": str,
    "kernel": str,
    "arch": str,
}
VALUES = {
    "status": str,  # "ok", or why there are no values
    "rounds": int,
    **dict.fromkeys(("p20_ms", "p50_ms", "p80_ms"), float),
    "samples_ms": list,  # one a round
    **dict.fromkeys(("control", "control_low", "control_high"), float),  # the A/A ratio of the run and its interval
    "parameters": int,
    "trainable": int,
    "paper_parameters_m": float,
    "peak_mib": float,  # beyond the memory allocated before
    "allocated_mib": float,  # with weights, gradients and the optimizer's state
    "reserved_mib": float,
    "activation_mib": float,  # saved tensors
    **dict.fromkeys(("relative_time", "relative_memory", "relative_activation"), float),  # to the default row
    **dict.fromkeys(("paper_time", "paper_memory"), float),
    **dict.fromkeys(("gb_s", "tflop_s", "of_limit"), float),
    "calls": int,
    "count": int,  # of operations
    "waits": int,  # operations after which the host waits for a GPU
    **dict.fromkeys(("gflop", "mib", "floor_ms"), float),
    # Of machine code; see experiments/static.py.
    **dict.fromkeys(("launches", "grid", "registers", "spills", "shared_bytes", "warps_per_sm"), int),
    **dict.fromkeys(("load_bits", "store_bits"), int),  # width of the accesses that move the most bytes
    **dict.fromkeys(("waves", "instructions_per_element"), float),
    **dict.fromkeys(("instructions", "mufu", "tensor", "lds", "barriers"), float),  # that a warp issues
    **dict.fromkeys(("bytes", "minimum_bytes"), float),
    **dict.fromkeys(("minimum_us", "predicted_us", "measured_us"), float),
    "bound": str,
    "data_dependent": int,  # loops and branches that depend on data, and count once
}
COLUMNS = {**KEYS, **VALUES}
REQUIRED = ("experiment", "implementation", "status")
# Former names of implementations on the command line; commands in files of results have them.
ALIASES = {
    "original-kept": "original-no-checkpoint",
    "original-sdpa-kept": "original-sdpa-no-checkpoint",
    "ours-kept": "ours-no-checkpoint",
    "clean": "sdpa-compile",
}


class ResultsError(ValueError):
    """A file that does not hold results; the message says where it fails."""


@dataclass
class Results:
    """Rows of one run, and their origin.

    Attributes:
        command: that measured them.
        environment: see ``environment.describe``.
        limits: see ``limits.measure_limits``.
        rows: dicts of ``COLUMNS``.
    """

    command: str
    environment: dict[str, Any]
    limits: dict[str, float]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def write(self, path: str | Path) -> None:
        """JSON, or CSV where the name ends so; whole or not at all."""
        content = {"schema": SCHEMA, **asdict(self)}
        check(content, str(path))
        text = _to_csv(content) if Path(path).suffix == ".csv" else _to_json(content)
        write_bytes(path, text.encode())

    @classmethod
    def read(cls, path: str | Path) -> Results:
        """The content of a file written by ``write``.

        Raises:
            FileNotFoundError: no such file.
            ResultsError: it holds something else.
        """
        path = Path(path)
        text = path.read_bytes().decode("utf-8", errors="replace")
        try:
            content = _from_csv(text) if path.suffix == ".csv" else json.loads(text)
        except (ValueError, KeyError, AttributeError, csv.Error) as error:
            raise ResultsError(f"{path}: not a file of results: {error}") from error
        check(content, str(path))
        del content["schema"]
        return cls(**content)


def key(row: dict[str, Any], *without: str) -> tuple[tuple[str, Any], ...]:
    """Identity of the row: its key columns except ``without``."""
    return tuple((name, row[name]) for name in KEYS if name in row and name not in without)


def check(content: Any, name: str) -> None:
    """Raise ResultsError, which says where, unless ``content`` is what ``Results.write`` writes."""
    if not isinstance(content, dict) or "schema" not in content:
        raise ResultsError(f"{name}: not a file of results: no schema number")
    if content["schema"] != SCHEMA:
        raise ResultsError(f"{name}: schema {content['schema']!r}, this version reads {SCHEMA}")
    entries = {"schema": int, "command": str, "environment": dict, "limits": dict, "rows": list}
    for entry, kind in entries.items():
        if not isinstance(content.get(entry), kind):
            raise ResultsError(f"{name}: {entry!r} is missing or not a {kind.__name__}")
    if set(content) != set(entries):
        raise ResultsError(f"{name}: unknown entries {sorted(set(content) - set(entries))}")
    for number, row in enumerate(content["rows"]):
        missing = [column for column in REQUIRED if column not in row]
        unknown = [column for column in row if column not in COLUMNS]
        if missing or unknown:
            raise ResultsError(f"{name}: row {number}: missing columns {missing}, unknown columns {unknown}")
        for column, value in row.items():
            if not _fits(value, COLUMNS[column]):
                raise ResultsError(f"{name}: row {number}: {column} is {value!r}, not {COLUMNS[column].__name__}")


def _fits(value: Any, kind: type) -> bool:
    if kind is list:
        return isinstance(value, list) and all(_fits(v, float) for v in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
    return type(value) is kind


def _to_json(content: dict) -> str:
    """One row a line: small, and readable in a diff."""
    rows = ",\n".join(json.dumps(row, allow_nan=False) for row in content["rows"])
    head = json.dumps({key: value for key, value in content.items() if key != "rows"}, indent=1, allow_nan=False)
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'


def _to_csv(content: dict) -> str:
    """The first line is a comment with everything but the rows."""
    out = io.StringIO()
    out.write("# " + json.dumps({key: value for key, value in content.items() if key != "rows"}) + "\n")
    used = [column for column in COLUMNS if any(column in row for row in content["rows"])]
    writer = csv.DictWriter(out, used, lineterminator="\n")
    writer.writeheader()
    for row in content["rows"]:
        writer.writerow({k: " ".join(map(repr, v)) if isinstance(v, list) else v for k, v in row.items()})
    return out.getvalue()


def _from_csv(text: str) -> dict:
    """Without empty cells."""
    first, _, rest = text.partition("\n")
    if not first.startswith("# "):
        raise ValueError("no comment with the schema in line 1")
    rows = list(csv.DictReader(io.StringIO(rest)))
    for row in rows:
        if None in row or None in row.values():
            raise ValueError(f"a line has too few or too many cells: {list(row.values())}")
    return json.loads(first[2:]) | {"rows": [{k: _from_cell(k, v) for k, v in row.items() if v} for row in rows]}


def _from_cell(column: str, text: str) -> Any:
    kind = COLUMNS.get(column, str)
    return [float(word) for word in text.split()] if kind is list else kind(text)
