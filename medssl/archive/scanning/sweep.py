"""Scan many files over an executor, batch by batch; each finished batch is on disk before the next is counted."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any

from medssl._compat.spawn_main import spawn_pool
from medssl.archive._parquet import write_table
from medssl.archive.scanning.scan import IO_REASONS, SCAN_COLUMNS, blank_row, scan_batch
from medssl.errors import StoreError

BATCH = 1024
MAX_BATCH = 8192
PROCESSES_ABOVE = 2048
"""Fewer files are scanned in threads: starting a process costs as much as a few hundred files."""
THREADS = 12
"""Files open together in one worker, so that waiting for storage costs nothing: 5 ms a file at 0.5 ms of work each."""
OUTAGE_WINDOW, OUTAGE_SHARE = 1000, 0.05
LIMIT_S = 600.0


def sweep(
    paths: Iterable[str],
    total: int,
    private: Path,
    connection: Any = None,
    *,
    workers: int = 2,
    executor: Executor | None = None,
    limit_s: float = LIMIT_S,
    max_rate: float | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> int:
    """Scan files into `private/scan/part-*.parquet`.

    Args:
        paths: Files to scan.
        total: How many there are.
        private: The index's private folder.
        connection: DuckDB, encodes the parts; None opens one for each.
        workers: Processes (threads for few files).
        executor: Takes the batches instead, for instance a Dask cluster's; it must see the same paths.
        limit_s: Seconds after which a file is left behind.
        max_rate: Files per second at most.
        on_progress: Called with the number of files done.

    Returns:
        Number of rows written.

    Raises:
        StoreError: More than one in twenty of the last thousand files had input/output errors (the storage is ill, the files are
            not), or the index could not be written.
    """
    # A few hundred parts for a large archive, each worth seconds of scanning.
    size = max(BATCH, min(MAX_BATCH, total // 200))
    part = next_part(private)
    recent: deque[bool] = deque(maxlen=OUTAGE_WINDOW)
    done = written = 0
    started = time.monotonic()
    for batch, rows in _batches(_cut(paths, size), workers, executor, limit_s, many=total > PROCESSES_ABOVE):
        recent.extend(row["reason"] in IO_REASONS for row in rows)
        if sum(recent) > OUTAGE_SHARE * OUTAGE_WINDOW:
            raise StoreError(
                f"{sum(recent)} of the last {len(recent)} files could not be read (input/output errors or time-outs): this looks like an "
                "outage of the storage, not like bad files, and the last batch was not recorded; what was scanned before is kept; check "
                "the mount and run the same command again to go on"
            )
        write_table(
            private / "scan" / f"part-{part:08d}.parquet", SCAN_COLUMNS, ({**row, "part": part} for row in rows), connection
        )
        part += 1
        done += len(batch)
        written += len(rows)
        if on_progress is not None:
            on_progress(done)
        if max_rate:
            time.sleep(max(0.0, done / max_rate - (time.monotonic() - started)))
    return written


def next_part(private: Path) -> int:
    """Return the number of the next scan part."""
    parts = sorted((private / "scan").glob("part-*.parquet"))
    return int(parts[-1].stem.partition("-")[2]) + 1 if parts else 0


def _cut(paths: Iterable[str], size: int) -> Iterator[list[str]]:
    source = iter(paths)
    while batch := list(islice(source, size)):
        yield batch


def _batches(
    batches: Iterator[list[str]], workers: int, executor: Executor | None, limit_s: float, *, many: bool
) -> Iterator[tuple[Sequence[str], list[dict[str, Any]]]]:
    if executor is not None:
        yield from _through(executor, batches, limit_s, window=4 * workers)
        return
    if not many:
        with ThreadPoolExecutor(1) as pool:
            yield from _through(pool, batches, limit_s, window=1, threads=max(workers, 2))
        return
    lost: list[str] = []
    while True:
        pool_p = spawn_pool(workers)
        lost.clear()
        try:
            yield from _through(pool_p, batches, limit_s, window=2 * workers, lost=lost)
        finally:
            pool_p.shutdown(wait=False, cancel_futures=True)
        if not lost:
            return
        # A worker died. One file at a time shows which one killed it; the rest goes on with fresh workers.
        for batch in _cut(lost, BATCH):
            yield batch, _one_by_one(batch, limit_s)


def _through(
    executor: Executor,
    batches: Iterator[list[str]],
    limit_s: float,
    *,
    window: int,
    threads: int = THREADS,
    lost: list[str] | None = None,
) -> Iterator[tuple[Sequence[str], list[dict[str, Any]]]]:
    """Keep `window` batches under way; batches whose worker died go to `lost`, and nothing more is submitted."""
    running: dict[Future[Any], list[str]] = {}

    def submit(batch: list[str]) -> None:
        try:
            running[executor.submit(scan_batch, batch, threads=threads, limit_s=limit_s)] = batch
        except BrokenExecutor:
            if lost is None:
                raise
            lost.extend(batch)

    for batch in islice(batches, window):
        submit(batch)
    while running:
        finished, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in finished:
            batch = running.pop(future)
            try:
                rows = future.result()
            except BrokenExecutor:
                if lost is None:
                    raise
                lost.extend(batch)
                continue
            yield batch, rows
        if not lost:
            for batch in islice(batches, window - len(running)):
                submit(batch)


def _one_by_one(paths: Sequence[str], limit_s: float) -> list[dict[str, Any]]:
    """Scan files in one worker, each after the other; the one that kills it gets a reason, and the next a fresh worker."""
    found: list[dict[str, Any]] = []
    pool = None
    for path in paths:
        pool = pool or spawn_pool(1)
        try:
            found += pool.submit(scan_batch, [path], threads=2, limit_s=limit_s).result()
        except BrokenExecutor:
            found.append(blank_row(path, "worker_lost"))
            pool.shutdown(wait=False)
            pool = None
    if pool is not None:
        pool.shutdown()
    return found
