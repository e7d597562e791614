"""One volume through every reader, and through MONAI's: equal voxels, equal affines."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from medssl.domains.mri import MRI
from medssl.domains.volume_files import read_volume
from tests.synthetic import SPACING_MM, oblique_volume, reorient, write_dicom_series, write_itk, write_nifti

AXES = ("RAS", "LPS", "PIR", "SLA", "IRP")
FORMATS = ("volume.nii", "volume.nii.gz", "volume.nrrd", "volume.nhdr", "volume.mha", "volume.mhd", "dicom")
# NIfTI stores the affine in float32, MetaImage in decimal text.
AFFINE_ATOL = 1e-5


def write(folder: Path, form: str, array: np.ndarray, affine: np.ndarray) -> list[Path]:
    if form == "dicom":
        return write_dicom_series(folder / "dicom", array, affine)
    writer = write_nifti if ".nii" in form else write_itk
    return [writer(folder / form, array, affine)]


def monai_load(path: Path, reader: str) -> tuple[np.ndarray, np.ndarray]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from monai.transforms import LoadImage, Orientation

        image = Orientation(axcodes="RAS")(LoadImage(reader=reader, ensure_channel_first=True)(path))
    return np.asarray(image), np.asarray(image.affine)


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("form", FORMATS)
def test_oblique_volume__same_voxels_and_affine_in_every_format(tmp_path: Path, form: str, axes: str) -> None:
    array, affine = oblique_volume()
    raw = read_volume(write(tmp_path, form, *reorient(array, affine, axes)))
    np.testing.assert_array_equal(raw.array, array)
    np.testing.assert_allclose(raw.affine, affine, atol=AFFINE_ATOL)
    np.testing.assert_allclose(raw.spacing_mm, SPACING_MM, rtol=1e-6)
    assert raw.array.dtype == np.int16
    # Slices lie along the coarse axis, except that DICOM says itself which one is its last.
    assert raw.slice_axis == ("RAS".index({"L": "R", "P": "A", "I": "S"}.get(axes[2], axes[2])) if form == "dicom" else 2)


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize(("form", "reader"), [("volume.nii.gz", "NibabelReader"), ("dicom", "PydicomReader")])
def test_oblique_volume__equals_monai_loading(tmp_path: Path, form: str, reader: str, axes: str) -> None:
    array, affine = oblique_volume()
    files = write(tmp_path, form, *reorient(array, affine, axes))
    theirs, their_affine = monai_load(files[0].parent if form == "dicom" else files[0], reader)
    sample = MRI().read(files, series_id="0" * 32)
    np.testing.assert_array_equal(sample.image.astype(np.float32), theirs)
    np.testing.assert_allclose(sample.affine, their_affine, atol=AFFINE_ATOL)


def test_nrrd__orientation_follows_the_space_field(tmp_path: Path) -> None:
    """ITK writes LPS; a RAS header describes the same world with other signs. MONAI leaves non-LPS headers unchanged."""
    array, affine = oblique_volume()
    directions = " ".join(f"({','.join(repr(float(v)) for v in affine[:3, k])})" for k in range(3))
    header = (
        f"NRRD0004\ntype: int16\ndimension: 3\nspace: right-anterior-superior\nsizes: {' '.join(map(str, array.shape))}\n"
        f"space directions: {directions}\nkinds: domain domain domain\nendian: little\nencoding: raw\n"
        f"space origin: ({','.join(repr(float(v)) for v in affine[:3, 3])})\n\n"
    )
    path = tmp_path / "ras.nrrd"
    path.write_bytes(header.encode() + array.tobytes(order="F"))
    raw = read_volume([path])
    np.testing.assert_array_equal(raw.array, array)
    np.testing.assert_allclose(raw.affine, affine, atol=1e-9)


def test_ten_orientations_of_one_brain__same_anatomy(shared_data: Path) -> None:
    files = sorted((shared_data / "nifti_orientations").glob("*.nii.gz"))
    assert len(files) == 10
    base = read_volume([shared_data / "nifti_orientations" / "RAS.nii.gz"])
    for path in files:
        raw = read_volume([path])
        np.testing.assert_array_equal(raw.array, base.array)
        np.testing.assert_allclose(raw.affine, base.affine, atol=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        "msd_hippocampus/images/hippocampus_001.nii.gz",
        "ct_mr_totalseg_examples/example_mr_sm.nii.gz",
        "nifti_orientations/PIR.nii.gz",
        "nifti_misc/strokez.nii.gz",
    ],
)
def test_real_nifti__equals_monai_loading(shared_data: Path, name: str) -> None:
    theirs, their_affine = monai_load(shared_data / name, "NibabelReader")
    raw = read_volume([shared_data / name])
    np.testing.assert_array_equal(raw.array.astype(np.float32), theirs[0])
    np.testing.assert_allclose(raw.affine, their_affine, atol=1e-5)


def test_real_dicom__equals_simpleitk(shared_data: Path) -> None:
    """MONAI cannot be asked: pydicom's JSON form, which its reader goes through, drops decimal strings over 16 characters."""
    import SimpleITK as sitk

    files = sorted((shared_data / "mr_dicom_t1_studyforrest").glob("*.dcm"))
    image = sitk.ReadImage([str(path) for path in files])
    raw = read_volume(files[::-1])
    np.testing.assert_array_equal(raw.array, sitk.GetArrayFromImage(image).transpose(2, 1, 0)[::-1, ::-1])
    last = image.GetSize()[0] - 1, image.GetSize()[1] - 1, 0
    corner = np.array(image.TransformIndexToPhysicalPoint(last)) * [-1, -1, 1]
    np.testing.assert_allclose(raw.affine[:3, 3], corner, atol=1e-3)
    np.testing.assert_allclose(raw.spacing_mm, image.GetSpacing(), rtol=1e-6)


@pytest.mark.parametrize("name", ["breast1_image", "prostate_phantom_subvolume"])
def test_real_nrrd__equals_simpleitk(shared_data: Path, name: str) -> None:
    import SimpleITK as sitk

    path = shared_data / "nrrd_pyradiomics" / f"{name}.nrrd"
    image = sitk.DICOMOrient(sitk.ReadImage(str(path)), "LPS")
    raw = read_volume([path])
    # LPS to RAS reverses the first two axes.
    np.testing.assert_array_equal(raw.array, sitk.GetArrayFromImage(image).transpose(2, 1, 0)[::-1, ::-1])
    np.testing.assert_allclose(raw.spacing_mm, image.GetSpacing())
    centre = np.array([3, 5, 2])
    size = np.array(image.GetSize())
    world = image.TransformIndexToPhysicalPoint([int(size[0] - 1 - 3), int(size[1] - 1 - 5), 2])
    np.testing.assert_allclose((raw.affine @ [*centre, 1])[:3], np.array(world) * [-1, -1, 1], atol=1e-5)
