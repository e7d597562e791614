from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medssl.archive.index import index
from medssl.phantoms.cohort import make_cohort
from tests.synthetic_planar import fan, us_loop, write_planar_dicom


@pytest.fixture(scope="session")
def phantom_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index over ten phantoms (NIfTI and DICOM); the cohort lies beside it."""
    root = tmp_path_factory.mktemp("phantoms")
    cohort = make_cohort(root / "cohort", patients=10, seed=0, size=(48, 40, 32))
    key = root / "id.key"  # ids, and with them the order of items, depend on the key
    key.write_text("the key of the golden ledger, no patients\n")
    key.chmod(0o600)
    summary = index([cohort / "images"], root / "index", splits=cohort / "split.csv", modality="MR", key_file=key)
    assert summary.n_series == 10
    return root / "index"


@pytest.fixture(scope="session")
def cine_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index over six ultrasound loops of 40 frames at 25 per second: a ring that beats in a sector, every one at its own rate."""
    root = tmp_path_factory.mktemp("cines")
    (root / "images").mkdir()
    inside = fan((96, 128))
    y, x = np.mgrid[:96, :128].astype(np.float64)
    for number in range(6):
        frames = us_loop(40, (96, 128), seed=number)
        for t, frame in enumerate(frames):
            radius = 16 + (3 + number) * np.sin(2 * np.pi * t / (14 + 2 * number))
            ring = np.exp(-0.5 * ((np.hypot(y - 44, x - 64) - radius) / 3) ** 2)
            frame[inside] = np.clip(frame[inside] * 0.5 + 120 * ring[inside], 0, 255).astype(np.uint8)
        patient = {"PatientID": f"P{number}", "StudyInstanceUID": f"1.2.3.{number}", "SeriesInstanceUID": f"1.2.3.{number}.1"}
        write_planar_dicom(root / "images" / f"{number}.dcm", frames, modality="US", FrameTime=40, **patient)
    key = root / "id.key"
    key.write_text("the key of the golden ledger, no patients\n")
    key.chmod(0o600)
    summary = index([root / "images"], root / "index", key_file=key)
    assert summary.n_series == 6
    return root / "index"
