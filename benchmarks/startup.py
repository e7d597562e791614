"""Seconds of `import medssl`, and peak memory of `medssl cache` on a 512x512x400 volume.

    python -m benchmarks.startup

Imports run in fresh processes, in turn with `import numpy`, which shows how fast the machine is. Caching runs as the
command does, in a fresh process that reports its own high-water mark (VmHWM, or that of a child) at its end; the volume
comes once as NIfTI and once as a DICOM series. Linux only.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Check, Result, finish, parser, synthetic_ct
from medssl.archive.index import index
from tests.synthetic import write_dicom_series, write_nifti

IMPORT = "import time; begin = time.perf_counter(); import {name}; print(time.perf_counter() - begin)"
COMMAND = """
import json, resource, sys
from medssl.cli.main import main
try:
    main(sys.argv[2:])
finally:
    peak = dict(line.split(":", 1) for line in open("/proc/self/status"))["VmHWM"].split()[0]
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    with open(sys.argv[1], "w") as stream:
        json.dump(max(int(peak), children), stream)
"""
IMPORT_LIMIT_S, MEMORY_LIMIT_GB = 0.3, 1.5
RECIPE = """
kind: pretrain
data: {index: "???", domain: ct}
views: {size: [96, 96, 96], mask: {ratio: 0.75, cell: 16}}
encoder: {name: vit3d}
objective: {name: mae}
"""


def import_seconds(name: str) -> float:
    """Import a package in a fresh process and return how long the import took there."""
    done = subprocess.run([sys.executable, "-c", IMPORT.format(name=name)], check=True, capture_output=True, text=True)
    return float(done.stdout)


def imports(repeats: int) -> dict[str, list[float]]:
    """Return seconds of the import alone, in turns; one turn before the first counts for nothing, it fills the page cache."""
    turns = [{name: import_seconds(name) for name in ("medssl", "numpy")} for _ in range(repeats + 1)][1:]
    return {name: [turn[name] for turn in turns] for name in ("medssl", "numpy")}


def write_volume(folder: Path, form: str, shape: Sequence[int]) -> None:
    """Write the CT as NIfTI or as a DICOM series."""
    volume = synthetic_ct(shape)
    affine = np.diag([-0.7, -0.7, 1.0, 1.0])
    folder.mkdir()
    if form == "dicom":
        write_dicom_series(folder, (volume + np.int16(1024)).astype(np.uint16), affine, modality="CT", intercept=-1024)
    else:
        write_nifti(folder / "volume.nii.gz", volume, affine)


def cache_peak_gb(archive: Path, work: Path) -> float:
    """Run `medssl cache` into a new store and return the peak resident memory of that process in GB (10^9 bytes)."""
    work.mkdir()
    (work / "recipe.yaml").write_text(RECIPE)
    command = ["cache", str(work / "recipe.yaml"), f"data.index={archive}", f"data.store={work / 'store'}"]
    done = subprocess.run([sys.executable, "-c", COMMAND, str(work / "peak"), *command], capture_output=True, text=True)
    stored = len(list((work / "store").rglob("items/*.b2nd")))
    if done.returncode != 0 or stored != 1:
        raise RuntimeError(f"medssl cache ended with {done.returncode} and {stored} items: {done.stderr[-2000:]}")
    return float(json.loads((work / "peak").read_text())) * 1024 / 1e9


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options_parser = parser(__doc__)
    options_parser.add_argument("--shape", type=int, nargs=3, default=[512, 512, 400])
    options_parser.add_argument("--memory-runs", type=int, default=3, help="runs of which the highest peak counts")
    options = options_parser.parse_args(argv)
    seconds = imports(options.repeats)
    rows: list[dict[str, Any]] = [
        {"what": f"import {name}, s", "value": statistics.median(values), "highest": max(values)}
        for name, values in seconds.items()
    ]
    checks = [Check("import medssl, s", statistics.median(seconds["medssl"]), IMPORT_LIMIT_S, at_least=False)]
    raw_gb = 2 * float(np.prod(options.shape)) / 1e9
    for form in ("nifti", "dicom"):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            write_volume(folder / "data", form, options.shape)
            index([folder / "data"], folder / "archive", modality="CT")
            peaks = [cache_peak_gb(folder / "archive", folder / f"run_{run}") for run in range(options.memory_runs)]
        rows.append(
            {
                "what": f"medssl cache, {form}, peak GB",
                "value": statistics.median(peaks),
                "highest": max(peaks),
                "times_raw": max(peaks) / raw_gb,
            }
        )
        checks.append(Check(f"peak memory of medssl cache, {form}, GB", max(peaks), MEMORY_LIMIT_GB, at_least=False))
    notes = [f"the volume is {'x'.join(map(str, options.shape))} int16, {raw_gb:.3g} GB raw; peaks include Python and torch"]
    return finish(Result("startup", rows, checks, vars(options), notes, {"import_seconds": seconds}), options.out)


if __name__ == "__main__":
    main()
