"""Every real set through the whole of the data's way: indexed, read by its domain, cached, and read back the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medssl.archive.index import ScanOptions, index
from medssl.archive.table import Archive
from medssl.registry import DOMAINS, lookup
from medssl.store.reader import StoreReader
from medssl.store.writer import cache_items

MODALITIES = {
    "CT": ("ct_mr_totalseg_examples/example_ct_sm.nii.gz",),
    "MR": ("msd_hippocampus", "nifti_orientations", "nrrd_pyradiomics"),
    "US": ("us_breast_busi", "us_lung_video"),
    "GM": ("bccd", "fluorescence_ht29", "histology_tiles_nct_crc"),
    "CR": ("cxr_hannover",),
}
"""What a user would say of files that do not say it themselves."""


@pytest.mark.slow
def test_every_set__is_indexed_read_and_cached(tmp_path: Path, shared_data: Path) -> None:
    named = {name for names in MODALITIES.values() for name in names}
    others = [folder for folder in sorted(shared_data.iterdir()) if folder.is_dir() and folder.name not in named]
    options = ScanOptions(workers=2)
    for modality, names in MODALITIES.items():
        index([shared_data / name for name in names], tmp_path / "a", modality=modality, options=options)
    summary = index(others, tmp_path / "a", options=options)
    every = sum(1 for path in shared_data.rglob("*") if path.is_file() and path.parent != shared_data)
    archive = Archive.open(tmp_path / "a")
    assert sum(summary.reasons.values()) + summary.n_files_used >= every
    cached = {}
    for name in sorted(DOMAINS):
        rows = [row for row in archive.select(f"domain = '{name}'") if row.kind != "slide"]
        if not rows:
            continue
        domain = lookup("domain", name)()
        done = cache_items(archive, rows, domain, tmp_path / name)
        # Lesion masks of two normal breasts are blank pictures: kept out by name.
        reasons = [reason for reason, _ in done.failed.values()]
        assert reasons == (["constant"] * 2 if name == "ultrasound" else []), {name: done.failed}
        reader = StoreReader(tmp_path / name)
        kept = [row for row in rows if row.series_id not in done.failed]
        for row in kept[:: max(1, len(kept) // 25)]:
            reader.verify(row.series_id)
            found = reader.read(row.series_id)
            wanted = domain.read(archive.files(row.series_id), series_id=row.series_id, part=archive.part(row.series_id))
            assert np.array_equal(found.image, wanted.image, equal_nan=True)
            assert found.meta == wanted.meta and found.spacing_mm == wanted.spacing_mm
            seen = np.ones(wanted.image.shape[-2:] if found.meta.kind != "volume" else wanted.image.shape[1:], bool)
            assert np.array_equal(seen if found.valid is None else found.valid, seen if wanted.valid is None else wanted.valid)
        cached[name] = done.written
    at_least = {"ct": 4, "microscopy": 300, "mri": 400, "ultrasound": 70, "xray": 30}
    assert all(cached[name] >= n for name, n in at_least.items()), cached
