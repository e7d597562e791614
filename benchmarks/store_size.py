"""Lossless size of real CT in the store, and whether every voxel comes back.

    python -m benchmarks.store_size --data ../shared/data

Each set goes the road of a user: index, cache, read. Two checks per volume: the store gives back the bits that the
domain delivered, and these equal what SimpleITK reads from the same files (valid voxels, same orientation).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Check, Result, finish, parser
from medssl.archive.index import index
from medssl.archive.table import Archive, SeriesRow
from medssl.domains.ct import CT
from medssl.store.reader import StoreReader
from medssl.store.writer import cache_items
from medssl.types import Sample

SETS = {
    "ct_covid_ct_md": "ct_covid_ct_md",
    "ct_mr_totalseg_examples": "ct_mr_totalseg_examples/example_ct_sm.nii.gz",
    "ct_ge_gantry_tilt": "ct_ge_gantry_tilt",
}


def read_with_itk(files: Sequence[Path]) -> np.ndarray:
    """Read one image or series through SimpleITK, in RAS order (X, Y, Z).

    Raises:
        RuntimeError: SimpleITK cannot read it.
    """
    import SimpleITK as sitk

    if len(files) == 1:
        image = sitk.ReadImage(str(files[0]))
    else:
        folder = str(files[0].parent)
        (series,) = sitk.ImageSeriesReader.GetGDCMSeriesIDs(folder)
        image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(folder, series))
    array: np.ndarray = sitk.GetArrayFromImage(sitk.DICOMOrient(image, "LPS"))
    return array.transpose(2, 1, 0)[::-1, ::-1]


def equals_itk(sample: Sample, files: Sequence[Path]) -> bool | str:
    """Return whether the valid voxels of a sample equal SimpleITK's, or why that cannot be said."""
    try:
        other = read_with_itk(files)
    except (RuntimeError, ValueError) as err:
        return f"SimpleITK cannot read it ({type(err).__name__})"
    image = sample.image[0]
    if image.shape != other.shape:
        return False
    valid = np.ones(image.shape, dtype=bool) if sample.valid is None else sample.valid
    return bool(np.array_equal(image[valid], other[valid]))


def measure(archive: Archive, row: SeriesRow, store: Path) -> dict[str, Any]:
    """Cache one series and return its sizes and checks, or why it was refused."""
    domain = CT()
    name = {"slices": row.n_slices, "shape": "x".join(map(str, row.shape)), "files_mb": row.bytes / 1e6}
    summary = cache_items(archive, [row], domain, store)
    if summary.failed:
        return {**name, "outcome": f"refused: {summary.failed[row.series_id][0]}"}
    files = archive.files(row.series_id)
    source = domain.read(files, series_id=row.series_id)
    stored = StoreReader(store).read(row.series_id)
    equal = stored.image.dtype == source.image.dtype and np.array_equal(stored.image, source.image)
    if source.valid is not None and not source.valid.all():
        equal = equal and stored.valid is not None and np.array_equal(stored.valid, source.valid)
    return {
        **name,
        "outcome": "stored",
        "dtype": str(stored.image.dtype),
        "raw_mb": summary.n_raw_bytes / 1e6,
        "store_mb": summary.n_bytes / 1e6,
        "share_of_raw": summary.n_bytes / summary.n_raw_bytes,
        "bit_equal": bool(equal),
        "equals_simpleitk": equals_itk(source, files),
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options_parser = parser(__doc__, repeats=1)
    options_parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    options_parser.add_argument("--sets", nargs="+", choices=sorted(SETS), default=list(SETS))
    options = options_parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    checks: list[Check] = []
    for name in options.sets:
        if not (options.data / SETS[name]).exists():
            rows.append({"set": name, "outcome": "not there"})
            continue
        with tempfile.TemporaryDirectory() as folder:
            summary = index([options.data / SETS[name]], Path(folder) / "index", modality="CT")
            archive = Archive.open(Path(folder) / "index")
            usable = archive.select(None)
            if not usable:
                reasons = ", ".join(f"{reason}: {count} files" for reason, count in sorted(summary.reasons.items()))
                rows.append({"set": name, "outcome": f"rejected by the index ({reasons})"})
            for number, row in enumerate(usable):
                found = {"set": name, **measure(archive, row, Path(folder) / f"store_{number}")}
                rows.append(found)
                if found["outcome"] == "stored":
                    checks.append(Check(f"{name}: share of raw", found["share_of_raw"], 0.5, at_least=False))
                    checks.append(Check(f"{name}: bit-equal after the store (1 = yes)", float(found["bit_equal"]), 1.0))
    notes = [
        "sizes do not depend on the machine or on repeats: one run is enough",
        "a tilted head is sheared onto an orthogonal grid, which SimpleITK does not do: its voxels are not compared",
    ]
    return finish(Result("store_size", rows, checks, vars(options), notes), options.out)


if __name__ == "__main__":
    main()
