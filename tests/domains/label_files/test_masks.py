"""Organ folders, .seg.nrrd and DICOM-SEG against SimpleITK, nibabel and pydicom."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medssl.domains.label_files.base import UNCERTAIN, Grid, Painter, numbered, placed
from medssl.domains.label_files.read import form_of, frame_of_reference, names_in, read_labels
from medssl.domains.volume_files import read_volume
from medssl.errors import GeometryError, ImageError
from tests.synthetic import (
    LPS,
    SHAPE,
    oblique_affine,
    oblique_volume,
    reorient,
    write_dicom_series,
    write_itk,
    write_nifti,
)
from tests.synthetic_labels import ellipsoid, frame_uid, write_dicom_seg, write_seg_nrrd


def image_grid(path: Path) -> Grid:
    volume = read_volume([path])
    x, y, z = volume.array.shape
    return Grid(volume.affine, (x, y, z), volume.slice_axis)


def two_masks() -> tuple[np.ndarray, np.ndarray]:
    """Two ellipsoids that overlap."""
    return ellipsoid(SHAPE, (8, 11, 6), (5, 6, 4)), ellipsoid(SHAPE, (12, 15, 7), (4, 5, 3))


def test_blocks__turn_into_the_axes_of_the_grid_from_every_axis_order() -> None:
    array, affine = oblique_volume()
    grid = Grid(affine, SHAPE)
    for axes in ("RAS", "LPS", "SPR", "PIL", "AIR", "IRP"):
        stored, own = reorient(array, affine, axes)
        turned, start = placed(stored, own, grid)
        assert start == (0, 0, 0)
        assert np.array_equal(turned, array)
        corner = own.copy()
        corner[:3, 3] = own[:3, :3] @ [2, 3, 1] + own[:3, 3]
        part, start = placed(stored[2:7, 3:9, 1:5], corner, grid)
        x, y, z = start
        assert np.array_equal(part, array[x : x + part.shape[0], y : y + part.shape[1], z : z + part.shape[2]])


def test_blocks__off_the_grid_are_refused() -> None:
    array, affine = oblique_volume()
    grid = Grid(affine, SHAPE)
    shifted = affine.copy()
    shifted[:3, 3] += affine[:3, 0] * 0.09  # 0.072 mm of 0.8
    placed(array, shifted, grid)
    shifted[:3, 3] += affine[:3, 0] * 0.02
    with pytest.raises(GeometryError, match=r"up to 0\.09 mm away .* at most 0\.08 mm"):
        placed(array, shifted, grid)
    finer = affine @ np.diag([0.5, 1, 1, 1])
    with pytest.raises(GeometryError, match="away from voxels"):
        placed(array, finer, grid)


def test_overlap__goes_to_the_higher_value_in_any_order_and_is_counted() -> None:
    grid = Grid(np.eye(4), (4, 1, 1))
    masks = {"liver": [1, 1, 1, 0], "tumour": [0, 1, 1, 1]}
    for order in (("liver", "tumour"), ("tumour", "liver"), ("tumour", "liver", "liver")):
        painter = Painter(grid, {"Liver": 1, "TUMOUR ": 2})
        for name, value in zip(order, painter.declare(list(order))):
            painter.add(value, np.array(masks[name], bool).reshape(4, 1, 1), (0, 0, 0))
        done = painter.done()
        assert done.array.ravel().tolist() == [1, 2, 2, 2]
        assert done.counts == {"overlap_voxels": 2}


def test_numbers__follow_the_names_and_join_spellings() -> None:
    assert numbered(["Spleen", "left-lung", "Left Lung", "LEFT_LUNG"]) == {"left lung": 1, "spleen": 2}


@pytest.mark.parametrize("form", ["nifti", "lps_nifti", "nrrd"])
def test_organ_folder__gives_the_masks_of_its_files(tmp_path: Path, form: str) -> None:
    array, affine = oblique_volume()
    grid = image_grid(write_nifti(tmp_path / "image.nii.gz", array, affine))
    first, second = two_masks()
    folder = tmp_path / "case"
    folder.mkdir()
    (folder / "notes.txt").write_text("of somebody")
    for name, mask, value in (("liver", first, 1), ("Left_Kidney", second, 255), ("spleen", np.zeros(SHAPE, bool), 1)):
        stored = mask.astype(np.uint8) * np.uint8(value)
        if form == "nrrd":
            write_itk(folder / f"{name}.nrrd", stored, affine)
        else:
            turned, own = reorient(stored, affine, "LPS") if form == "lps_nifti" else (stored, affine)
            write_nifti(folder / f"{name}.nii.gz", turned, own)
    assert form_of(folder) == ("organ_folder", folder)
    assert sorted(names_in(folder)) == ["Left_Kidney", "liver", "spleen"]
    found = read_labels(folder, grid, {"liver": 1, "left kidney": 2, "spleen": 3, "pancreas": 4})
    expected = np.where(second, 2, np.where(first, 1, 0))
    assert np.array_equal(found.array, expected)
    assert set(found.names) == {1, 2, 3}  # the spleen is labelled and empty, the pancreas is not labelled
    assert found.counts == {"overlap_voxels": int((first & second).sum()), "empty": 1}
    only = read_labels(folder, grid, {"liver": 5})
    assert np.array_equal(only.array, np.where(first, 5, 0))
    assert only.counts == {"unlisted": 2}


def test_organ_folder__keeps_uncertain_voxels_and_refuses_several_structures(tmp_path: Path) -> None:
    affine = oblique_affine()
    grid = Grid(affine, (4, 3, 2))
    folder = tmp_path / "case"
    folder.mkdir()
    mask = np.zeros((4, 3, 2), np.int16)
    mask[0], mask[1] = 1, -1
    write_nifti(folder / "a.nii", mask, affine)
    other = np.zeros((4, 3, 2), np.int16)
    other[1, 0] = 3
    write_nifti(folder / "DOE_JOHN.nii", other, affine)
    found = read_labels(folder, grid, {"doe john": 1, "a": 2})
    assert found.array[0, 0, 0] == 2
    assert found.array[1, 0].tolist() == [1, 1]  # the other organ is sure of these
    assert (found.array[1, 1:] == UNCERTAIN).all()
    other[2, 0] = 1
    write_nifti(folder / "DOE_JOHN.nii", other, affine)
    with pytest.raises(ImageError, match="organ mask 1 of 2: a mask holds 2 values beside 0") as caught:
        read_labels(folder, grid)
    assert "DOE" not in str(caught.value)
    write_nifti(folder / "DOE_JOHN.nii", other[:3], affine)
    with pytest.raises(GeometryError, match="organ mask 1 of 2: label map: 3x3x2 voxels on an image of 4x3x2") as grid_error:
        read_labels(folder, grid)
    assert "DOE" not in str(grid_error.value)


def test_folder_of_one_seg_nrrd__is_that_segmentation_and_of_more_is_refused(tmp_path: Path) -> None:
    affine, (first, second) = oblique_affine(), two_masks()
    grid = Grid(affine, SHAPE)
    file = tmp_path / "DOE" / "Segmentation.SEG.nrrd"
    file.parent.mkdir()
    segments = [{"Name": "liver", "LabelValue": 1, "Layer": 0}, {"Name": "spleen", "LabelValue": 1, "Layer": 1}]
    write_seg_nrrd(file, np.stack([first * 1, second * 1]), affine, segments)
    (file.parent / "notes.txt").write_text("of somebody")
    assert form_of(file.parent) == ("seg_nrrd", file)
    assert names_in(file.parent) == ["liver", "spleen"]
    found = read_labels(file.parent, grid, {"liver": 1, "spleen": 2})
    assert np.array_equal(found.array, np.where(second, 2, np.where(first, 1, 0)))
    write_nifti(file.parent / "DOE_JOHN.nii", first.astype(np.uint8), affine)
    with pytest.raises(ImageError, match=r"a label folder with 1 \.seg\.nrrd among 2 label files; it may hold one") as caught:
        read_labels(file.parent, grid)
    assert "DOE" not in str(caught.value)


def sitk_voxels(path: Path, layer: int, value: int, image: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """Where SimpleITK puts the voxels of a segment on an image, through patient coordinates; in the order of the image file."""
    import SimpleITK as sitk

    seg, target = sitk.ReadImage(str(path)), sitk.ReadImage(str(image))
    if seg.GetNumberOfComponentsPerPixel() > 1:
        seg = sitk.VectorIndexSelectionCast(seg, layer)
    mask = np.zeros(shape, bool)
    for z, y, x in np.argwhere(sitk.GetArrayFromImage(seg) == value):
        point = seg.TransformIndexToPhysicalPoint((int(x), int(y), int(z)))
        mask[target.TransformPhysicalPointToIndex(point)] = True
    return mask


def test_seg_nrrd__layers_and_cropping_equal_simpleitk(tmp_path: Path) -> None:
    array, affine = oblique_volume()
    image = write_itk(tmp_path / "image.nrrd", array, affine)
    grid = image_grid(image)
    first, second = two_masks()
    third = ellipsoid(SHAPE, (4, 20, 3), (2, 3, 2))
    layers = np.stack([first * 1 + third * 2, second * 1]).astype(np.uint8)
    low, high = np.array([2, 3, 1]), np.array([18, 25, 12])
    cropped = layers[:, low[0] : high[0], low[1] : high[1], low[2] : high[2]]
    own = affine.copy()
    own[:3, 3] = affine[:3, :3] @ low + affine[:3, 3]
    segments = [
        {"ID": "Segment_1", "Name": "liver", "Layer": 0, "LabelValue": 1, "Extent": "0 3 0 3 0 3"},
        {"ID": "Segment_2", "Name": "Tumour", "Layer": 1, "LabelValue": 1},
        {"ID": "Segment_3", "Name": "cyst", "Layer": 0, "LabelValue": 2},
        {"ID": "Segment_4", "Name": "empty", "Layer": 1, "LabelValue": 9},
    ]
    path = write_seg_nrrd(tmp_path / "s.seg.nrrd", cropped, own, segments, extra=["Segmentation_ReferenceImageExtentOffset:=2 3 1"])
    assert form_of(path) == ("seg_nrrd", path)
    assert names_in(path) == ["liver", "Tumour", "cyst", "empty"]
    found = read_labels(path, grid, {"liver": 1, "tumour": 2, "cyst": 3, "empty": 4, "spleen": 5})
    expected = np.zeros(SHAPE, int)
    for value, (layer, stored) in ((1, (0, 1)), (2, (1, 1)), (3, (0, 2))):
        expected[sitk_voxels(path, layer, stored, image, SHAPE)] = value
    assert np.array_equal(found.array, expected)
    assert expected.any()
    assert np.array_equal(expected, np.where(third, 3, np.where(second, 2, first)))  # nothing was cropped away
    assert set(found.names) == {1, 2, 3, 4}
    assert found.counts == {"overlap_voxels": int((first & second).sum()), "empty": 1}


def test_seg_nrrd__one_layer_and_a_single_voxel(tmp_path: Path) -> None:
    array, affine = oblique_volume()
    grid = image_grid(write_itk(tmp_path / "image.nrrd", array, affine))
    first, _ = two_masks()
    one = write_seg_nrrd(tmp_path / "a.seg.nrrd", first[None] * 3, affine, [{"Name": "liver", "LabelValue": 3}])
    assert np.array_equal(read_labels(one, grid).array, first)
    none = write_seg_nrrd(tmp_path / "b.seg.nrrd", np.zeros((1, 1, 1, 1)), np.eye(4), [{"Name": "liver", "LabelValue": 1}])
    empty = read_labels(none, grid)
    assert not empty.array.any()
    assert empty.counts == {"empty": 1}
    assert empty.names == {1: "liver"}
    bad = write_seg_nrrd(tmp_path / "c.seg.nrrd", first[None] * 3, affine, [{"Name": "liver", "LabelValue": 2}])
    with pytest.raises(ImageError, match="layer 0 holds 1 values that no segment"):
        read_labels(bad, grid)
    finer = write_seg_nrrd(tmp_path / "d.seg.nrrd", first[None], affine @ np.diag([0.5, 0.5, 0.5, 1]), [{"Name": "a"}])
    with pytest.raises(GeometryError, match="export the label on the grid of its image"):
        read_labels(finer, grid)
    plain = write_itk(tmp_path / "e.nrrd", first.astype(np.uint8), affine)
    assert form_of(plain)[0] == "map"
    assert np.array_equal(read_labels(plain, grid).array, first)


def dicom_grid(tmp_path: Path) -> tuple[Grid, np.ndarray, np.ndarray]:
    """Write an oblique DICOM series; return its grid, and array and affine in the order of its file axes."""
    array, affine = oblique_volume()
    files = write_dicom_series(tmp_path / "image", array, affine)
    volume = read_volume(files)
    x, y, z = volume.array.shape
    return Grid(volume.affine, (x, y, z), volume.slice_axis, frame_of_reference(files[0])), array, affine


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
def test_dicom_seg__equals_the_masks_turned_by_nibabel(tmp_path: Path, kind: str) -> None:
    grid, _, affine = dicom_grid(tmp_path)
    assert grid.frame_of_reference == frame_uid()
    first, second = two_masks()
    masks = {"liver": first, "tumour": second & ~first if kind == "LABELMAP" else second, "none": np.zeros(SHAPE, bool)}
    written = {name: mask * 0.5 if kind == "FRACTIONAL" else mask for name, mask in masks.items()}
    if kind == "FRACTIONAL":
        written["liver"] = np.where(first, 0.5, 0.495)  # 100 and 99 of 200
    path = write_dicom_seg(tmp_path / "s.dcm", written, affine, kind=kind, frame=frame_uid())
    assert form_of(path) == ("dicom_seg", path)
    assert names_in(path) == ["liver", "tumour", "none"]
    found = read_labels(path, grid, {"liver": 1, "tumour": 2, "none": 3, "other": 4})
    expected, own = reorient(np.where(masks["tumour"], 2, first.astype(int)), affine, "RAS")
    np.testing.assert_allclose(own, grid.affine, atol=1e-4)
    assert np.array_equal(found.array, expected)
    assert set(found.names) == {1, 2, 3}
    overlap = int((masks["tumour"] & first).sum())
    assert found.counts == {**({"overlap_voxels": overlap} if overlap else {}), "empty": 1}
    assert found.flags == ()


def test_dicom_seg__may_lie_on_part_of_the_image_and_across_its_slices(tmp_path: Path) -> None:
    grid, _, affine = dicom_grid(tmp_path)
    first, _ = two_masks()
    turned, own = reorient(first, affine, "PIR")  # planes across another axis than the image's slices
    corner = own.copy()
    corner[:3, 3] = own[:3, :3] @ [3, 1, 2] + own[:3, 3]
    path = write_dicom_seg(tmp_path / "s.dcm", {"liver": turned[3:20, 1:11, 2:17]}, corner)
    kept = np.zeros_like(turned)
    kept[3:20, 1:11, 2:17] = turned[3:20, 1:11, 2:17]
    expected, _ = reorient(kept, own, "RAS")
    found = read_labels(path, grid)
    assert np.array_equal(found.array, expected)
    assert found.flags == ("frame_unverified",)


def test_dicom_seg__counts_what_lies_outside_and_refuses_other_places(tmp_path: Path) -> None:
    grid, _, affine = dicom_grid(tmp_path)
    first, _ = two_masks()
    below = affine.copy()
    below[:3, 3] -= 4 * affine[:3, 2]  # four slices down: planes 0 to 3 are cut off
    found = read_labels(write_dicom_seg(tmp_path / "a.dcm", {"liver": first}, below), grid)
    expected, _ = reorient(np.concatenate([first[:, :, 4:], np.zeros((*SHAPE[:2], 4), bool)], axis=2), affine, "RAS")
    assert np.array_equal(found.array, expected)
    assert found.counts == {"outside": int(first[:, :, :4].sum())}
    assert found.counts["outside"] > 0
    below[:3, 3] -= 40 * affine[:3, 2]
    with pytest.raises(GeometryError, match="lies outside its image"):
        read_labels(write_dicom_seg(tmp_path / "b.dcm", {"liver": first}, below), grid)
    with pytest.raises(GeometryError, match="another frame of reference"):
        read_labels(write_dicom_seg(tmp_path / "c.dcm", {"liver": first}, affine, frame="1.2.3"), grid)


def test_dicom_seg__damage_is_refused_without_its_content(tmp_path: Path) -> None:
    import pydicom

    grid, _, affine = dicom_grid(tmp_path)
    first, _ = two_masks()
    path = write_dicom_seg(tmp_path / "s.dcm", {"Doe John": first}, affine)
    ds = pydicom.dcmread(path)
    short = pydicom.dcmread(path)
    short.PixelData = ds.PixelData[:40]
    short.save_as(tmp_path / "short.dcm")
    with pytest.raises(ImageError, match="fewer bytes than pixels"):
        read_labels(tmp_path / "short.dcm", grid)
    ds.PerFrameFunctionalGroupsSequence[0].SegmentIdentificationSequence[0].ReferencedSegmentNumber = 7
    ds.save_as(tmp_path / "seven.dcm")
    with pytest.raises(ImageError, match="frame 0 belongs to a segment that the file does not list"):
        read_labels(tmp_path / "seven.dcm", grid)
    del ds.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence
    ds.save_as(tmp_path / "nowhere.dcm")
    with pytest.raises(GeometryError, match="does not say where it lies"):
        read_labels(tmp_path / "nowhere.dcm", grid)
    with pytest.raises(ImageError, match="neither a segmentation nor a structure set"):
        read_labels(next((tmp_path / "image").iterdir()), grid)
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(ImageError, match=r"no label file; accepted: NIfTI.*RTSTRUCT"):
        read_labels(tmp_path / "x.txt", grid)


@pytest.mark.data
@pytest.mark.parametrize(
    "name", ["pydicom-data/liver.dcm", "pydicom-data/liver_nonbyte_aligned.dcm", "pydicom/liver_expb_1frame.dcm"]
)
def test_real_dicom_seg__equals_pydicom(shared_data: Path, name: str) -> None:
    import pydicom

    path = shared_data / "dicom_odd" / name
    if not path.is_file():
        pytest.skip(f"no {name} in the shared data")
    ds = pydicom.dcmread(path)
    frames = ds.pixel_array.reshape(-1, int(ds.Rows), int(ds.Columns))
    shared = ds.SharedFunctionalGroupsSequence[0]
    per = ds.PerFrameFunctionalGroupsSequence[: len(frames)]
    cosines = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float)
    spacing = [float(v) for v in shared.PixelMeasuresSequence[0].PixelSpacing]
    places = np.array([item.PlanePositionSequence[0].ImagePositionPatient for item in per], float)
    order = np.argsort(places @ np.cross(cosines[:3], cosines[3:]))
    lps = np.eye(4)
    lps[:3, 0], lps[:3, 1] = cosines[:3] * spacing[1], cosines[3:] * spacing[0]
    lps[:3, 2] = places[order[1]] - places[order[0]] if len(order) > 1 else np.cross(cosines[:3], cosines[3:])
    lps[:3, 3] = places[order[0]]
    stacked = frames[order].transpose(2, 1, 0)
    expected, affine = reorient(stacked, LPS @ lps, "RAS")
    x, y, z = expected.shape
    found = read_labels(path, Grid(affine, (x, y, z)))
    assert np.array_equal(found.array, expected)
    assert expected.sum() > 1000
    assert found.names == {1: "Liver"}
