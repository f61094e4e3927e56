"""Files of figures: JSON or CSV with the same content, checked when read."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files import write_bytes

SCHEMA = 1

# Columns of each kind of file. "floats" is a list of numbers; a "?" allows None.
_RATIO = {"": "float?", "_low": "float?", "_high": "float?"}
_TIMED = {
    "status": "str",
    "rounds": "int",
    "p20_ms": "float?",
    "p50_ms": "float?",
    "p80_ms": "float?",
    **{f"control{end}": kind for end, kind in _RATIO.items()},
    "samples_ms": "floats",
}
COLUMNS = {
    "ops": {
        "op": "str",
        "case": "str",
        "shape": "str",
        "dtype": "str",
        "direction": "str",
        "cache": "str",
        "impl": "str",
        **_TIMED,
        "gb_s": "float?",
        "tflop_s": "float?",
        "of_limit": "float?",
        **{f"vs_eager{end}": kind for end, kind in _RATIO.items()},
        **{f"vs_inductor{end}": kind for end, kind in _RATIO.items()},
        "peak_mib": "float?",
    },
    "backbone": {
        "part": "str",
        "mode": "str",
        "size": "str",
        "batch": "int",
        "dtype": "str",
        "ratio": "float",
        "depth": "int",
        "model": "str",
        **_TIMED,
        "parameters": "int",
        "trainable": "int",
        "allocated_mib": "float?",
        "reserved_mib": "float?",
        "saved_mib": "float?",
        "relative_time": "float?",
        "relative_memory": "float?",
        "relative_saved": "float?",
        "paper_time": "float?",
        "paper_memory": "float?",
        **{f"vs_original{end}": kind for end, kind in _RATIO.items()},
        **{f"vs_original_sdpa{end}": kind for end, kind in _RATIO.items()},
        **{f"vs_clean{end}": kind for end, kind in _RATIO.items()},
    },
    "forms": {
        "part": "str",
        "mode": "str",
        "size": "str",
        "batch": "int",
        "dtype": "str",
        "form": "str",
        "config": "str",
        **_TIMED,
        "parameters": "int",
        "paper_parameters_m": "float",
        "allocated_mib": "float?",
        "reserved_mib": "float?",
        "saved_mib": "float?",
        "relative_time": "float?",
        "relative_memory": "float?",
        "paper_time": "float",
    },
    "packed": {
        "mode": "str",
        "sizes": "str",
        "dtype": "str",
        "ratio": "float",
        "form": "str",
        **_TIMED,
        "peak_mib": "float?",
        "saved_mib": "float?",
        **{f"vs_canvas{end}": kind for end, kind in _RATIO.items()},
    },
    "roofline": {
        "part": "str",
        "mode": "str",
        "size": "str",
        "batch": "int",
        "dtype": "str",
        "ratio": "float",
        "depth": "int",
        "model": "str",
        "component": "str",
        "direction": "str",
        "op": "str",
        "shapes": "str",
        "calls": "int",
        "gflop": "float",
        "mib": "float",
        "floor_ms": "float",
        "p50_ms": "float",
        "samples_ms": "floats",
    },
}
# What names a row: equal in two files, their figures can be compared.
_MODEL_KEYS = ("part", "mode", "size", "batch", "dtype", "ratio", "depth", "model")
KEYS = {
    "ops": ("op", "case", "shape", "dtype", "direction", "cache", "impl"),
    "backbone": _MODEL_KEYS,
    "forms": ("part", "mode", "size", "batch", "dtype", "form"),
    "packed": ("mode", "sizes", "dtype", "ratio", "form"),
    "roofline": (*_MODEL_KEYS, "component", "direction", "op", "shapes"),
}


class ResultsError(ValueError):
    """A file that does not hold results; the message says where it fails."""


@dataclass
class Results:
    """Figures of one run.

    Attributes:
        kind: "ops", "backbone", "forms", "packed" or "roofline".
        command: that made them.
        environment: see ``environment.describe``.
        limits: see ``limits.measure_limits``.
        rows: one dict of ``COLUMNS[kind]`` each.
    """

    kind: str
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
        except (ValueError, csv.Error) as error:
            raise ResultsError(f"{path}: not a file of results: {error}") from error
        check(content, str(path))
        del content["schema"]
        return cls(**content)


def check(content: Any, name: str) -> None:
    """Raise ResultsError unless ``content`` is what ``Results.write`` makes."""
    if not isinstance(content, dict) or "schema" not in content:
        raise ResultsError(f"{name}: not a file of results: no schema number")
    if content["schema"] != SCHEMA:
        raise ResultsError(f"{name}: schema {content['schema']!r}, this version reads {SCHEMA}")
    wanted = {"schema": int, "kind": str, "command": str, "environment": dict, "limits": dict, "rows": list}
    for key, kind in wanted.items():
        if not isinstance(content.get(key), kind):
            raise ResultsError(f"{name}: {key!r} is missing or not a {kind.__name__}")
    if set(content) != set(wanted):
        raise ResultsError(f"{name}: unknown entries {sorted(set(content) - set(wanted))}")
    if content["kind"] not in COLUMNS:
        raise ResultsError(f"{name}: kind {content['kind']!r} is none of {', '.join(COLUMNS)}")
    columns = COLUMNS[content["kind"]]
    for number, row in enumerate(content["rows"]):
        if not isinstance(row, dict) or set(row) != set(columns):
            odd = sorted(map(str, set(row) ^ set(columns))) if isinstance(row, dict) else row
            raise ResultsError(f"{name}: row {number} has not the columns of {content['kind']!r}: {odd}")
        for column, kind in columns.items():
            if not _fits(row[column], kind):
                raise ResultsError(f"{name}: row {number}: {column} is {row[column]!r}, not {kind}")


def _fits(value: Any, kind: str) -> bool:
    if kind.endswith("?") and value is None:
        return True
    kind = kind.removesuffix("?")
    if kind == "floats":
        return isinstance(value, list) and all(_fits(v, "float") for v in value)
    if isinstance(value, bool):
        return False
    wanted = {"float": (int, float), "int": int, "str": str}[kind]
    return isinstance(value, wanted) and (not isinstance(value, float) or abs(value) < float("inf"))


def _to_json(content: dict) -> str:
    """One row a line: small, and readable in a diff."""
    rows = ",\n".join(json.dumps(row, allow_nan=False) for row in content["rows"])
    head = json.dumps({key: value for key, value in content.items() if key != "rows"}, indent=1, allow_nan=False)
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'


def _to_csv(content: dict) -> str:
    """The first line is a comment with everything but the rows."""
    out = io.StringIO()
    out.write("# " + json.dumps({key: value for key, value in content.items() if key != "rows"}) + "\n")
    columns = COLUMNS[content["kind"]]
    writer = csv.DictWriter(out, list(columns), lineterminator="\n")
    writer.writeheader()
    for row in content["rows"]:
        writer.writerow({k: " ".join(map(repr, v)) if isinstance(v, list) else v for k, v in row.items()})
    return out.getvalue()


def _from_csv(text: str) -> dict:
    first, _, rest = text.partition("\n")
    if not first.startswith("# "):
        raise ValueError("no comment with the schema in line 1")
    content = json.loads(first[2:])
    columns = COLUMNS.get(content.get("kind"), {})
    content["rows"] = [
        {key: _from_cell(value, columns.get(key, "str")) for key, value in row.items()}
        for row in csv.DictReader(io.StringIO(rest))
    ]
    return content


def _from_cell(text: str | None, kind: str) -> Any:
    if text is None:
        raise ValueError("a line is cut short")
    if kind.endswith("?") and not text:
        return None
    kind = kind.removesuffix("?")
    if kind == "floats":
        return [float(word) for word in text.split()]
    return {"float": float, "int": int, "str": str}[kind](text)
