"""Scan DICOM headers for the index: the whole column set beside pydicom reading three tags, and over two workers.

    python -m benchmarks.header_scan

Small CT files in the page cache. "three tags" is `pydicom.dcmread(stop_before_pixels, specific_tags)` with the study, series and
instance UID; ours also recognises the file, hashes it and makes the row that a scan part holds.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import Check, Result, finish, interleave, milliseconds, parser, times_faster
from medssl._compat.spawn_main import spawn_pool
from medssl.archive.scanning.scan import scan_batch, scan_file
from tests.synthetic_tree import write_tree

PYDICOM, OURS, ONE, TWO = "pydicom, three tags", "scan_file, all columns", "one worker process", "two worker processes"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    import pydicom

    options_parser = parser(__doc__)
    options_parser.add_argument("--files", type=int, default=1000, help="files of one turn")
    options = options_parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        write_tree(Path(temporary), -(-options.files // 100), min(100, options.files))
        paths = [str(path) for path in sorted(Path(temporary).rglob("*_*")) if path.is_file()]

        def three_tags() -> None:
            for path in paths:
                pydicom.dcmread(path, stop_before_pixels=True, specific_tags=[0x00080018, 0x0020000D, 0x0020000E])

        seconds = interleave({PYDICOM: three_tags, OURS: lambda: [scan_file(path) for path in paths]}, repeats=options.repeats)
        pieces = [paths[i : i + 50] for i in range(0, len(paths), 50)]
        with spawn_pool(1) as one, spawn_pool(2) as two:
            for pool in (one, two):
                list(pool.map(scan_batch, pieces))  # the workers import what they need
            seconds |= interleave(
                {ONE: lambda: list(one.map(scan_batch, pieces)), TWO: lambda: list(two.map(scan_batch, pieces))},
                repeats=options.repeats,
            )
    rows = [
        {"what": name, "files_per_s": 1000 * len(paths) / milliseconds(seconds, name)["median_ms"], **milliseconds(seconds, name)}
        for name in seconds
    ]
    checks = [
        Check("rate against pydicom with three tags", times_faster(seconds, OURS, PYDICOM), 0.4),
        Check("two workers against one", times_faster(seconds, TWO, ONE), 1.7),
    ]
    notes = ["files lie in the page cache", "one open and two reads for each file (a test counts them)"]
    return finish(Result("header_scan", rows, checks, vars(options), notes, {"seconds": seconds}), options.out)


if __name__ == "__main__":
    main()
