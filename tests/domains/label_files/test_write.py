"""Maps back in the axes of their image file, and as DICOM-SEG on the slices of their source."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medssl.domains.label_files.base import Grid, placed
from medssl.domains.label_files.dicom_seg import read_dicom_seg
from medssl.domains.label_files.read import frame_of_reference
from medssl.domains.label_files.write import RESEARCH_ONLY, in_file_axes, need_highdicom, write_dicom_seg
from medssl.domains.volume_files import read_volume
from medssl.errors import GeometryError, RequestError
from tests.synthetic import LPS, oblique_affine, oblique_volume, reorient, write_dicom_series, write_itk, write_nifti
from tests.synthetic_labels import frame_uid

PLANTED = {
    "PatientComments": "says the ward",
    "StudyDescription": "free text of a study",
    "ReferringPhysicianName": "Physician^Planted",
    "InstitutionName": "Planted Hospital",
    "SeriesDescription": "free text of a series",
    "OtherPatientIDs": "OTHER123",
    "StudyDate": "20190703",
    "AccessionNumber": "ACC00001",
}


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR", "SAL"])
@pytest.mark.parametrize("suffix", ["nii.gz", "nrrd"])
def test_axes__are_those_of_the_image_file(tmp_path: Path, axes: str, suffix: str) -> None:
    array, affine = oblique_volume()
    stored, own = reorient(array, affine, axes)
    path = tmp_path / f"image.{suffix}"
    (write_nifti if suffix == "nii.gz" else write_itk)(path, stored, own)
    volume = read_volume([path])
    label, found = in_file_axes(volume.array, volume.affine, [path])
    assert np.array_equal(label, stored)
    expected = nibabel.load(path).affine if suffix == "nii.gz" else own
    np.testing.assert_allclose(found, expected, atol=1e-4)


def series(tmp_path: Path, affine: np.ndarray | None = None) -> tuple[Grid, list[Path], np.ndarray, np.ndarray]:
    """Write a DICOM series with texts planted; return its grid, files, and a label in the order of the files and of the grid."""
    array, own = oblique_volume()
    own = own if affine is None else affine
    files = write_dicom_series(tmp_path / "image", array, own, extra=PLANTED)
    volume = read_volume(files)
    x, y, z = volume.array.shape
    grid = Grid(volume.affine, (x, y, z), volume.slice_axis, frame_of_reference(files[0]))
    label = np.where(array > 300, 5, np.where(array > 120, 2, 0)).astype(np.int16)
    return grid, files, label, reorient(label, own, "RAS")[0]


def test_dicom_seg__goes_to_the_slices_it_came_from(tmp_path: Path) -> None:
    pytest.importorskip("highdicom", reason="highdicom is not installed (extra seg)")
    import pydicom

    grid, files, stored, label = series(tmp_path)
    path = tmp_path / "private" / "p.dcm"
    for _ in range(2):
        first = pydicom.dcmread(path).SeriesInstanceUID if path.exists() else None
        write_dicom_seg(path, label, grid, files[::-1], {2: "liver", 5: "tumour", 7: "absent"}, version="1.2")
    ds = pydicom.dcmread(path)
    assert ds.SeriesInstanceUID != first  # fresh
    slices = {pydicom.dcmread(file).SOPInstanceUID: k for k, file in enumerate(files)}
    frames = ds.pixel_array
    seen = np.zeros((3, *stored.shape), bool)
    for frame, groups in zip(frames, ds.PerFrameFunctionalGroupsSequence):
        source = groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        number = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        seen[number - 1, :, :, slices[source]] = frame.T
    assert np.array_equal(seen, np.stack([stored == 2, stored == 5, stored == 7]))
    assert seen[1].any()
    again = read_dicom_seg(path, grid, {"liver": 2, "tumour": 5, "absent": 7})
    assert np.array_equal(again.array, label)
    assert again.flags == ()
    segmentation = importlib.import_module("highdicom").seg.segread(path)
    theirs = segmentation.get_pixels_by_source_instance(list(slices), combine_segments=True)  # (slices, rows, columns)
    assert np.array_equal(np.array([0, 2, 5, 7])[theirs], stored.transpose(2, 1, 0))
    volume = segmentation.get_volume(combine_segments=True)
    part, start = placed(volume.array, LPS @ volume.affine, grid)
    box = tuple(slice(a, a + n) for a, n in zip(start, part.shape))
    assert np.array_equal(np.array([0, 2, 5, 7])[part], label[box])
    assert (part > 0).sum() == (label > 0).sum()
    assert ds.FrameOfReferenceUID == frame_uid()
    assert (ds.SeriesDescription, ds.ContentDescription, ds.ContentLabel) == (RESEARCH_ONLY, RESEARCH_ONLY, "RESEARCH_ONLY")
    assert ds.StudyInstanceUID == pydicom.dcmread(files[0]).StudyInstanceUID
    assert (ds.PatientID, ds.AccessionNumber, ds.StudyDate) == ("P0001", "ACC00001", "20190703")
    content = path.read_bytes()
    for text in ("ward", "free text", "Planted", "OTHER123"):
        assert text.encode() not in content, text
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0


def test_dicom_seg__of_nothing_found_is_written_empty(tmp_path: Path) -> None:
    pytest.importorskip("highdicom", reason="highdicom is not installed (extra seg)")
    grid, files, _, label = series(tmp_path)
    path = tmp_path / "private" / "p.dcm"
    write_dicom_seg(path, label * 0, grid, files, {2: "liver"}, version="1.2")
    found = read_dicom_seg(path, grid, {"liver": 2})
    assert not found.array.any()
    assert found.counts == {"empty": 1}


def test_dicom_seg__of_a_resampled_grid_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("highdicom", reason="highdicom is not installed (extra seg)")
    sheared = oblique_affine()
    sheared[:3, 2] += 0.4 * sheared[:3, 1]  # a tilted gantry: slices are moved onto an orthogonal grid
    grid, files, _, label = series(tmp_path, sheared)
    with pytest.raises(GeometryError, match="onto which they were resampled"):
        write_dicom_seg(tmp_path / "private" / "p.dcm", np.zeros(grid.shape, np.int16), grid, files, {1: "a"}, version="1")
    assert label.any()


def test_dicom_seg__without_highdicom_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(RequestError, match=r'pip install "medssl\[seg\]"'):
        need_highdicom()


def test_dicom_seg__needs_slices_and_a_private_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medssl.domains.label_files import write

    monkeypatch.setattr(write, "need_highdicom", lambda: None)
    grid, files, _, label = series(tmp_path)
    with pytest.raises(RequestError, match="below a folder named private"):
        write_dicom_seg(tmp_path / "p.dcm", label, grid, files, {2: "liver"}, version="1")
    with pytest.raises(RequestError, match="this image is one file"):
        write_dicom_seg(tmp_path / "private" / "p.dcm", label, grid, files[:1], {2: "liver"}, version="1")
    array, affine = oblique_volume()
    nifti = write_nifti(tmp_path / "a.nii", array, affine)
    with pytest.raises(RequestError, match="need images that are DICOM series"):
        write_dicom_seg(tmp_path / "private" / "p.dcm", label, grid, [nifti], {2: "liver"}, version="1")
