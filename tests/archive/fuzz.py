"""Scan and read damaged files, one after the other, in a process that may take 1 GB more than it has and 5 s per file.

    python -m tests.archive.fuzz --count 10000          all of them; the last line is JSON
    python -m tests.archive.fuzz --case NAME:NUMBER     one again, with tracebacks

`test_fuzz` runs it as a child process: what crashes the process is named in the file `--progress`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from medssl._compat.quiet import silence_libraries
from medssl.archive.scanning import scan
from medssl.errors import ImageError, MedsslError
from medssl.registry import DOMAINS, lookup
from tests.fuzz_sources import sources
from tests.mutants import mutate

LIMIT_BYTES = 1 << 30
LIMIT_S = 5.0
READ_EVERY = 2
"""One of so many files is also read by a domain."""
BY_MODALITY = {"CT": "ct", "MR": "mri", "CR": "xray", "DX": "xray", "US": "ultrasound", "SM": "wsi"}


def chain(err: BaseException | None) -> list[BaseException]:
    """Return an exception and those it was raised from or during."""
    found: list[BaseException] = []
    while err is not None and err not in found:
        found.append(err)
        err = err.__cause__ or err.__context__
    return found


class Watch:
    """Counts what happens, and remembers one case of each thing that should not."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.unexpected: dict[str, list[Any]] = {}
        self.case = ""

    def note(self, where: str, err: BaseException) -> None:
        """Remember an exception that is none of ours, or that hides a want of memory."""
        for one in chain(err):
            bad = isinstance(one, MemoryError) if where == "scan" else False
            if one is err:
                # The files are on a disk that works: an error of the operating system is a parser's.
                bad = bad or not isinstance(one, MedsslError) or getattr(one, "reason", "") in scan.IO_REASONS
            if bad:
                frames = traceback.extract_tb(one.__traceback__)
                ours = [frame for frame in frames if "/medssl/" in frame.filename] or frames
                last = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
                key = f"{where} {type(one).__name__} at {last}"
                self.unexpected.setdefault(key, [0, self.case])[0] += 1

    def inner(self, function: Any) -> Any:
        """Wrap what `scan_file` calls: it turns every exception into the reason `unreadable`."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except Exception as err:
                self.note("scan", err)
                raise

        return watched


def part_of(row: dict[str, Any], number: int) -> dict[str, Any] | None:
    """Return a part of the file that a row promises, where it does."""
    header = json.loads(row["header"])
    if header.get("parts"):
        return {"frames": header["parts"][number % len(header["parts"])]["frames"]}
    if row["kind"] == "volume" and len(header.get("shape", ())) > 3:
        return {"volume": 0}
    return None


def domain_of(row: dict[str, Any], number: int) -> str:
    """Return the domain that the index would choose, or, one time in three, any."""
    header = json.loads(row["header"])
    names = sorted(DOMAINS)
    if number % 3 == 0:
        return names[number // 3 % len(names)]
    if header.get("kind") == "slide" or "slide" in header:
        return "wsi"
    if row["kind"] == "image":
        return ("xray", "ultrasound", "microscopy")[number % 3]
    return BY_MODALITY.get(str(header.get("modality")), ("mri", "ct")[number % 2])


def one(path: Path, watch: Watch, domains: dict[str, Any], number: int, *, read: bool) -> None:
    """Scan one file, and perhaps read it."""
    rows = scan.scan_file(str(path))
    assert rows and all(set(row) == set(scan.SCAN_COLUMNS) for row in rows)
    for row in rows:
        json.loads(row["header"]), json.loads(row["slice"])
        watch.outcomes[row["reason"] or row["kind"]] += 1
    if not read:
        return
    name = domain_of(rows[0], number)
    try:
        domains[name].read([path], series_id="0" * 32, part=part_of(rows[0], number))
        watch.outcomes["read"] += 1
    except MedsslError as err:
        watch.note("read", err)
        watch.outcomes[f"read:{err.reason if isinstance(err, ImageError) else 'request'}"] += 1
    except Exception as err:
        watch.note("read", err)


def address_space(name: str) -> int:
    """Return VmSize or VmPeak in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("/tmp/medssl-fuzz"))
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--progress", type=Path)
    parser.add_argument("--case")
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    files = {name: path for name, path in sources(args.folder / "sources").items() if args.only in name}
    names = sorted(files)
    contents = {name: path.read_bytes() for name, path in files.items()}
    watch = Watch()
    scan._scan = watch.inner(scan._scan)
    domains = {name: lookup("domain", name)(**({"max_pixels": 1 << 20} if name == "wsi" else {})) for name in DOMAINS}
    place = args.folder / "mutant"
    place.mkdir(exist_ok=True)
    warnings.simplefilter("error")
    silence_libraries()  # as the command line and the workers do
    if args.case:
        name, _, number = args.case.rpartition(":")
        path = place / f"m{files[name].suffix}"
        data, done = mutate(contents[name], args.case)
        path.write_bytes(data)
        original = watch.note
        watch.note = lambda where, err: (traceback.print_exception(err), original(where, err))[0]  # type: ignore[method-assign]
        one(path, watch, domains, int(number), read=True)
        print(path, done, dict(watch.outcomes))
        return
    # Every parser and decoder once on whole files: what importing them takes is not theirs.
    for name in names:
        for number in (1, *range(0, 3 * len(DOMAINS), 3)):
            one(files[name], watch, domains, number, read=True)
    whole = dict(watch.outcomes)
    watch.outcomes.clear()
    start = address_space("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (start + LIMIT_BYTES, start + LIMIT_BYTES))
    progress = os.open(args.progress or os.devnull, os.O_WRONLY | os.O_CREAT, 0o600)
    slowest: list[tuple[float, str]] = []
    growth: list[tuple[int, str]] = []
    peak = start
    total_cpu = time.process_time()
    by_source: Counter[str] = Counter()
    for k in range(args.first, args.count):
        name, number = names[k % len(names)], k // len(names)
        watch.case = f"{name}:{number}"
        os.pwrite(progress, f"{k} {watch.case}".ljust(120).encode(), 0)
        path = place / f"m{files[name].suffix}"
        data, _ = mutate(contents[name], watch.case)
        path.write_bytes(data)
        before = time.process_time()
        # By CPU time, so that a machine that is busy with other things does not look like a hang; the default action ends the process.
        signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
        one(path, watch, domains, number, read=number % READ_EVERY == 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        slowest.append((time.process_time() - before, watch.case))
        by_source[name] += time.process_time() - before  # type: ignore[assignment]
        now = address_space("VmPeak")
        if now > peak + (1 << 20):
            growth.append(((now - peak) >> 20, watch.case))
            peak = now
        path.unlink()
    slowest = sorted(slowest, reverse=True)[:5]
    result = {
        "files": args.count - args.first,
        "sources": len(names),
        "cpu_s": round(time.process_time() - total_cpu, 1),
        "slowest": [[round(seconds, 3), case] for seconds, case in slowest],
        "address_space_mb": (address_space("VmPeak") - start) >> 20,
        "growth_mb": sorted(growth, reverse=True)[:8],
        "outcomes": dict(watch.outcomes.most_common()),
        "unexpected": watch.unexpected,
        "whole": whole,
        "by_source": {name: round(seconds, 1) for name, seconds in by_source.most_common(12)},
    }
    print(json.dumps(result))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
