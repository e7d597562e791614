"""Parts of files: volumes of four-dimensional files, frames of multi-frame DICOM, mosaics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medssl.archive.headers.dicom_header import read_header
from medssl.archive.headers.dicom_series import split_series
from medssl.archive.headers.multiframe import describe_multiframe
from medssl.domains.ct import CT
from medssl.domains.mri import MRI
from medssl.domains.volume_files import read_volume
from medssl.errors import ImageError
from tests.synthetic import oblique_volume, plain_affine, reorient, write_nifti
from tests.synthetic_multiframe import Writer, write_enhanced

SERIES = "ab" * 16


def four() -> tuple[np.ndarray, np.ndarray]:
    """Return three different volumes (X, Y, Z, 3) on one oblique grid."""
    parts = [oblique_volume(seed=seed)[0] for seed in range(3)]
    return np.stack(parts, axis=-1), oblique_volume()[1]


@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz"])
def test_nifti__the_kth_volume(tmp_path: Path, name: str) -> None:
    array, affine = four()
    path = write_nifti(tmp_path / name, array, affine, slope=2.0, intercept=-1.0)
    for k in range(3):
        raw = read_volume([path], {"volume": k})
        np.testing.assert_array_equal(raw.array, array[..., k] * 2 - 1)
    with pytest.raises(ImageError, match="volume 3 of a file of 3") as info:
        read_volume([path], {"volume": 3})
    assert info.value.reason == "not_3d"
    with pytest.raises(ImageError, match="20x26x14x3; one 3D volume is needed"):
        read_volume([path])
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(ImageError, match=r"promises|ends"):
        read_volume([path], {"volume": 2})


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("name", ["v.nrrd", "v.nhdr", "v.mha", "v.mhd"])
def test_itk_formats__the_kth_volume(tmp_path: Path, name: str, compress: bool) -> None:
    import SimpleITK as sitk

    array, affine = four()
    one = sitk.GetImageFromArray(np.ascontiguousarray(array[..., 0].transpose(2, 1, 0)))
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    images = []
    for k in range(3):
        one = sitk.GetImageFromArray(np.ascontiguousarray(array[..., k].transpose(2, 1, 0)))
        one.SetSpacing(spacing.tolist())
        one.SetOrigin(lps[:3, 3].tolist())
        one.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
        images.append(one)
    sitk.WriteImage(sitk.JoinSeries(images, 0.0, 2.5), str(tmp_path / name), compress)
    for k in range(3):
        raw = read_volume([tmp_path / name], {"volume": k})
        np.testing.assert_array_equal(raw.array, array[..., k])
        np.testing.assert_allclose(raw.affine, affine, atol=1e-5)
    with pytest.raises(ImageError, match="volume 4 of a file of 3"):
        read_volume([tmp_path / name], {"volume": 4})


def test_nrrd_with_the_list_first__the_kth_volume(tmp_path: Path) -> None:
    """As diffusion NRRD is written: the list axis varies fastest."""
    array, affine = four()
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    vectors = " ".join("(" + ",".join(f"{v:.17g}" for v in lps[:3, i]) + ")" for i in range(3))
    origin = "(" + ",".join(f"{v:.17g}" for v in lps[:3, 3]) + ")"
    text = (
        "NRRD0005\ntype: int16\ndimension: 4\nspace: left-posterior-superior\nsizes: 3 20 26 14\n"
        f"space directions: none {vectors}\nkinds: list domain domain domain\nendian: little\nencoding: raw\n"
        f"space origin: {origin}\n\n"
    )
    data = np.ascontiguousarray(array.transpose(2, 1, 0, 3)).tobytes()  # z, y, x, list
    (tmp_path / "d.nrrd").write_bytes(text.encode() + data)
    for k in range(3):
        raw = read_volume([tmp_path / "d.nrrd"], {"volume": k})
        np.testing.assert_array_equal(raw.array, array[..., k])
        np.testing.assert_allclose(raw.affine, affine, atol=1e-6)


def test_four_dimensions_without_spacing__refused(tmp_path: Path) -> None:
    array, _ = four()
    text = "ObjectType = Image\nNDims = 4\nDimSize = 20 26 14 3\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    (tmp_path / "v.mha").write_bytes(text.encode() + array.tobytes(order="F"))
    with pytest.raises(ImageError) as info:
        read_volume([tmp_path / "v.mha"], {"volume": 1})
    assert info.value.reason == "no_spacing"


def test_pcasl__every_volume_as_nibabel(shared_data: Path) -> None:
    import nibabel as nib

    (path,) = (shared_data / "nifti_misc").glob("*pcasl*")
    theirs = nib.as_closest_canonical(nib.load(path))
    data = np.asarray(theirs.dataobj)
    assert data.shape == (52, 68, 20, 10)
    for k in range(10):
        sample = MRI().read([path], series_id=SERIES, part={"volume": k})
        np.testing.assert_array_equal(sample.image[0], data[..., k])
        np.testing.assert_allclose(sample.affine, theirs.affine, atol=1e-5)


def test_ct_perfusion__colour_has_a_clear_reason(shared_data: Path) -> None:
    (path,) = (shared_data / "nifti_misc").glob("*ct_perfusion*")
    for part in (None, {"volume": 0}):
        with pytest.raises(ImageError, match="colour or vector voxels") as info:
            read_volume([path], part)
        assert info.value.reason == "not_scalar"


def test_ten_orientations__one_volume(shared_data: Path) -> None:
    import nibabel as nib

    paths = sorted(path for path in (shared_data / "nifti_orientations").iterdir() if ".nii" in path.name)
    assert len(paths) == 10
    first = read_volume([paths[0]])
    for path in paths:
        raw = read_volume([path])
        np.testing.assert_array_equal(raw.array, first.array)
        np.testing.assert_allclose(raw.affine, first.affine, atol=1e-4)
        theirs = nib.as_closest_canonical(nib.load(path))
        np.testing.assert_array_equal(raw.array, np.asarray(theirs.dataobj).astype(np.float32))


def frames_of(array: np.ndarray) -> np.ndarray:
    """Return (Z, rows, columns) from (X, Y, Z)."""
    return np.ascontiguousarray(array.transpose(2, 1, 0))


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"])
def test_enhanced__volumes_of_one_file(tmp_path: Path, syntax: str) -> None:
    array, affine = reorient(*four(), "LPS")
    frames = np.concatenate([frames_of(array[..., k])[::-1] for k in range(3)])
    n = array.shape[2]

    def extra(w: Writer, k: int) -> bytes:
        return w.sequence(0x00209111, [w.element(0x00209128, "UL", k // n + 1)])

    path = write_enhanced(tmp_path / "e.dcm", frames, affine, [*range(n - 1, -1, -1)] * 3, syntax=syntax, extra=extra)
    parts = describe_multiframe(path)
    assert len(parts) == 3
    for k, part in enumerate(parts):
        sample = MRI().read([path], series_id=SERIES, part={"frames": part["frames"]})
        np.testing.assert_array_equal(sample.image[0], oblique_volume(seed=k)[0])
        np.testing.assert_allclose(sample.affine, four()[1], atol=1e-6)
        assert sample.meta.facts == {"component": "magnitude"}
    with pytest.raises(ImageError, match="3 volumes in one file"):
        read_volume([path])
    with pytest.raises(ImageError, match="frames beyond the last one"):
        read_volume([path], {"frames": [[0, 100]]})


def test_enhanced_ct__hu_by_frame(tmp_path: Path) -> None:
    array, affine = reorient(*oblique_volume(), "LPS")
    frames = frames_of(array).astype(np.uint16)
    path = write_enhanced(
        tmp_path / "ct.dcm",
        frames,
        affine,
        range(array.shape[2]),
        modality="CT",
        rescale=lambda k: (1.0, -1000.0 - k),
        frame_type=("ORIGINAL", "PRIMARY", "VOLUME", "NONE"),
    )
    sample = CT().read([path], series_id=SERIES)
    np.testing.assert_array_equal(sample.image[0], oblique_volume()[0] - 1000 - np.arange(array.shape[2]))
    assert sample.meta.units == "HU" and sample.image.dtype == np.int16
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ImageError) as info:
        CT().read([path], series_id=SERIES)
    assert info.value.reason == "truncated"


def test_compressed_frames__only_the_ones_needed(tmp_path: Path) -> None:
    """RLE by pydicom; the frames of the other volume are rubbish that no decoder would take."""
    from pydicom.encaps import encapsulate
    from pydicom.pixels.encoders import RLELosslessEncoder

    array, affine = reorient(*oblique_volume(), "LPS")
    frames = frames_of(array).astype(np.uint16)
    n = len(frames)
    options = {
        "rows": frames.shape[1],
        "columns": frames.shape[2],
        "samples_per_pixel": 1,
        "bits_allocated": 16,
        "bits_stored": 16,
        "pixel_representation": 0,
        "photometric_interpretation": "MONOCHROME2",
        "number_of_frames": 1,
    }
    encoded = [RLELosslessEncoder.encode(frame, encoding_plugin="pydicom", **options) for frame in frames]

    def extra(w: Writer, k: int) -> bytes:
        return w.sequence(0x00209111, [w.element(0x00209128, "UL", k // n + 1)])

    for has_bot in (True, False):
        data = encapsulate([*encoded, *[b"rubbish!"] * n], has_bot=has_bot)
        end = b"\xfe\xff\xdd\xe0\0\0\0\0"
        path = write_enhanced(
            tmp_path / "rle.dcm",
            np.concatenate([frames, frames]),
            affine,
            [*range(n)] * 2,
            syntax="1.2.840.10008.1.2.5",
            extra=extra,
            pixel_data=data + end,
        )
        first, second = describe_multiframe(path)
        raw = read_volume([path], {"frames": first["frames"]})
        np.testing.assert_array_equal(raw.array, oblique_volume()[0])
        with pytest.raises(ImageError, match="could not be decoded"):
            read_volume([path], {"frames": second["frames"]})


@pytest.mark.filterwarnings("ignore")
def test_real_mosaics__voxels_and_affine_as_nibabel(shared_data: Path) -> None:
    import nibabel as nib
    from nibabel.nicom.dicomwrappers import wrapper_from_file

    for path in sorted((shared_data / "mr_dicom_nih" / "20180918Si").rglob("*.dcm")):
        theirs = wrapper_from_file(str(path))
        image = nib.Nifti1Image(theirs.get_data(), np.diag([-1.0, -1, 1, 1]) @ theirs.affine)
        canonical = nib.as_closest_canonical(image)
        sample = MRI().read([path], series_id=SERIES)
        assert sample.image.shape == (1, 72, 72, 5) and sample.spacing_mm == (3.0, 3.0, 12.0)
        np.testing.assert_array_equal(sample.image[0], np.asarray(canonical.dataobj))
        np.testing.assert_allclose(sample.affine, canonical.affine, atol=1e-6)
        assert sample.meta.facts == {"component": "magnitude"}
    folder = shared_data / "mr_dicom_nih" / "20180918Si" / "mr_0003"
    with pytest.raises(ImageError, match="2 mosaics are as many volumes"):
        read_volume(sorted(folder.glob("*.dcm")))


def test_real_fmri__first_and_last_volume_as_simpleitk(shared_data: Path) -> None:
    import SimpleITK as sitk

    paths = sorted((shared_data / "mr_dicom_nih" / "20180918GE" / "mr_0004").glob("*.dcm"))
    groups = split_series([read_header(path) for path in paths])
    for k in (0, 9):
        members = [str(paths[i]) for i in groups[k].indices]
        image = sitk.DICOMOrient(sitk.ReadImage(members), "LPS")
        raw = read_volume([Path(name) for name in members[::-1]])
        np.testing.assert_array_equal(raw.array, sitk.GetArrayFromImage(image).transpose(2, 1, 0)[::-1, ::-1])
        assert raw.spacing_mm == pytest.approx(image.GetSpacing(), abs=1e-4)


def test_real_enhanced_mr__as_simpleitk(shared_data: Path) -> None:
    import SimpleITK as sitk

    path = shared_data / "dicom_multiframe" / "mr_brain_sagittal_8frames.dcm"
    sample = MRI().read([path], series_id=SERIES)
    image = sitk.DICOMOrient(sitk.ReadImage(str(path)), "LPS")
    np.testing.assert_array_equal(sample.image[0], sitk.GetArrayFromImage(image).transpose(2, 1, 0)[::-1, ::-1])
    assert sample.spacing_mm == pytest.approx(image.GetSpacing(), abs=1e-9) == (1.2999957142857144, 1.0, 1.0)
    far = image.TransformIndexToPhysicalPoint([n - 1 if i < 2 else 0 for i, n in enumerate(image.GetSize())])
    np.testing.assert_allclose(sample.affine[:3, 3], [-far[0], -far[1], far[2]], atol=1e-6)


def test_real_enhanced_ct__every_compression_as_simpleitk(shared_data: Path) -> None:
    """One image of two frames in nine encodings, fragmented or not, with and without offset table."""
    import SimpleITK as sitk

    paths = sorted((shared_data / "dicom_odd" / "dicomparser").glob("CT0012*.dcm"))
    assert len(paths) == 9
    compared = 0
    for path in paths:
        raw = read_volume([path])
        try:
            image = sitk.DICOMOrient(sitk.ReadImage(str(path)), "LPS")
        except RuntimeError:  # GDCM gives up on fragmented JPEG-LS
            continue
        theirs = sitk.GetArrayFromImage(image).transpose(2, 1, 0)[::-1, ::-1]
        np.testing.assert_array_equal(raw.array, theirs, err_msg=path.name)
        compared += 1
    assert compared >= 6


def test_plain_affine_frames__one_group(tmp_path: Path) -> None:
    """A multi-frame file of one volume needs no part."""
    array = np.random.default_rng(0).integers(0, 900, (6, 5, 4)).astype(np.int16)
    path = write_enhanced(tmp_path / "e.dcm", frames_of(array), np.diag([-1.0, -1, 1, 1]) @ plain_affine((1, 1, 3)), range(4))
    np.testing.assert_array_equal(read_volume([path]).array, array[::-1, ::-1])
