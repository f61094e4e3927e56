"""Results of a run: the table, JSON and JUnit XML."""

from __future__ import annotations

import json
import math
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from .. import __version__
from ..bench import environment
from ..files import write_bytes
from .cases import BadUseError, Unavailable, chosen_by_auto
from .run import FAILED, PASSED, Result

FORMAT = "mimdet parity"
VERSION = 1  # of the JSON file
INTERPRETED = "triton on cpu: Triton's interpreter, which computes what the kernels compute, on CPU tensors"


@dataclass(frozen=True)
class Report:
    """A run.

    Attributes:
        level: of ``cases.LEVELS``.
        environment: versions, processor, GPU and driver.
        auto: ``op device dtype`` -> implementation.
        results: of all cases.
        unavailable: implementations that cannot run here.
    """

    level: str
    environment: dict[str, Any]
    auto: dict[str, str]
    results: list[Result]
    unavailable: list[Unavailable]

    @property
    def failed(self) -> list[Result]:
        """Results above their budget or with an error."""
        return [result for result in self.results if result.status == FAILED]

    def write_json(self, path: Path) -> None:
        """The whole run, for ``compare``."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "mimdet": __version__,
            "level": self.level,
            "environment": self.environment,
            "auto": self.auto,
            "cases": [result.row() for result in self.results],
            "unavailable": [asdict(missing) for missing in self.unavailable],
        }
        write_bytes(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())

    def write_junit(self, path: Path) -> None:
        """Cases as tests, with numbers as properties; implementations that cannot run here are skipped."""
        seconds = sum(result.seconds for result in self.results)
        counts = {"tests": len(self.results) + len(self.unavailable), "failures": len(self.failed), "errors": 0}
        suite = ET.Element("testsuite", name=FORMAT, skipped=str(len(self.unavailable)), time=f"{seconds:.3f}")
        suite.attrib.update({name: str(count) for name, count in counts.items()})
        for result in self.results:
            test = _test(suite, result.case.op, result.case.id, result.seconds)
            properties = ET.SubElement(test, "properties")
            for name in ("tensor", "error", "budget", "reference_error", "ulp"):
                ET.SubElement(properties, "property", name=name, value=str(getattr(result, name)))
            if result.status == FAILED:
                ET.SubElement(test, "failure", message=printable(result.message))
        for missing in self.unavailable:
            name = "-".join((missing.op, missing.implementation, missing.device, missing.dtype))
            ET.SubElement(_test(suite, missing.op, name, 0.0), "skipped", message=printable(missing.reason))
        root = ET.Element("testsuites")
        root.append(suite)
        write_bytes(path, ET.tostring(root, encoding="utf-8", xml_declaration=True))


def _test(suite: ET.Element, op: str, name: str, seconds: float) -> ET.Element:
    return ET.SubElement(suite, "testcase", classname=f"mimdet.parity.{op}", name=name, time=f"{seconds:.4f}")


def printable(text: str) -> str:
    """Without control characters, which XML forbids and a terminal obeys."""
    return "".join(c if c.isprintable() else " " for c in text)


def report(level: str, results: Sequence[Result], unavailable: Sequence[Unavailable]) -> Report:
    """Results with what else is known here."""
    devices = sorted({result.case.device for result in results})
    return Report(level, describe(devices), chosen_by_auto(devices), list(results), list(unavailable))


def describe(devices: Sequence[str]) -> dict[str, Any]:
    """Versions, processor, GPU and driver, as ``compare`` sets them side by side."""
    values = environment.describe("cpu")
    values["processor"] = values.pop("device")
    if "cuda" in devices:
        values |= {"gpu": environment.device_name("cuda"), "driver": _driver()}
    return values


def _driver() -> str | None:
    """Version of NVIDIA's driver; None where nvidia-smi does not tell, as on AMD's GPUs."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None


def read(path: Path) -> dict[str, Any]:
    """A file of ``Report.write_json``.

    Raises:
        BadUseError: it is missing, is something else, or another version wrote it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadUseError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise BadUseError(f"{path} is not JSON: write it with mimdet parity --json") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BadUseError(f"{path} has no results of mimdet parity: write it with mimdet parity --json")
    if content.get("version") != VERSION:
        raise BadUseError(
            f"{path} has version {content.get('version')} of this format, mimdet {__version__} reads {VERSION}: "
            "run mimdet parity again there"
        )
    for place, good in _checks(content):
        if not good:
            raise BadUseError(f"{path}: {place} is not as mimdet parity --json writes it: run it again there")
    return content


def _checks(content: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """Place in a file of results, and whether its value is what ``compare`` can read."""
    about, auto, cases = content.get("environment"), content.get("auto"), content.get("cases")
    yield "environment", isinstance(about, dict)
    for key in ("versions", "variables"):
        yield f"environment.{key}", isinstance(about.get(key, {}), dict)
    yield "auto", isinstance(auto, dict) and all(isinstance(value, str) for value in auto.values())
    yield "cases", isinstance(cases, list)
    for index, case in enumerate(cases):
        yield f"cases[{index}]", isinstance(case, dict)
        for key in ("id", "tensor"):
            yield f"cases[{index}].{key}", isinstance(case.get(key), str)
        yield f"cases[{index}].status", case.get("status") in (PASSED, FAILED)
        for key in ("error", "budget", "ulp"):
            value = case.get(key)
            yield f"cases[{index}].{key}", value is None or (type(value) in (int, float) and math.isfinite(value))


def table(results: Sequence[Result]) -> Table:
    """Every failed case, then the worst case of each implementation of an operation; the worst first."""
    failed = [result for result in results if result.status == FAILED]
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        groups.setdefault(_group(result), []).append(result)
    passed = [max(group, key=_rank) for group in groups.values() if not any(r.status == FAILED for r in group)]
    counts = {id(worst): len(groups[_group(worst)]) for worst in passed}
    drawn = Table(title="Parity, worst case first", title_justify="left", title_style="bold")
    for header, justify in (
        ("operation", "left"), ("implementation", "left"), ("dtype", "left"), ("worst case", "left"),
        ("tensor", "left"), ("error", "right"), ("budget", "right"), ("ratio", "right"), ("cases", "right"),
    ):  # fmt: skip
        drawn.add_column(header, justify=justify, overflow="fold", no_wrap=header in ("operation", "ratio"))
    for result in (*sorted(failed, key=_rank, reverse=True), *sorted(passed, key=_rank, reverse=True)):
        case, bad = result.case, result.status == FAILED
        numbers = ["-"] * 3
        if result.error is not None:
            numbers = [f"{result.error:.3g}", f"{result.budget:.3g}", f"{result.ratio:.2f}"]
        drawn.add_row(
            case.op, f"{case.implementation} on {case.device}", case.dtype,
            f"{case.layout}, {case.size}, {case.direction}", result.tensor if result.error is not None else "error",
            *numbers, "failed" if bad else str(counts[id(result)]), style="red" if bad else None,
        )  # fmt: skip
    return drawn


def _group(result: Result) -> tuple:
    case = result.case
    return case.op, case.implementation, case.device, case.dtype


def _rank(result: Result) -> tuple:
    return result.ratio, result.error or 0.0


def header(about: Report) -> list[str]:
    """Lines above the table: where it ran, and what could not."""
    values = about.environment
    names = ("torch", "triton", "python")
    lines = [
        ", ".join([f"{name} {values['versions'][name]}" for name in names] + [values.get("gpu") or values["processor"]])
    ]
    if any(result.case.interpreted for result in about.results):
        lines.append(INTERPRETED)
    if "gpu" not in values:
        lines.append("the CPU alone: kernels compiled for a GPU were not compared")
    reasons: dict[tuple, list[Unavailable]] = {}
    for missing in about.unavailable:
        reasons.setdefault((missing.implementation, missing.device, missing.reason), []).append(missing)
    for (implementation, device, reason), group in reasons.items():
        ops = sorted({missing.op for missing in group})
        many = ", ".join(ops) if len(ops) <= 3 else f"{len(ops)} operations"
        lines.append(f"not here: {implementation} on {device} of {many}: {reason}")
    return lines


def summary(about: Report) -> str:
    """The last line."""
    count = len(about.results)
    if not about.failed:
        return f"{count} cases, all within their budgets"
    return f"{len(about.failed)} of {count} cases failed"
