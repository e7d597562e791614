from __future__ import annotations

from pathlib import Path

import pytest

from medssl.phantoms.cohort import make_cohort


@pytest.fixture(scope="session")
def phantom_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index over ten phantoms (NIfTI and DICOM); the cohort lies beside it."""
    from medssl.archive.index import index

    root = tmp_path_factory.mktemp("phantoms")
    cohort = make_cohort(root / "cohort", patients=10, seed=0, size=(48, 40, 32))
    key = root / "id.key"  # ids, and with them the order of items, depend on the key
    key.write_text("the key of the golden ledger, no patients\n")
    key.chmod(0o600)
    summary = index([cohort / "images"], root / "index", splits=cohort / "split.csv", modality="MR", key_file=key)
    assert summary.n_series == 10
    return root / "index"
