"""How the command line shows things: progress on a terminal, plain lines elsewhere, tables, JSON."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from medssl.errors import RequestError


def say(text: str, quiet: bool = False) -> None:
    """Print a line to stderr, so that stdout stays for results."""
    if not quiet:
        typer.echo(text, err=True)


def result(value: Any, as_json: bool, text: str) -> None:
    """Print the result of a command on stdout: JSON with --json, else the text."""
    typer.echo(json.dumps(value, indent=2, default=str) if as_json else text)


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """Return rows as aligned plain text."""
    cells = [[str(value) for value in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(value.ljust(width) for value, width in zip(row, widths)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def failures(failed: Mapping[str, tuple[str, str]]) -> list[str]:
    """Return one line per reason with its count and one example."""
    by_reason: dict[str, list[str]] = {}
    for series, (reason, _) in failed.items():
        by_reason.setdefault(reason, []).append(series)
    return [f"  {len(ids):>5}  {reason} (for instance series {ids[0][:8]})" for reason, ids in sorted(by_reason.items())]


@contextmanager
def progress(what: str, *, quiet: bool = False) -> Iterator[Callable[..., None]]:
    """Yield update(done, total, metrics=None): a bar with rate and time left on a terminal, a line every few seconds elsewhere."""
    if quiet:
        yield lambda done, total, metrics=None: None
    elif sys.stderr.isatty():
        with _bar(what) as update:
            yield update
    else:
        yield _lines(what)


@contextmanager
def _bar(what: str) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None, rate="", note="")
        speed = _Speed()

        def update(done: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
            rate = speed(done)
            note = _note(metrics)
            fields: dict[str, Any] = {"rate": f"{rate:.1f}/s" if rate else ""} | ({"note": note} if note else {})
            bar.update(task, completed=done, total=total, **fields)

        yield update


def _lines(what: str, every: float = 5.0) -> Callable[..., None]:
    speed, shown, before = _Speed(), [0.0], [(-1, -1)]

    def update(done: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
        rate, now = speed(done), time.perf_counter()
        again, before[0] = (done, total) == before[0], (done, total)
        if again or (done < total and now - shown[0] < every):  # the last step may be reported twice
            return
        shown[0] = now
        left = f", {rate:.1f}/s, {(total - done) / rate:.0f} s left" if rate > 0 and done < total else ""
        note = _note(metrics)
        say(f"{what}: {done}/{total}{left}{', ' + note if note else ''}")

    return update


class _Speed:
    """Counts per second since the first call; starts over when the count goes back, as it does with the next cell of a curve."""

    def __init__(self) -> None:
        self.first = self.last = math.inf
        self.start = 0.0

    def __call__(self, done: int) -> float:
        now = time.perf_counter()
        if done < self.last:
            self.first, self.start = done, now
        self.last = done
        return (done - self.first) / max(now - self.start, 1e-9)


def _note(metrics: Mapping[str, float] | None) -> str:
    if not metrics:
        return ""
    return " ".join(f"{name} {metrics[name]:.4g}" for name in ("loss", "val_dice") if isinstance(metrics.get(name), int | float))


def numbers(option: str, text: str | None) -> list[float] | None:
    """Return the numbers of an option, 96,96,96; None where it is not given.

    Raises:
        RequestError: They are no numbers.
    """
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as err:
        raise RequestError(f"{option} {text!r}: give numbers separated by commas, for instance {option} 96,96,96") from err
