"""Gantry tilt and uneven slices: against a phantom whose truth is known, a plain loop, and SimpleITK."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medssl.archive.headers.dicom_header import read_header
from medssl.archive.headers.dicom_series import slice_geometry, split_series
from medssl.domains.ct import AIR_HU, CT
from medssl.domains.mri import MRI
from medssl.domains.resample import regrid, shift_axis
from medssl.domains.volume_files import read_volume
from medssl.domains.volume_stack import Stack
from medssl.errors import ImageError
from tests.synthetic import LPS, oblique_volume, plain_affine, reorient, rotation, write_dicom_series

SERIES = "ab" * 16


def tilted_affine(tilt_deg: float, spacing: tuple[float, float, float]) -> np.ndarray:
    """Slice planes turned about X by the tilt, slices following each other along Z: a tilted gantry, couch moving straight."""
    turned = rotation((tilt_deg, 0, 0))
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = turned[:, 0] * spacing[0], turned[:, 1] * spacing[1], [0, 0, spacing[2]]
    affine[:3, 3] = (-20.0, -33.0, 7.0)
    return affine


def linear(points: np.ndarray) -> np.ndarray:
    """A field that linear interpolation reproduces exactly."""
    field: np.ndarray = points @ np.array([3.0, -7.0, 5.0]) + 40.0
    return field


def test_tilted_phantom__truth_at_every_valid_voxel(tmp_path: Path) -> None:
    """Values are known in mm; after the correction every valid voxel holds the value of its own place, to the rounding of HU."""
    affine = tilted_affine(18.5, (0.9, 0.7, 4.0))
    grid = np.stack(np.meshgrid(np.arange(18), np.arange(22), np.arange(9), indexing="ij"), axis=-1)
    stored = np.rint(linear(grid @ affine[:3, :3].T + affine[:3, 3])).astype(np.int16)
    files = write_dicom_series(tmp_path, stored, affine, modality="CT")
    sample = CT().read(files, series_id=SERIES)
    assert sample.meta.flags == ("tilt_corrected",)
    assert sample.image.dtype == np.int16 and sample.valid is not None and sample.affine is not None
    edges = sample.affine[:3, :3] / np.linalg.norm(sample.affine[:3, :3], axis=0)
    np.testing.assert_allclose(edges.T @ edges, np.eye(3), atol=1e-9)
    assert sample.spacing_mm == pytest.approx((0.9, 0.7, 4.0 * np.cos(np.deg2rad(18.5))))
    where = np.argwhere(sample.valid)
    expected = linear(where @ sample.affine[:3, :3].T + sample.affine[:3, 3])
    # Stored values were rounded (0.5), and interpolated values are rounded again (0.5).
    assert np.abs(sample.image[0][sample.valid] - expected).max() <= 1.0 + 1e-3
    assert (sample.image[0][~sample.valid] == AIR_HU).all()
    # Nothing is lost but half a pixel at either end: 22 rows give 21 interpolated ones.
    counts = sample.valid.sum(axis=1)
    assert counts.min() == 21 and counts.max() == 22


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_tilt__as_simpleitk_resamples_the_sheared_grid(tmp_path: Path, modality: str) -> None:
    import SimpleITK as sitk

    affine = tilted_affine(-12.0, (0.8, 1.1, 5.0))
    rng = np.random.default_rng(0)
    stored = rng.integers(-1000, 1000, (17, 19, 8)).astype(np.int16)
    raw = read_volume(write_dicom_series(tmp_path, stored, affine, modality=modality))
    assert raw.flags == ("tilt_corrected",) and raw.valid is not None
    # SimpleITK knows orthogonal images only: the slices are stacked along their normal, and the transform shears
    # points of the true grid into that stack.
    lps = LPS @ affine
    edges = np.linalg.norm(lps[:3, :3], axis=0)
    row, column = lps[:3, 0] / edges[0], lps[:3, 1] / edges[1]
    normal = np.cross(row, column)
    step = float(lps[:3, 2] @ normal)
    image = sitk.GetImageFromArray(np.ascontiguousarray(stored.transpose(2, 1, 0)).astype(np.float64))
    image.SetDirection(np.stack([row, column, normal], axis=1).ravel().tolist())
    image.SetSpacing([float(edges[0]), float(edges[1]), step])
    image.SetOrigin(lps[:3, 3].tolist())
    shear = (lps[:3, 2] - step * normal) / step
    transform = sitk.AffineTransform(3)
    transform.SetMatrix((np.eye(3) - np.outer(shear, normal)).ravel().tolist())
    transform.SetTranslation((shear * float(normal @ lps[:3, 3])).tolist())
    target = LPS @ raw.affine
    size = np.linalg.norm(target[:3, :3], axis=0)
    direction = target[:3, :3] / size
    # SimpleITK interpolates at slice centres exactly; points a rounding error outside the stack would be dropped.
    theirs = sitk.Resample(
        image,
        raw.array.shape,
        transform,
        sitk.sitkLinear,
        target[:3, 3].tolist(),
        size.tolist(),
        direction.ravel().tolist(),
        -9999.0,
    )
    expected = sitk.GetArrayFromImage(theirs).transpose(2, 1, 0)
    inside = raw.valid & (expected != -9999.0)
    assert np.count_nonzero(inside) > 0.99 * np.count_nonzero(raw.valid) > 1500
    assert np.abs(raw.array[inside] - expected[inside]).max() <= 0.5 + 1e-3


def test_ge_head__both_blocks_against_simpleitk(shared_data: Path) -> None:
    """Every valid voxel is the linear interpolation of what SimpleITK reads from the slice's own file."""
    import SimpleITK as sitk

    files = sorted((shared_data / "ct_ge_gantry_tilt").glob("*.dcm"))
    with pytest.raises(ImageError, match="slice gaps differ") as info:
        CT().read(files, series_id=SERIES)
    assert info.value.reason == "irregular_slices" and SERIES in str(info.value) and "ct_ge" not in str(info.value)
    for group, depth in zip(split_series([read_header(path) for path in files]), (4.22, 7.38)):
        members = [files[i] for i in group.indices]
        sample = CT().read(members[::-1], series_id=SERIES)
        assert sample.meta.flags[0] == "tilt_corrected" and sample.meta.units == "HU"
        assert sample.spacing_mm is not None and sample.valid is not None and sample.affine is not None
        assert sample.spacing_mm == pytest.approx((0.4882812, 0.4882812, depth * np.cos(np.deg2rad(18.5))), abs=1e-4)
        assert sample.image.shape[1:] == (512, 512 + int(np.ceil(13 * depth * np.sin(np.deg2rad(18.5)) / 0.4882812)), 14)
        for k in (0, 6, 13):
            image = sitk.ReadImage(str(members[k]))
            stored = sitk.GetArrayFromImage(image)[0].astype(float)  # (row, column)
            # Where the rows of our plane lie in the file's own grid, as SimpleITK places it.
            line = np.array([sample.affine @ [0, y, k, 1] for y in range(sample.image.shape[2])]) @ LPS
            place = np.array([image.TransformPhysicalPointToContinuousIndex(point[:3].tolist()) for point in line])
            np.testing.assert_allclose(place[:, 0], 511, atol=1e-3)  # our X runs against the columns
            np.testing.assert_allclose(place[:, 2], 0, atol=1e-3)
            inside = (place[:, 1] >= 0) & (place[:, 1] <= 511)
            low = np.clip(np.floor(place[:, 1]).astype(int), 0, 510)
            part = (place[:, 1] - low)[:, None]
            expected = ((1 - part) * stored[low] + part * stored[low + 1])[:, ::-1].T  # (x, y)
            real = sample.valid[:, :, k]
            assert not real[:, ~inside].any() and np.count_nonzero(real) > 190_000
            assert np.abs(sample.image[0, :, :, k] - expected)[real].max() <= 0.6


def test_missing_slices__invalid_planes_at_their_place(tmp_path: Path) -> None:
    array, affine = oblique_volume((12, 10, 24))
    files = write_dicom_series(tmp_path, array, affine)
    whole = read_volume(files)
    raw = read_volume(files[:9] + files[10:17] + files[18:])
    assert raw.flags == ("gaps_filled",) and raw.valid is not None
    np.testing.assert_allclose(raw.affine, whole.affine, atol=1e-6)
    assert np.flatnonzero(~raw.valid.any(axis=(0, 1))).tolist() == [9, 17]
    assert (raw.array[~raw.valid] == 0).all()
    np.testing.assert_array_equal(raw.array[raw.valid], whole.array[raw.valid])
    sample = MRI().read(files[:9] + files[10:], series_id=SERIES)
    assert not sample.valid[:, :, 9].any() and not MRI().foreground(sample)[:, :, 9].any()


def test_missing_slices__valid_through_reorientation(tmp_path: Path) -> None:
    array, affine = reorient(*oblique_volume((12, 10, 24)), "LPI")
    files = write_dicom_series(tmp_path, array, affine)
    raw = read_volume(files[:5] + files[6:])
    assert raw.valid is not None and np.flatnonzero(~raw.valid.any(axis=(0, 1))).tolist() == [18]
    np.testing.assert_array_equal(raw.array[raw.valid], oblique_volume((12, 10, 24))[0][raw.valid])


def test_uneven_steps__interpolated_as_numpy_does(tmp_path: Path) -> None:
    import pydicom

    rng = np.random.default_rng(2)
    array = rng.integers(0, 1000, (6, 5, 10)).astype(np.int16)
    files = write_dicom_series(tmp_path, array, plain_affine((1.0, 1.0, 2.0)))
    depth = 2.0 * np.arange(10) + np.array([0, *rng.uniform(-0.2, 0.2, 8), 0]).round(3)
    for path, z in zip(files, depth):
        ds = pydicom.dcmread(path)
        ds.ImagePositionPatient = [*ds.ImagePositionPatient[:2], f"{z:.3f}"]
        ds.save_as(path)
    raw = read_volume(files)
    assert raw.flags == ("slices_resampled",) and raw.valid is None
    stored = array[::-1, ::-1] if raw.affine[0, 0] > 0 and LPS[0, 0] * plain_affine()[0, 0] > 0 else array
    expected = np.apply_along_axis(lambda line: np.interp(2.0 * np.arange(10), depth, line), 2, stored)
    assert np.abs(raw.array - expected).max() <= 0.5 + 1e-2


def test_shift_axis__a_plain_loop() -> None:
    rng = np.random.default_rng(3)
    values, valid = rng.normal(size=(7, 4)), rng.random((7, 4)) > 0.2
    for shift in (0.0, 1.0, 0.25, 2.6):
        moved, real = shift_axis(values, valid, shift, 11, 0)
        for j in range(11):
            place = j - shift
            low, part = int(np.floor(place + 1e-9)), place - np.floor(place + 1e-9)
            needed = [low] if part < 1e-6 else [low, low + 1]
            for c in range(4):
                inside = all(0 <= i < 7 and valid[i, c] for i in needed)
                assert real[j, c] == inside
                if inside:
                    expected = values[low, c] if len(needed) == 1 else (1 - part) * values[low, c] + part * values[low + 1, c]
                    assert moved[j, c] == pytest.approx(expected)


def test_regrid__padding_moves_along_and_nothing_to_do_is_free() -> None:
    stack = Stack((3, 4, 5))
    slab = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    invalid = np.zeros(slab.shape, bool)
    invalid[1, 2, 3] = True
    stack.put(0, slab, invalid)
    straight = slice_geometry(np.array([[0, 0, 2.0 * k] for k in range(3)]), [1, 0, 0, 0, 1, 0], [1, 1])
    assert regrid(stack, straight) is stack
    turned = rotation((20.0, 0, 0))
    geometry = slice_geometry(np.array([[0, 0, 5.0 * k] for k in range(3)]), [*turned[:, 0], *turned[:, 1]], [1, 1])
    out = regrid(stack, geometry)
    assert out.valid is not None and geometry.shifts is not None
    shift = geometry.shifts[1, 1]
    touched = {int(np.floor(2 + shift)), int(np.ceil(2 + shift))}
    assert set(np.flatnonzero(~out.valid[1, :, 3]).tolist()) >= touched
    assert out.low == float(out.array[out.valid].min()) and out.high == float(out.array[out.valid].max())
