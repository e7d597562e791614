"""Time and memory of the index as the archive grows, with latency, and after a small change; and the grouper alone.

    python -m benchmarks.index_scale files     # small DICOM files in a shuffled tree: 20,000 and 200,000 of them
    python -m benchmarks.index_scale grouper   # header rows only, no files: 2 and 20 million

Each index runs in a fresh process that reports the high-water mark of its memory and of its largest worker's (Linux only). `files` also
names 1 % of the series or files as changed (`--list`), in their pixels or in their headers, and sleeps 5 ms at each opening of a file.
`grouper` writes scan parts as a scan leaves them, 100 slices a series.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.common import Check, Result, finish, parser
from medssl.archive._parquet import connect, quote
from medssl.archive.scanning.listing import LISTING_COLUMNS
from medssl.archive.scanning.scan import SCAN_COLUMNS, scan_file
from tests.synthetic_tree import template, write_tree

PER_SERIES = 100
SCANNED = 20_000
WHOLE = "1 % of the series changed, --list"
SPREAD = "1 % of the files changed, spread over the series, --list"
HEADERS = "1 % of the files with another header, spread over the series, --list"
RUN = """
import json, sys, time
import benchmarks.index_scale as module
began, worked = time.perf_counter(), time.process_time()
with module.watched_workers() as workers:
    found = getattr(module, sys.argv[2])(*sys.argv[3:])
times = {"seconds": time.perf_counter() - began, "processor_s": time.process_time() - worked}
peaks = {"peak_mb": module.peak_mb("self"), "worker_mb": max(workers.values(), default=0.0)}
json.dump({**times, **peaks, **found}, open(sys.argv[1], "w"))
"""


def peak_mb(pid: int | str) -> float:
    """Return the high-water mark of a process's memory; 0 for one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return max((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), default=0.0)


@contextmanager
def watched_workers(every_s: float = 0.1) -> Iterator[dict[int, float]]:
    """Yield child process -> peak memory in MB, filled while they run.

    The system's own account of ended children (`RUSAGE_CHILDREN`) will not do: it starts at the size of the process that started them.
    """
    peaks: dict[int, float] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(every_s):
            for task in Path("/proc/self/task").iterdir():
                with suppress(FileNotFoundError, ProcessLookupError):
                    for pid in map(int, (task / "children").read_text().split()):
                        # The latest mark and not the highest: until a child runs its own program it has its parent's.
                        peaks[pid] = peak_mb(pid) or peaks.get(pid, 0.0)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peaks
    finally:
        done.set()
        watcher.join()


def index_files(source: str, out: str, only: str = "") -> dict[str, Any]:
    """Index a tree; what the fresh process runs."""
    from medssl.archive.index import ScanOptions, index

    options = ScanOptions(workers=2, only=Path(only) if only else None)
    summary = index([Path(source)], Path(out), options=options)
    return {"files": summary.n_files_seen, "scanned": summary.n_files_scanned, "series": summary.n_series}


def scan_rate(source: str, latency_ms: str, n: str) -> dict[str, Any]:
    """Scan files over two workers whose every opening of a file takes some milliseconds more."""
    from medssl.archive.scanning import sweep

    paths = sorted(str(path) for path in Path(source).rglob("*_*") if path.is_file())[: int(n)]
    sweep.scan_batch = _Slow(float(latency_ms))  # type: ignore[assignment]
    sweep.PROCESSES_ABOVE = 0
    with tempfile.TemporaryDirectory() as private:
        (Path(private) / "scan").mkdir()
        rows = sweep.sweep(paths, len(paths), Path(private), workers=2)
    return {"files": rows, "scanned": rows, "series": None}


class _Slow:
    """A `scan_batch` whose files open slowly; picklable, so that spawned workers get it."""

    def __init__(self, latency_ms: float) -> None:
        self.latency_ms = latency_ms

    def __call__(self, paths: list[str], **options: Any) -> list[dict[str, Any]]:
        import time

        from medssl.archive.scanning import scan

        def slow(*args: Any, **named: Any) -> Any:
            time.sleep(self.latency_ms / 1000)
            return open(*args, **named)

        if self.latency_ms:
            scan.open = slow  # type: ignore[attr-defined]
        return scan.scan_batch(paths, **options)


def group(out: str) -> dict[str, Any]:
    """Group the scan parts that lie in an index folder."""
    from medssl.archive.grouping import regroup
    from medssl.archive.ids import IdKey
    from medssl.archive.rows.base import Choice

    nothing = Choice()
    regroup(Path(out), IdKey(b"k" * 32), lambda path: nothing, anew=True)
    connection = connect()
    count = connection.execute(f"SELECT count(*) FROM read_parquet({quote(Path(out) / 'series.parquet')})").fetchone()[0]
    return {"series": count}


def write_rows(out: Path, rows: int) -> None:
    """Write scan parts and a listing of `rows` files as a scan leaves them, series interleaved as in a shuffled tree."""
    private = out / "private"
    for folder in (out, private, private / "scan", out / "files.parquet"):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "one.dcm"
        file.write_bytes(template()[0])
        row = scan_file(str(file))[0]
    header, piece = row["header"].replace("'", "''"), json.loads(row["slice"])
    n_series = -(-rows // PER_SERIES)
    text = json.dumps({**piece, "position": ["@x", "@y", "@z"], "instance_number": "@n", "sop_instance_uid": "@u"}).replace(
        "'", "''"
    )
    fields = {
        '"@x"': "-10.0", '"@y"': "-10.0", '"@z"': "' || k * 2.0 || '", '"@n"': "' || k || '", "@u": "1.2.3.' || i || '",
    }  # fmt: skip
    for mark, value in fields.items():
        text = text.replace(mark, value)
    columns = {
        "part": "{part}", "path": "printf('/archive/%04d/%09d', i % 5000, i)", "source_id": "i", "size": "2048",
        "mtime_ns": "1000000000", "kind": "'dicom'", "reason": "NULL", "digest": "md5(i::VARCHAR)",
        "group_key": "printf('d%016x', hash(series) // 2)", "sop_id": "i", "header_id": "series",
        "header": f"replace('{header}', '1.2.826.0.1.4000000', '1.2.826.0.1.4' || series)",
        "slice": f"'{text}'",
    }  # fmt: skip
    connection = connect()
    step = 1_000_000
    for part, start in enumerate(range(0, rows, step)):
        values = ", ".join(
            f"({value.format(part=part) if name == 'part' else value})::{SCAN_COLUMNS[name]} AS {name}"
            for name, value in columns.items()
        )
        query = f"SELECT {values} FROM (SELECT i, i % {n_series} AS series, i // {n_series} AS k FROM range({start}, {min(rows, start + step)}) t(i))"
        connection.execute(
            f"COPY ({query}) TO {quote(private / 'scan' / f'part-{part:08d}.parquet')} (FORMAT parquet, COMPRESSION zstd)"
        )
    names = {
        "path": "printf('/archive/%04d/%09d', i % 5000, i)", "source_id": "i", "folder": "printf('/archive/%04d', i % 5000)",
        "size": "2048", "mtime_ns": "1000000000", "reason": "NULL", "folder_mtime_ns": "NULL",
    }  # fmt: skip
    values = ", ".join(f"({names[name]})::{kind} AS {name}" for name, kind in LISTING_COLUMNS.items())
    connection.execute(
        f"COPY (SELECT {values} FROM range({rows}) t(i)) TO {quote(private / 'listing.parquet')} (FORMAT parquet, COMPRESSION zstd)"
    )


def fresh(function: str, *args: object) -> dict[str, Any]:
    """Run a function of this module in a fresh process; its result with seconds and peak memory."""
    with tempfile.NamedTemporaryFile(suffix=".json") as result:
        subprocess.run([sys.executable, "-c", RUN, result.name, function, *map(str, args)], check=True)
        found: dict[str, Any] = json.loads(Path(result.name).read_text())
    return found


def change(paths: list[Path], listed: Path, at: int = -1) -> None:
    """Change one byte of some files, the last one or a digit of the header, and write the list that names them."""
    for path in paths:
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(bytes(data))
    listed.write_text("\n".join(map(str, paths)))


def by_series(files: list[Path]) -> dict[bytes, list[Path]]:
    """Return the files of each series, told by the one place of the template where they differ."""
    at = template()[1]["series"]
    found: dict[bytes, list[Path]] = {}
    for path in files:
        found.setdefault(path.read_bytes()[at : at + 7], []).append(path)
    return found


def measure_files(sizes: list[int], folder: Path, turns: int) -> tuple[list[dict[str, Any]], list[Check]]:
    """Index trees of growing size, then the largest again with 1 % named as changed, then scan with latency."""
    for size in sizes:
        write_tree(folder / str(size), size // PER_SERIES, PER_SERIES)
    rows = [{"what": "index", **fresh("index_files", folder / str(size), folder / f"out-{size}")} for size in sizes]
    small, full = rows[0], rows[-1]
    tree, out, listed = folder / str(sizes[-1]), folder / f"out-{sizes[-1]}", folder / "changed.txt"
    files = sorted(path for path in tree.rglob("*_*") if path.is_file())
    series, n = by_series(files), max(1, len(files) // 100)
    changes: dict[str, list[dict[str, Any]]] = {WHOLE: [], SPREAD: [], HEADERS: []}
    for turn in range(turns):
        rng = random.Random(turn)
        chosen = rng.sample(sorted(series), max(1, len(series) // 100))
        change([path for name in chosen for path in series[name]], listed)
        changes[WHOLE].append(fresh("index_files", tree, out, listed))
        change(rng.sample(files, n), listed)
        changes[SPREAD].append(fresh("index_files", tree, out, listed))
        change(rng.sample(files, n), listed, template()[1]["number"] + 6)
        changes[HEADERS].append(fresh("index_files", tree, out, listed))
    again = {"what": "index", **fresh("index_files", tree, folder / "out-again")}
    whole_s = statistics.mean((full["seconds"], again["seconds"]))  # one before and one after: the machine is not always as fast
    scans = [(fresh("scan_rate", tree, 0, SCANNED), fresh("scan_rate", tree, 5, SCANNED)) for _ in range(turns)]
    rows += [again, *({"what": what, **found} for what, runs in changes.items() for found in runs)]
    rows += [{"what": f"scan, {ms} ms a file", **turn[k]} for turn in scans for k, ms in enumerate((0, 5))]
    checks = [
        Check("peak memory of all processes, largest against smallest", _memory(full) / _memory(small), 1.2, at_least=False),
        *(
            Check(
                f"{what}: share of the full index's time",
                statistics.median(run["seconds"] for run in runs) / whole_s,
                0.05,
                at_least=False,
            )
            for what, runs in changes.items()
        ),
        Check("rate with 5 ms a file against none", statistics.median(a["seconds"] / b["seconds"] for a, b in scans), 0.8),
    ]
    return rows, checks


def _memory(row: dict[str, Any]) -> float:
    """Return the peaks of the main process and of both workers, in MB."""
    return float(row["peak_mb"] + 2 * row["worker_mb"])


def measure_grouper(sizes: list[int], folder: Path) -> tuple[list[dict[str, Any]], list[Check]]:
    """Group header rows of growing number."""
    rows = []
    for size in sizes:
        write_rows(folder / str(size), size)
        rows.append({"what": "group", "files": size, **fresh("group", folder / str(size))})
    per = [row["processor_s"] / row["files"] for row in rows]
    return rows, [
        Check("peak memory, GB", max(row["peak_mb"] for row in rows) / 1024, 4.0, at_least=False),
        Check("processor seconds a row, largest against smallest", per[-1] / per[0], 1.25, at_least=False),
    ]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options_parser = parser(__doc__, repeats=3)
    options_parser.add_argument("what", choices=["files", "grouper"])
    options_parser.add_argument("--sizes", type=int, nargs="+", default=None, help="files or rows, growing")
    options_parser.add_argument("--tmp", type=Path, default=None, help="where trees and tables are written")
    options = options_parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.tmp) as temporary:
        if options.what == "files":
            sizes = options.sizes or [20_000, 200_000]
            rows, checks = measure_files(sizes, Path(temporary), options.repeats)
        else:
            sizes = options.sizes or [2_000_000, 20_000_000]
            rows, checks = measure_grouper(sizes, Path(temporary))
    for row in rows:
        row["per_s"] = row["files"] / row["seconds"]
    notes = [
        "two workers; files lie in the page cache",
        "peak_mb and processor_s are of the main process, worker_mb is of the largest worker",
    ]
    return finish(Result(f"index_scale_{options.what}", rows, checks, {**vars(options), "sizes": sizes}, notes), options.out)


if __name__ == "__main__":
    main()
