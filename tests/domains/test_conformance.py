"""Every registered domain keeps the contract; the same check is open to outside plug-ins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medssl.registry import DOMAINS
from medssl.testing import check_domain
from tests import synthetic, synthetic_planar


@pytest.mark.parametrize("name", ["ct", "mri"])
def test_volume_domain__keeps_the_contract(name: str, tmp_path: Path) -> None:
    array, affine = synthetic.oblique_volume()
    if name == "ct":
        array = (array.astype(np.int32) - 1000).clip(-1024, 3000).astype(np.int16)
    path = tmp_path / "image.nii.gz"
    synthetic.write_nifti(path, array, affine)
    sample = check_domain(name, [path], affine=affine)
    assert sample.image.shape[0] == 1
    assert sorted(sample.image.shape[1:]) == sorted(array.shape)


def _radiograph(folder: Path) -> Path:
    return synthetic_planar.write_planar_dicom(folder / "x.dcm", synthetic_planar.radiograph(), bits_stored=12)


def _loop(folder: Path) -> Path:
    return synthetic_planar.write_planar_dicom(folder / "u.dcm", synthetic_planar.us_loop(), modality="US", FrameTime=40)


def _field(folder: Path) -> Path:
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(folder / "m.png")
    return folder / "m.png"


PLANAR: dict[str, tuple[Callable[[Path], Path], str, tuple[int, ...]]] = {
    "xray": (_radiograph, "image", (1, 60, 48)),
    "ultrasound": (_loop, "clip", (12, 1, 120, 160)),
    "microscopy": (_field, "image", (3, 30, 40)),
}


@pytest.mark.parametrize("name", sorted(PLANAR))
def test_planar_domain__keeps_the_contract(name: str, tmp_path: Path) -> None:
    make, kind, shape = PLANAR[name]
    sample = check_domain(name, [make(tmp_path)])
    assert (sample.meta.kind, sample.image.shape) == (kind, shape)


def test_conformance__covers_every_domain() -> None:
    assert set(DOMAINS) - {"wsi"} == {"ct", "mri", *PLANAR}
