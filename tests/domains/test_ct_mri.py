"""Physics of the two volume domains: table and air, bias field, Philips scaling, components."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medssl.domains.ct import AIR_HU, CT, body
from medssl.domains.dicom_volume import component
from medssl.domains.mri import MRI, correct_bias
from tests.synthetic import oblique_affine, oblique_volume, reorient, write_dicom_series

SERIES = "ab" * 16


def patient_on_a_table() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return HU (X, Y, Z) of a body with a lung open at both ends, a separate table below it, and masks of both."""
    x, y, _ = np.meshgrid(np.arange(40), np.arange(36), np.arange(6), indexing="ij")
    inside = ((x - 20) / 15) ** 2 + ((y - 20) / 11) ** 2 < 1
    lung = ((x - 14) / 5) ** 2 + ((y - 20) / 5) ** 2 < 1
    table = (y >= 3) & (y <= 5) & (x > 5) & (x < 35)
    values = np.full(x.shape, -1000, dtype=np.int16)
    values[inside] = 40
    values[lung] = -850
    values[table] = 120
    return values, inside, table


def test_table__set_to_air_and_lungs_kept(tmp_path: Path) -> None:
    values, inside, table = patient_on_a_table()
    np.testing.assert_array_equal(body(values, -500.0, slice_axis=2), inside)
    stored, affine = reorient(values, oblique_affine(), "LPS")
    files = write_dicom_series(tmp_path, stored, affine, modality="CT")
    kept = CT().read(files, series_id=SERIES)
    np.testing.assert_array_equal(kept.image[0], values)
    cleared = CT(keep_table=False)
    sample = cleared.read(files, series_id=SERIES)
    np.testing.assert_array_equal(sample.image[0], np.where(inside, values, AIR_HU))
    assert (sample.image[0][table] == AIR_HU).all() and sample.valid is None
    assert cleared.params() == {"body_hu": -500.0, "keep_table": False}
    assert not cleared.foreground(sample)[table].any()


def test_table__sagittal_slices_filled_in_their_own_plane() -> None:
    values, inside, _ = patient_on_a_table()
    turned = np.ascontiguousarray(values.transpose(2, 0, 1))
    np.testing.assert_array_equal(body(turned, -500.0, slice_axis=0), inside.transpose(2, 0, 1))
    assert body(np.full((3, 4, 5), -1000, np.int16), -500.0).all()


def test_n4__removes_a_known_smooth_field() -> None:
    """The corrected tissue varies less than a quarter of what the field made of it, and equal input gives equal output."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in (48, 40, 32)], indexing="ij"), axis=-1)
    tissue = np.where((grid**2).sum(-1) < 0.8, np.where(grid[..., 0] > 0.1, 300.0, 200.0), 0.0)
    field = np.exp(0.4 * grid[..., 1] + 0.2 * grid[..., 2])
    array = (tissue * field + 5).astype(np.float32)
    mask = tissue > 0
    ours = correct_bias(array, mask, (1.0, 1.5, 2.0))
    assert ours.dtype == np.float32 and ours.shape == array.shape

    def spread(values: np.ndarray) -> float:
        return float(np.mean([np.std(np.log(values[tissue == level])) for level in (200.0, 300.0)]))

    assert spread(ours) < 0.25 * spread(array)
    np.testing.assert_array_equal(ours, correct_bias(array, mask, (1.0, 1.5, 2.0)))


def test_n4__an_argument_and_part_of_the_key(tmp_path: Path) -> None:
    array, affine = oblique_volume((32, 30, 20))
    files = write_dicom_series(tmp_path, array, affine)
    plain, corrected = MRI(), MRI(n4=True)
    assert plain.params() == {"n4": False, "philips_scaling": False} and corrected.params()["n4"] is True
    sample = corrected.read(files, series_id=SERIES)
    assert sample.image.dtype == np.float32
    assert sample.image.shape == plain.read(files, series_id=SERIES).image.shape
    fraction = corrected.foreground(sample).mean()
    assert sample.meta.stats["foreground_fraction"] == pytest.approx(fraction, rel=1e-6)


def philips(
    folder: Path, array: np.ndarray, affine: np.ndarray, slopes: list[float], scales: list[float], block: int
) -> list[Path]:
    import pydicom

    files = write_dicom_series(folder, array, affine, slope=slopes, intercept=[-3.0] * len(slopes))
    for path, scale in zip(files, scales):
        ds = pydicom.dcmread(path)
        ds.Manufacturer = "Philips Medical Systems"
        if block > 0x10:
            ds.add_new(0x20050010, "LO", "Philips Imaging DD 001")
            ds.add_new(0x2005100E, "FL", 77.0)  # another block's element of the same number
        ds.add_new(0x20050000 | block, "LO", "Philips MR Imaging DD 001")
        ds.add_new(0x20050000 | block << 8 | 0x0D, "FL", 0.0)
        ds.add_new(0x20050000 | block << 8 | 0x0E, "FL", scale)
        ds.save_as(path)
    return files


@pytest.mark.parametrize("block", [0x10, 0x11])
def test_philips__floating_point_values(tmp_path: Path, block: int) -> None:
    """FP = (SV * RS + RI) / (RS * SS)."""
    array, affine = oblique_volume((8, 9, 10))
    files = philips(tmp_path, array, affine, [2.0] * 10, [0.125] * 10, block)
    display = MRI().read(files, series_id=SERIES)
    np.testing.assert_array_equal(display.image[0], array * 2 - 3)
    floating = MRI(philips_scaling=True).read(files, series_id=SERIES)
    np.testing.assert_allclose(floating.image[0], (array * 2.0 - 3) / (2.0 * 0.125), rtol=1e-6)


def test_philips__slices_of_different_slopes_always(tmp_path: Path) -> None:
    array, affine = oblique_volume((8, 9, 4))
    slopes, scales = [1.0, 2.0, 4.0, 2.0], [0.5, 0.25, 0.125, 0.25]
    files = philips(tmp_path, array, affine, slopes, scales, 0x10)
    expected = (array * np.array(slopes) - 3) / (np.array(slopes) * np.array(scales))
    np.testing.assert_allclose(MRI().read(files, series_id=SERIES).image[0], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("image_type", "stated", "expected"),
    [
        (("ORIGINAL", "PRIMARY", "M", "ND"), None, "magnitude"),
        (("ORIGINAL", "PRIMARY", "M_FFE", "M", "FFE"), None, "magnitude"),
        (("ORIGINAL", "PRIMARY", "PHASE MAP", "P"), None, "phase"),
        (("ORIGINAL", "PRIMARY", "I_SE"), None, "imaginary"),
        (("ORIGINAL", "PRIMARY", "OTHER"), None, "unknown"),
        ((), None, "unknown"),
        (("ORIGINAL", "PRIMARY", "M"), "REAL", "real"),
    ],
)
def test_component__from_image_type_or_stated(image_type: tuple[str, ...], stated: str | None, expected: str) -> None:
    assert component(image_type, stated) == expected


def test_component__in_the_facts(tmp_path: Path) -> None:
    array, affine = oblique_volume()
    files = write_dicom_series(tmp_path, array, affine, extra={"ImageType": ["ORIGINAL", "PRIMARY", "P", "ND"]})
    assert MRI().read(files, series_id=SERIES).meta.facts == {"component": "phase"}
