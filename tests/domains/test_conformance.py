"""Every registered domain keeps the contract; the same check is open to outside plug-ins."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medssl.registry import DOMAINS
from medssl.testing import check_domain
from tests import synthetic


@pytest.mark.parametrize("name", sorted(set(DOMAINS) - {"wsi"}))  # slides have their own checks in test_wsi.py
def test_domain__keeps_the_contract(name: str, tmp_path: Path) -> None:
    array, affine = synthetic.oblique_volume()
    if name == "ct":
        array = (array.astype(np.int32) - 1000).clip(-1024, 3000).astype(np.int16)
    path = tmp_path / "image.nii.gz"
    synthetic.write_nifti(path, array, affine)
    sample = check_domain(name, [path], affine=affine)
    assert sample.image.shape[0] == 1
    assert sorted(sample.image.shape[1:]) == sorted(array.shape)
