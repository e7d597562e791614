"""Layout and geometry of Siemens mosaics against nibabel's own reader."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from medssl.archive.headers.dicom_header import read_header
from medssl.archive.headers.dicom_series import mosaic_geometry, split_series
from medssl.archive.headers.mosaic import csa_numbers, mosaic_layout
from medssl.errors import ImageError
from tests.synthetic import LPS, oblique_volume, write_dicom_series


def mosaics(shared_data: Path) -> list[Path]:
    return sorted((shared_data / "mr_dicom_nih" / "20180918Si").rglob("*.dcm"))


@pytest.mark.filterwarnings("ignore")
def test_real_mosaics__geometry_as_nibabel(shared_data: Path) -> None:
    from nibabel.nicom.dicomwrappers import wrapper_from_file

    paths = mosaics(shared_data)
    assert len(paths) == 4
    for path in paths:
        theirs = wrapper_from_file(str(path))
        layout = mosaic_layout(path)
        assert (*layout["tile"], layout["n"]) == theirs.image_shape == (72, 72, 5)
        geometry = mosaic_geometry({**read_header(path), "mosaic": layout})
        assert geometry.faults == () and geometry.affine is not None
        # nibabel indexes (row, column, slice) in LPS.
        np.testing.assert_allclose(LPS @ geometry.affine[:, [1, 0, 2, 3]], theirs.affine, atol=1e-6)


def test_real_mosaics__two_volumes_each(shared_data: Path) -> None:
    headers = [{**read_header(path), "mosaic": mosaic_layout(path)} for path in mosaics(shared_data)[:2]]
    groups = split_series(headers[::-1])
    assert [(group.indices, group.split_by, group.n_volumes) for group in groups] == [((1,), "mosaic", 2), ((0,), "mosaic", 2)]
    assert groups[0].geometry.shape(72, 72) == (72, 72, 5)


@pytest.mark.filterwarnings("ignore")
def test_csa__as_nibabel(shared_data: Path) -> None:
    import pydicom
    from nibabel.nicom import csareader

    data = pydicom.dcmread(mosaics(shared_data)[0])[0x0029, 0x1010].value
    theirs = csareader.read(data)["tags"]
    ours = csa_numbers(data)
    numeric = {
        name: tag["items"] for name, tag in theirs.items() if tag["items"] and all(not isinstance(v, str) for v in tag["items"])
    }
    assert {"NumberOfImagesInMosaic", "SliceNormalVector", "ProtocolSliceNumber"} <= set(numeric)
    for name, items in numeric.items():
        assert ours[name] == pytest.approx([float(value) for value in items]), name
    with pytest.raises((struct.error, ValueError)):
        csa_numbers(data[:200])


def test_csa_format_1__read() -> None:
    """Lengths are relative to the item count of the first tag."""
    data = struct.pack("<II", 1, 77) + struct.pack("<64si4siii", b"NumberOfImagesInMosaic", 1, b"US", 0, 6, 77)
    texts = [b"36\0\0", *[b""] * 5]
    for text in texts:
        data += struct.pack("<4i", len(text) + 6, 0, 77, 0) + text
    assert csa_numbers(data) == {"NumberOfImagesInMosaic": [36.0]}


def test_mosaic_without_a_count__refused(tmp_path: Path) -> None:
    array, affine = oblique_volume()
    (path,) = write_dicom_series(tmp_path, array[..., :1], affine)
    with pytest.raises(ImageError, match="does not say how it is tiled") as info:
        mosaic_layout(path)
    assert info.value.reason == "mosaic"
