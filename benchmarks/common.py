"""What the benchmarks share: interleaved timing, ratios of one run, the table, the JSON file.

Absolute times say something about one machine on one day. What counts is the ratio of ours to a peer that ran in the
same process, turn by turn: the ratio is formed within each turn and its median over the turns is what a target is
compared with.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medssl.training.run_folder import facts_of_machine, now
from medssl.weights import write_atomic

RESULTS = Path(__file__).resolve().parent / "results"

Calls = Mapping[str, Callable[[], object]]
Seconds = dict[str, list[float]]


def interleave(calls: Calls, *, repeats: int, warmup: int = 1) -> Seconds:
    """Time calls in turns: every turn runs each once, and each turn starts with another one.

    Args:
        calls: Name -> what to time; its result is dropped outside the timed span.
        repeats: Turns.
        warmup: Turns that are not counted.

    Returns:
        Name -> seconds, one per turn.
    """
    names = list(calls)
    seconds: Seconds = {name: [] for name in names}
    for turn in range(-warmup, repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            begin = time.perf_counter()
            result = calls[name]()
            spent = time.perf_counter() - begin
            del result
            if turn >= 0:
                seconds[name].append(spent)
    return seconds


def times_faster(seconds: Seconds, ours: str, peer: str) -> float:
    """Return how many times faster ours is than a peer: the median over turns of peer / ours."""
    return statistics.median(p / o for o, p in zip(seconds[ours], seconds[peer], strict=True))


@dataclass(frozen=True)
class Check:
    """A measured value beside its target.

    Args:
        what: What was measured, in words.
        value: The value; None when it could not be measured.
        limit: The target.
        at_least: True when more is better.
    """

    what: str
    value: float | None
    limit: float
    at_least: bool = True

    @property
    def met(self) -> bool | None:
        """True when the target is met, None when nothing was measured."""
        if self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def as_dict(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "value": self.value,
            "target": f"{'>=' if self.at_least else '<='} {self.limit}",
            "met": self.met,
        }


@dataclass
class Result:
    """What one benchmark found.

    Args:
        name: Name of the benchmark, and of its JSON file.
        rows: The table: one mapping per row, numbers or text.
        checks: Values beside targets.
        settings: Sizes and counts, so that the run can be repeated.
        notes: Sentences that a reader of the numbers needs.
        details: Further numbers, for instance every single time; not printed.
    """

    name: str
    rows: list[dict[str, Any]]
    checks: list[Check]
    settings: Mapping[str, Any]
    notes: Sequence[str] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        facts = facts_of_machine()
        return {
            "benchmark": self.name,
            "when": now(),
            "hardware": {**facts["hardware"], "load_average": [round(value, 2) for value in os.getloadavg()]},
            "versions": facts["versions"],
            "git": facts["git"],
            "settings": {key: str(value) if isinstance(value, Path) else value for key, value in self.settings.items()},
            "rows": self.rows,
            "checks": [check.as_dict() for check in self.checks],
            "notes": list(self.notes),
            "details": dict(self.details),
        }


def parser(text: str | None, *, repeats: int = 20) -> argparse.ArgumentParser:
    """Return an argument parser with what every benchmark takes."""
    made = argparse.ArgumentParser(
        description=(text or "").strip().splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    made.add_argument("--repeats", type=int, default=repeats, help="turns of which the medians are taken")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    return made


def kept(path: Path, settings: Mapping[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the row that a file keeps, or compute it and write the file.

    Args:
        path: Its JSON file.
        settings: What the row depends on.
        compute: Makes the row.

    Raises:
        SystemExit: The file was made with other settings.
    """
    if path.exists():
        found = json.loads(path.read_text())
        if found["settings"] != settings:
            raise SystemExit(f"{path} was made with {found['settings']}, not {settings}; choose another --folder or remove it")
        return dict(found["row"])
    row = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps({"settings": dict(settings), "row": row}) + "\n").encode())
    return row


def finish(result: Result, out: Path) -> dict[str, Any]:
    """Print the table and the checks, write the JSON file, return its content."""
    content = rounded(result.as_dict())
    hardware = content["hardware"]
    device = hardware["gpu"] or hardware["cpu"]
    print(f"## {result.name}: {device}, {hardware['cores']} cores, load {hardware['load_average'][0]}\n")
    print(markdown(content["rows"]) + "\n")
    if content["checks"]:
        words = {True: "met", False: "MISSED", None: "not measured"}
        print(markdown([{**check, "met": words[check["met"]]} for check in content["checks"]]) + "\n")
    for note in result.notes:
        print(f"- {note}")
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{result.name}.json"
    write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())
    print(f"\nwritten to {path}", flush=True)
    return dict(content)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a Markdown table; a column that a row lacks stays empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *[[_cell(row.get(column)) for column in columns] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def one_setting(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the overrides of cells that go into one table.

    Raises:
        SystemExit: They were computed with different ones.
    """
    found = {tuple(cell["overrides"]) for cell in cells}
    if len(found) != 1:
        raise SystemExit(
            f"cells with different overrides cannot be compared: {sorted(found)}; compute the missing ones with the same"
        )
    return list(found.pop())


def rounded(value: Any, digits: int = 4) -> Any:
    """Return nested values with floats rounded to a number of significant digits, and NumPy scalars as numbers."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, Mapping):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    return value


def milliseconds(seconds: Seconds, name: str) -> dict[str, float]:
    """Return median and quartiles of a call in ms."""
    values = [1000 * value for value in seconds[name]]
    low, high = np.quantile(values, [0.25, 0.75]).tolist()
    return {"median_ms": statistics.median(values), "q25_ms": low, "q75_ms": high}


def synthetic_ct(shape: Sequence[int], seed: int = 0) -> np.ndarray:
    """Return an int16 volume (X, Y, Z) in HU that compresses much as a CT does: a wavy body in air, with noise."""
    rng = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n, dtype=np.float32) for n in shape], indexing="ij", sparse=True)
    volume = np.empty(tuple(shape), dtype=np.int16)
    for i in range(shape[0]):  # one sheet at a time: a benchmark of memory must not need gigabytes itself
        body = (x[i] / 0.8) ** 2 + (y[0] / 0.6) ** 2 + 0 * z[0] < 1
        tissue = 40 + 60 * np.sin(6 * x[i] + seed) * np.cos(5 * y[0]) * np.cos(3 * z[0])
        sheet = np.where(body, tissue, -1000.0) + rng.normal(0, 12, body.shape)
        volume[i] = np.clip(sheet, -1024, 3000).astype(np.int16)
    return volume


@contextmanager
def without_monai_warnings() -> Iterator[None]:
    """Hide two warnings that MONAI gives about its own insides when a loader or a network is built."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="NvImgCodecPydicomReader", category=UserWarning)
        warnings.filterwarnings("ignore", message="torch.meshgrid", category=UserWarning)
        yield
