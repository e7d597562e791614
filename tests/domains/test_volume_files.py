"""Values, dtypes, flags and refusals of the volume reader."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medssl.archive.headers.decoders import decoders
from medssl.domains.ct import CT
from medssl.domains.mri import MRI
from medssl.domains.volume_files import read_label, read_volume
from medssl.errors import GeometryError, ImageError
from tests.cost import times_as_long
from tests.synthetic import (
    SYNTAXES,
    oblique_affine,
    oblique_volume,
    plain_affine,
    reorient,
    write_dicom_series,
    write_itk,
    write_nifti,
)

SERIES = "ab" * 16


def reason_of(files: list[Path]) -> str:
    with pytest.raises(ImageError) as info:
        read_volume(files)
    return info.value.reason


@pytest.mark.parametrize("syntax", sorted(SYNTAXES))
def test_dicom_syntaxes__same_voxels(tmp_path: Path, syntax: str) -> None:
    array, affine = reorient(*oblique_volume(), "LPS")
    raw = read_volume(write_dicom_series(tmp_path / "s", array, affine, syntax=syntax))
    np.testing.assert_array_equal(raw.array, oblique_volume()[0])


@pytest.mark.parametrize(
    ("dtype", "slope", "intercept", "expected"),
    [
        ("int16", 1, 0, "int16"),
        ("uint16", 1, -1024, "int16"),
        ("int16", 2, -3, "int16"),
        ("int16", 0.5, 0, "float32"),
        ("int16", 300, 0, "float32"),
        ("uint8", 1, 0, "uint8"),
    ],
)
@pytest.mark.parametrize("form", ["nifti", "dicom"])
def test_rescale__exact_in_the_narrowest_dtype(
    tmp_path: Path, form: str, dtype: str, slope: float, intercept: float, expected: str
) -> None:
    array, affine = oblique_volume()
    array = (array // 2).astype(dtype) if dtype == "uint8" else array.astype(dtype)
    if form == "nifti":
        files = [write_nifti(tmp_path / "v.nii", array, affine, slope=slope, intercept=intercept)]
    else:
        files = write_dicom_series(tmp_path / "d", array, affine, slope=slope, intercept=intercept)
    raw = read_volume(files)
    np.testing.assert_array_equal(raw.array.astype(np.float64), array.astype(np.float64) * slope + intercept)
    assert raw.array.dtype == np.dtype(expected)
    assert raw.flags == ()


@pytest.mark.parametrize("stored", ["int32", "int64", "float32", "float64", "uint16"])
def test_wide_dtypes__narrowed_when_lossless(tmp_path: Path, stored: str) -> None:
    array, affine = oblique_volume()
    raw = read_volume([write_nifti(tmp_path / "v.nii.gz", array.astype(stored), affine)])
    assert raw.array.dtype == np.int16
    np.testing.assert_array_equal(raw.array, array)


def test_float64__rounded_to_float32_with_a_flag(tmp_path: Path) -> None:
    array, affine = oblique_volume()
    values = array + np.pi
    raw = read_volume([write_nifti(tmp_path / "v.nii", values, affine)])
    np.testing.assert_array_equal(raw.array, values.astype(np.float32))
    assert raw.flags == ("float32_rounded",)


def test_late_wide_value__earlier_slabs_survive_the_change_of_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medssl.domains.volume_stack.SLAB_BYTES", 1)
    array = np.zeros((4, 5, 6), dtype=np.float32)
    array[1, 2] = [1, 200, -300, 0.25, 5, 6]
    raw = read_volume([write_nifti(tmp_path / "v.nii", array, plain_affine())])
    np.testing.assert_array_equal(raw.array, array)
    assert raw.array.dtype == np.float32


def test_nan_voxels__flagged_excluded_and_zero(tmp_path: Path) -> None:
    array, affine = oblique_volume()
    values = array.astype(np.float32)
    values[3, 4, 5], values[0, 0, 0] = np.nan, np.inf
    files = [write_nifti(tmp_path / "v.nii.gz", values, affine)]
    raw = read_volume(files)
    assert raw.flags == ("nan_voxels",)
    assert raw.valid is not None and np.count_nonzero(~raw.valid) == 2 and not raw.valid[3, 4, 5]
    assert raw.array[3, 4, 5] == 0
    np.testing.assert_array_equal(raw.array[raw.valid], array[raw.valid])
    sample = MRI().read(files, series_id=SERIES)
    assert all(np.isfinite(value) for value in sample.meta.stats.values())


def test_bits_stored__higher_bits_are_masked(tmp_path: Path) -> None:
    array, affine = reorient(*oblique_volume(), "LPS")
    dirty = (array.astype(np.uint16) & 0x0FFF) | 0xA000
    raw = read_volume(write_dicom_series(tmp_path / "u", dirty, affine, bits_stored=12))
    np.testing.assert_array_equal(raw.array, oblique_volume()[0])
    signed = ((array - 200).astype(np.int16).view(np.uint16) & 0x0FFF).view(np.int16)
    raw = read_volume(write_dicom_series(tmp_path / "s", signed, affine, bits_stored=12))
    np.testing.assert_array_equal(raw.array, oblique_volume()[0] - 200)


def test_padding__excluded_and_air_in_ct(tmp_path: Path) -> None:
    array, affine = reorient(*oblique_volume(), "LPS")
    array = array - 100
    array[:2] = -2000
    files = write_dicom_series(tmp_path / "p", array, affine, modality="CT", extra={"PixelPaddingValue": -2000})
    sample = CT().read(files, series_id=SERIES)
    expected = oblique_volume()[0] - 100
    assert sample.valid is not None
    assert not sample.valid[-2:].any() and sample.valid[:-2].all()
    np.testing.assert_array_equal(sample.image[0, :-2], expected[:-2])
    assert (sample.image[0, -2:] == -1024).all()
    assert sample.meta.flags == ("padding",)
    assert sample.meta.stats["min"] >= -500


def test_slope_per_slice__applied_per_slice(tmp_path: Path) -> None:
    array, affine = oblique_volume()
    slopes = np.linspace(0.5, 2, array.shape[2])
    raw = read_volume(write_dicom_series(tmp_path / "d", array, affine, slope=[float(f"{s:.6g}") for s in slopes]))
    expected = array * np.array([float(f"{s:.6g}") for s in slopes])
    np.testing.assert_array_equal(raw.array, expected.astype(np.float32))


def test_nifti_in_metres__converted_to_mm(tmp_path: Path) -> None:
    import nibabel as nib

    array, affine = oblique_volume()
    scaled = np.diag([1e-3, 1e-3, 1e-3, 1]) @ affine
    image = nib.Nifti1Image(array, scaled)
    image.header.set_xyzt_units("meter")
    nib.save(image, tmp_path / "v.nii")
    raw = read_volume([tmp_path / "v.nii"])
    np.testing.assert_allclose(raw.affine, affine, rtol=1e-5, atol=1e-4)
    assert raw.flags == ("units_converted",)


def test_nifti2_and_big_endian__read(tmp_path: Path) -> None:
    import nibabel as nib

    array, affine = oblique_volume()
    nib.save(nib.Nifti2Image(array, affine), tmp_path / "two.nii.gz")
    np.testing.assert_array_equal(read_volume([tmp_path / "two.nii.gz"]).array, array)
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(np.dtype(">i2"))
    nib.save(nib.Nifti1Image(array.astype(">i2"), affine, header), tmp_path / "big.nii")
    np.testing.assert_array_equal(read_volume([tmp_path / "big.nii"]).array, array)


def test_trailing_axis_of_one__is_a_volume(tmp_path: Path) -> None:
    array, affine = oblique_volume()
    raw = read_volume([write_nifti(tmp_path / "v.nii", array[..., None], affine)])
    np.testing.assert_array_equal(raw.array, array)


def test_refusals__reasons(tmp_path: Path) -> None:
    array, affine = oblique_volume()
    four = np.stack([array, array + 1], axis=-1)
    assert reason_of([write_nifti(tmp_path / "4d.nii.gz", four, affine)]) == "not_3d"
    assert reason_of([write_nifti(tmp_path / "c.nii.gz", np.full_like(array, 7), affine)]) == "constant"
    assert reason_of([write_nifti(tmp_path / "nan.nii", np.full(array.shape, np.nan, np.float32), affine)]) == "no_finite_voxels"
    shear = affine.copy()
    shear[:3, 2] += 0.1 * shear[:3, 1] / np.linalg.norm(shear[:3, 1]) * 2.5
    assert reason_of([write_nifti(tmp_path / "s.nii", array, shear)]) == "bad_orientation"
    cut = tmp_path / "cut.nii"
    cut.write_bytes(write_nifti(tmp_path / "v.nii", array, affine).read_bytes()[:-100])
    assert reason_of([cut]) == "truncated"
    zipped = write_nifti(tmp_path / "v.nii.gz", array, affine).read_bytes()
    cut = tmp_path / "cut.nii.gz"
    cut.write_bytes(zipped[: len(zipped) * 2 // 3])
    assert reason_of([cut]) == "truncated"
    text = tmp_path / "text.nii"
    text.write_text("no image here")
    assert reason_of([text]) == "not_image"
    (tmp_path / "none.nii").write_bytes(b"")
    assert reason_of([tmp_path / "none.nii"]) == "empty"
    assert reason_of([tmp_path / "absent.nii"]) == "vanished"


def test_missing_spacing__refused_and_never_taken_for_one(tmp_path: Path) -> None:
    array, _ = oblique_volume()
    data = bytearray(write_nifti(tmp_path / "v.nii", array, plain_affine()).read_bytes())
    data[252:256] = b"\0" * 4  # qform and sform codes
    data[80:92] = b"\0" * 12  # pixdim 1 to 3
    (tmp_path / "v.nii").write_bytes(bytes(data))
    assert reason_of([tmp_path / "v.nii"]) == "no_spacing"
    header = "NRRD0004\ntype: int16\ndimension: 3\nsizes: 20 26 14\nendian: little\nencoding: raw\n\n"
    (tmp_path / "v.nrrd").write_bytes(header.encode() + array.tobytes(order="F"))
    assert reason_of([tmp_path / "v.nrrd"]) == "no_spacing"
    text = "ObjectType = Image\nNDims = 3\nDimSize = 20 26 14\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    (tmp_path / "v.mha").write_bytes(text.encode() + array.tobytes(order="F"))
    assert reason_of([tmp_path / "v.mha"]) == "no_spacing"
    files = write_dicom_series(tmp_path / "d", array, oblique_affine())
    import pydicom

    for path in files:
        ds = pydicom.dcmread(path)
        del ds.PixelSpacing
        ds.save_as(path)
    assert reason_of(files) == "no_spacing"


def slices_moved(tmp_path: Path, offsets: dict[int, list[float]]) -> list[Path]:
    array, affine = oblique_volume()
    files = write_dicom_series(tmp_path / "moved", array, affine)
    import pydicom

    for k, offset in offsets.items():
        ds = pydicom.dcmread(files[k])
        ds.ImagePositionPatient = [f"{float(p) + o:.6f}" for p, o in zip(ds.ImagePositionPatient, offset)]
        ds.save_as(files[k])
    return files


def test_dicom_geometry__refused_by_name(tmp_path: Path) -> None:
    array, affine = oblique_volume()
    normal = (affine[:3, 2] / np.linalg.norm(affine[:3, 2])) * [-1, -1, 1]
    files = slices_moved(tmp_path / "gap", {5: list(normal)})
    assert reason_of(files) == "irregular_slices"
    # Three of fourteen slices missing at once are too many to fill.
    assert reason_of(files[:4] + files[7:]) == "irregular_slices"
    files = slices_moved(tmp_path / "same", {5: list(-2.5 * normal)})
    assert reason_of(files) == "collision"
    tilted = affine.copy()
    tilted[:3, 2] += 1.2 * np.linalg.norm(affine[:3, 2]) * affine[:3, 1] / np.linalg.norm(affine[:3, 1])
    assert reason_of(write_dicom_series(tmp_path / "tilt", array, tilted)) == "gantry_tilt"
    files = write_dicom_series(tmp_path / "one", array[..., :1], affine)
    assert reason_of(files) == "single_slice"
    other = write_dicom_series(tmp_path / "other", array[:-1], affine, uid_seed="other")
    with pytest.raises(GeometryError, match="index the folder to split it"):
        read_volume([*write_dicom_series(tmp_path / "mix", array, affine), *other])


def test_cut_slice__truncated(tmp_path: Path) -> None:
    array, affine = oblique_volume()
    files = write_dicom_series(tmp_path / "d", array, affine)
    files[3].write_bytes(files[3].read_bytes()[:-20])
    assert reason_of(files) == "truncated"


def test_covid_ct__jpeg_lossless_in_slice_order(shared_data: Path) -> None:
    """JPEG Lossless has no free pydicom plug-in. File names are not in slice order."""
    import csv

    folder = shared_data / "ct_covid_ct_md"
    files = sorted((folder / "P002").iterdir())
    assert "itk" in decoders("1.2.840.10008.1.2.4.70")
    sample = CT().read(files, series_id=SERIES)
    assert sample.image.shape == (1, 512, 512, 28) and sample.image.dtype == np.int16
    assert sample.meta.units == "HU" and sample.image.min() == -1024
    np.testing.assert_allclose(sample.spacing_mm, (0.603515625, 0.603515625, 2.0))
    with open(folder / "slices.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    column = next(name for name in rows[0] if "z" in name.lower())
    positions = sorted(float(row[column]) for row in rows)
    np.testing.assert_allclose(sample.affine[2, 3], positions[0], atol=0.01)
    import SimpleITK as sitk

    by_z: dict[float, Any] = {}
    for path in files:
        image = sitk.ReadImage(str(path))
        by_z[round(image.GetOrigin()[2], 2)] = sitk.GetArrayFromImage(image)[0]
    stack = np.stack([by_z[z] for z in sorted(by_z)], axis=-1)  # (row, column, z) in LPS
    np.testing.assert_array_equal(sample.image[0], stack.transpose(1, 0, 2)[::-1, ::-1])


def test_ct__refuses_what_is_not_hu(tmp_path: Path) -> None:
    array, affine = oblique_volume()
    path = write_nifti(tmp_path / "v.nii", array, affine)
    with pytest.raises(ImageError, match="no value is below zero") as info:
        CT().read([path], series_id=SERIES)
    assert info.value.reason == "not_hu"
    shifted = write_nifti(tmp_path / "hu.nii", array - 1000, affine)
    assert CT().read([shifted], series_id=SERIES).meta.flags == ("hu_assumed",)
    files = write_dicom_series(tmp_path / "us", array - 200, affine, modality="CT", extra={"RescaleType": "US"})
    with pytest.raises(ImageError, match="rescale type other than HU"):
        CT().read(files, series_id=SERIES)
    files = write_dicom_series(tmp_path / "mr", array, affine)
    with pytest.raises(ImageError, match="not a CT"):
        CT().read(files, series_id=SERIES)
    files = write_dicom_series(tmp_path / "ct", array - 200, affine, modality="CT")
    assert CT().read(files, series_id=SERIES).meta.flags == ()
    with pytest.raises(ImageError, match="which takes MR"):
        MRI().read(files, series_id=SERIES)


def test_label__read_on_its_image_and_refused_on_another_grid(tmp_path: Path) -> None:
    array, affine = oblique_volume()
    image = read_volume([write_nifti(tmp_path / "i.nii", *reorient(array, affine, "LPS"))])
    label = (array > 150).astype(np.uint8) + (array > 320)
    for axes in ("RAS", "PIR"):
        path = write_nifti(tmp_path / f"{axes}.nii.gz", *reorient(label, affine, axes))
        np.testing.assert_array_equal(read_label(path, image), label)
        np.testing.assert_array_equal(read_label(path, (image.affine, (1, *image.array.shape))), label)
    empty = read_label(write_nifti(tmp_path / "e.nii", np.zeros_like(label), affine), image)
    assert empty.dtype == np.uint8 and not empty.any()
    with pytest.raises(GeometryError, match="20x26x13 voxels on an image of 20x26x14"):
        read_label(write_nifti(tmp_path / "short.nii", label[..., :-1], affine), image)
    moved = affine.copy()
    moved[0, 3] += 0.5
    with pytest.raises(GeometryError, match=r"lies up to 0\.50 mm away .* at most 0\.08 mm"):
        read_label(write_nifti(tmp_path / "m.nii", label, moved), image)
    with pytest.raises(ImageError, match="not whole numbers"):
        read_label(write_nifti(tmp_path / "f.nii", label * 0.5, affine), image)


def test_hippocampus_label__on_its_image(shared_data: Path) -> None:
    image = read_volume([shared_data / "msd_hippocampus/images/hippocampus_394.nii.gz"])
    label = read_label(shared_data / "msd_hippocampus/labels/hippocampus_394.nii.gz", image)
    assert np.bincount(label.ravel()).tolist()[1:] == [1987, 1827]  # split.csv


def test_compressed_itk_files__same_voxels(tmp_path: Path) -> None:
    array, affine = oblique_volume()
    for name in ("v.nrrd", "v.mha"):
        np.testing.assert_array_equal(read_volume([write_itk(tmp_path / name, array, affine, compress=True)]).array, array)


def test_gzip_with_two_members__read_whole(tmp_path: Path) -> None:
    """The gzip trailer then states the length of the last member only."""
    array, affine = oblique_volume()
    data = write_nifti(tmp_path / "v.nii", array, affine).read_bytes()
    (tmp_path / "v.nii.gz").write_bytes(gzip.compress(data[:3000]) + gzip.compress(data[3000:]))
    np.testing.assert_array_equal(read_volume([tmp_path / "v.nii.gz"]).array, array)


@pytest.mark.slow
def test_series_reading__no_slower_than_simpleitk(tmp_path: Path) -> None:
    """Bounded loosely; the tight figure comes from a benchmark."""
    import SimpleITK as sitk

    pixels = np.random.default_rng(0).integers(0, 4096, (512, 512, 60)).astype(np.uint16)
    affine = np.diag([-0.7, -0.7, 1.0, 1.0])
    files = write_dicom_series(tmp_path, pixels, affine, modality="CT", intercept=-1024, bits_stored=12, shuffle=False)
    names = [str(path) for path in files]
    raw, image = read_volume(files), sitk.ReadImage(names)
    np.testing.assert_array_equal(raw.array[::-1, ::-1].transpose(2, 1, 0), sitk.GetArrayFromImage(image))
    assert times_as_long(lambda: read_volume(files), lambda: sitk.ReadImage(names), 1.25) < 1.25
