"""Contours to voxels against scikit-image, and volumes against formulas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medssl.domains.label_files.base import Grid
from medssl.domains.label_files.read import form_of, names_in, read_labels
from medssl.domains.label_files.rtstruct import fill_plane, fill_polygon
from medssl.errors import GeometryError, ImageError
from tests.synthetic import oblique_affine
from tests.synthetic_labels import at, write_rtstruct

SHAPE = (30, 34, 20)
PLANAR = "CLOSED_PLANAR"


def circle(radius: float, centre: tuple[float, float], n: int = 64, phase: float = 0.1) -> np.ndarray:
    angle = phase + 2 * np.pi * np.arange(n) / n
    return np.stack([centre[0] + radius * np.cos(angle), centre[1] + radius * np.sin(angle)], axis=1)


def lifted(points: np.ndarray, z: float) -> np.ndarray:
    return np.concatenate([points, np.full((len(points), 1), z)], axis=1)


def grid_of(affine: np.ndarray, slice_axis: int | None = 2) -> Grid:
    return Grid(affine, SHAPE, slice_axis, "1.2.3.4")


def test_polygons__equal_scikit_image() -> None:
    from skimage.draw import polygon2mask

    rng = np.random.default_rng(0)
    n_inside = 0
    for _ in range(60):
        points = rng.normal((14, 17), 9, (int(rng.integers(3, 12)), 2))  # crosses itself and the border
        expected = polygon2mask((30, 34), points)
        assert np.array_equal(fill_polygon(points, (30, 34)), expected)
        n_inside += int(expected.sum())
    assert n_inside > 5000


def test_polygons__that_share_an_edge_share_no_voxel() -> None:
    left = np.array([[1.0, 1], [6, 1], [6, 9], [1, 9]])
    right = np.array([[6.0, 1], [11, 1], [11, 9], [6, 9]])
    a, b = fill_polygon(left, (14, 12)), fill_polygon(right, (14, 12))
    assert not (a & b).any()
    assert a.sum() == b.sum() == 5 * 8  # the area
    assert np.array_equal(a | b, fill_polygon(np.array([[1.0, 1], [11, 1], [11, 9], [1, 9]]), (14, 12)))


def test_holes__are_cut_by_nesting_xor_and_keyhole(tmp_path: Path) -> None:
    outer, inner = circle(11, (14.2, 16.3)), circle(5, (14.2, 16.3))
    ring = fill_polygon(outer, SHAPE[:2]) & ~fill_polygon(inner, SHAPE[:2])
    keyhole = np.concatenate([outer, outer[:1], inner[:1], inner[::-1]])  # in along a line, around the hole, out again
    affine = oblique_affine()
    rois = {
        "nested": [(PLANAR, at(affine, lifted(outer, 4))), (PLANAR, at(affine, lifted(inner, 4)))],
        "xor": [("CLOSEDPLANAR_XOR", at(affine, lifted(p, 8))) for p in (outer, inner)],
        "keyhole": [(PLANAR, at(affine, lifted(keyhole, 12)))],
    }
    found = read_labels(write_rtstruct(tmp_path / "r.dcm", rois, frame="1.2.3.4"), grid_of(affine))
    for z, name in ((4, "nested"), (8, "xor"), (12, "keyhole")):
        value = next(value for value, own in found.names.items() if own == name)
        assert np.array_equal(found.array[:, :, z] == value, ring), name
    assert found.array.astype(bool).sum() == 3 * ring.sum()
    area = np.pi * (11**2 - 5**2)
    assert ring.sum() == pytest.approx(area, rel=0.02)
    assert found.flags == ()
    assert found.counts == {}


@pytest.mark.parametrize("oblique", [False, True])
@pytest.mark.parametrize("every", [1, 3])
def test_ellipsoids__have_their_volume_in_ml(tmp_path: Path, oblique: bool, every: int) -> None:
    affine = oblique_affine() if oblique else np.diag([0.8, 1.1, 2.5, 1.0])
    radii, centre = np.array([11.0, 13.0, 7.6]), np.array([14.3, 16.4, 9.2])
    contours = []
    for z in np.arange(2, 18, every):
        scale = 1 - ((z - centre[2]) / radii[2]) ** 2
        if scale > 0:
            angle = 0.2 + 2 * np.pi * np.arange(200) / 200
            flat = np.sqrt(scale) * radii[:2] * np.stack([np.cos(angle), np.sin(angle)], axis=1) + centre[:2]
            contours.append((PLANAR, at(affine, lifted(flat, float(z)))))
    found = read_labels(write_rtstruct(tmp_path / "r.dcm", {"body": contours}, frame="1.2.3.4"), grid_of(affine))
    voxel_ml = 0.8 * 1.1 * 2.5 / 1000
    volume = 4 / 3 * np.pi * radii.prod() * voxel_ml  # 10.01 ml
    assert found.array.sum() * voxel_ml == pytest.approx(volume, rel=0.01 if every == 1 else 0.03)
    n_slices = int(found.array.any(axis=(0, 1)).sum())
    assert n_slices == len(contours) * every
    assert found.counts == ({} if every == 1 else {"between": n_slices - len(contours)})


def test_planes_between_slices__fill_as_many_slices_as_they_are(tmp_path: Path) -> None:
    affine = oblique_affine()
    flat = circle(6, (14.2, 16.3))
    for heights, slices in (([9.5, 10.5, 11.5], [9, 10, 11]), ([9.4, 10.4], [9, 10]), ([7.6], [8]), ([3.0, 15.0], [3, 15])):
        contours = [(PLANAR, at(affine, lifted(flat, z))) for z in heights]
        found = read_labels(write_rtstruct(tmp_path / "r.dcm", {"a": contours}, frame="1.2.3.4"), grid_of(affine))
        assert np.flatnonzero(found.array.any(axis=(0, 1))).tolist() == slices
    thin = [(PLANAR, at(affine, lifted(circle(radius, (14.2, 16.3)), z))) for radius, z in ((3, 9.6), (6, 10.0), (8, 10.4))]
    dense = read_labels(write_rtstruct(tmp_path / "r.dcm", {"a": thin}, frame="1.2.3.4"), grid_of(affine))
    assert np.array_equal(dense.array[:, :, 10], fill_polygon(flat, SHAPE[:2]))  # the nearest of three
    assert np.flatnonzero(dense.array.any(axis=(0, 1))).tolist() == [10]


def test_missing_slices__stay_empty_and_are_counted(tmp_path: Path) -> None:
    affine = oblique_affine()
    flat = circle(6, (14.2, 16.3))
    contours = [(PLANAR, at(affine, lifted(flat, z))) for z in (4, 5, 6, 8, 9, 15)]
    found = read_labels(write_rtstruct(tmp_path / "r.dcm", {"a": contours}, frame="1.2.3.4"), grid_of(affine))
    assert np.flatnonzero(found.array.any(axis=(0, 1))).tolist() == [4, 5, 6, 8, 9, 15]
    assert found.counts == {"gaps": 6}


def test_structures__overlap_by_value_and_undrawn_ones_are_not_labelled(tmp_path: Path) -> None:
    affine = oblique_affine()
    a, b = circle(8, (12.2, 14.3)), circle(5, (17.4, 18.1))
    rois = {
        "GTV": [(PLANAR, at(affine, lifted(b, 6)))],
        "Body": [(PLANAR, at(affine, lifted(a, 6)))],
        "template": [],
        "point": [("POINT", at(affine, lifted(a[:1], 6)))],
        "line": [("OPEN_PLANAR", at(affine, lifted(a, 6))), (PLANAR, at(affine, lifted(a[:2], 6)))],
        "other": [(PLANAR, at(affine, lifted(a, 9)))],
    }
    path = write_rtstruct(tmp_path / "r.dcm", rois, frame="1.2.3.4")
    assert form_of(path) == ("rtstruct", path)
    assert names_in(path) == ["GTV", "Body", "other"]
    listed = {"body": 1, "gtv": 2, "template": 3, "point": 4, "line": 5}
    found = read_labels(path, grid_of(affine), listed)
    one, two = fill_polygon(a, SHAPE[:2]), fill_polygon(b, SHAPE[:2])
    assert np.array_equal(found.array[:, :, 6], np.where(two, 2, one))
    assert set(found.names) == {1, 2}
    assert found.counts == {"overlap_voxels": int((one & two).sum()), "unlisted": 1, "skipped": 3, "undrawn": 3}
    assert found.counts["overlap_voxels"] > 0


def test_contours_outside__are_counted_and_all_outside_refused(tmp_path: Path) -> None:
    affine = oblique_affine()
    rois = {
        "a": [
            (PLANAR, at(affine, lifted(circle(6, (28.3, 16.3)), 5))),  # reaches over the border
            (PLANAR, at(affine, lifted(circle(6, (14.2, 16.3)), 19))),
            (PLANAR, at(affine, lifted(circle(6, (14.2, 16.3)), 20))),  # beyond the last slice
            (PLANAR, at(affine, lifted(circle(6, (14.2, 16.3)), -1))),
        ]
    }
    found = read_labels(write_rtstruct(tmp_path / "r.dcm", rois, frame="1.2.3.4"), grid_of(affine))
    assert found.counts["outside"] == 3
    far = {"a": [(PLANAR, at(affine, lifted(circle(6, (14.2, 16.3)), 60)))]}
    with pytest.raises(GeometryError, match="all contours lie outside the image"):
        read_labels(write_rtstruct(tmp_path / "f.dcm", far, frame="1.2.3.4"), grid_of(affine))


def test_crossing_contours__are_counted() -> None:
    _, crossing, _ = fill_plane([circle(6, (12.2, 14.3)), circle(6, (18.2, 14.3)), circle(2, (8.2, 14.3))], (30, 34))
    assert crossing == 1


def test_contours_on_sagittal_planes__are_filled_there(tmp_path: Path) -> None:
    affine = oblique_affine()
    flat = circle(6, (16.3, 9.4))
    points = np.concatenate([np.full((len(flat), 1), 11.0), flat], axis=1)
    path = write_rtstruct(tmp_path / "r.dcm", {"a": [(PLANAR, at(affine, points))]}, frame="1.2.3.4")
    found = read_labels(path, grid_of(affine))
    assert np.array_equal(found.array[11], fill_polygon(flat, SHAPE[1:]))
    assert found.array.sum() == found.array[11].sum()


def test_wrong_geometry__is_refused(tmp_path: Path) -> None:
    affine = oblique_affine()
    good = {"a": [(PLANAR, at(affine, lifted(circle(6, (14.2, 16.3)), 5)))]}
    with pytest.raises(GeometryError, match="another frame of reference"):
        read_labels(write_rtstruct(tmp_path / "a.dcm", good, frame="1.2.9"), grid_of(affine))
    unknown = read_labels(write_rtstruct(tmp_path / "b.dcm", good), grid_of(affine))
    assert unknown.flags == ("frame_unverified",)
    plain = np.diag([0.8, 1.1, 2.5, 1.0])  # drawn on another scan, tilted against this one
    with pytest.raises(GeometryError, match="across the planes of the image"):
        read_labels(write_rtstruct(tmp_path / "c.dcm", good, frame="1.2.3.4"), grid_of(plain))


@pytest.mark.data
def test_real_structure_set__is_read(shared_data: Path) -> None:
    import pydicom

    path = shared_data / "dicom_odd" / "pydicom" / "rtstruct.dcm"
    if not path.is_file():
        pytest.skip("no rtstruct.dcm in the shared data")
    from skimage.draw import polygon2mask

    assert form_of(path)[0] == "rtstruct"
    ds = pydicom.dcmread(path, force=True)  # without a preamble
    affine = np.diag([10.0, 10.0, 10.0, 1.0])
    affine[:3, 3] = -253.3, -253.3, -250.0
    expected = np.zeros((50, 50, 50), bool)
    for contour in ds.ROIContourSequence[0].ContourSequence:
        ras = np.array(contour.ContourData, float).reshape(-1, 3) * (-1, -1, 1)
        index = (ras - affine[:3, 3]) / 10
        expected[:, :, round(index[0, 2])] ^= polygon2mask((50, 50), index[:, :2])
    assert len(names_in(path)) == 1
    found = read_labels(path, Grid(affine, (50, 50, 50), 2))
    assert np.array_equal(found.array, expected)
    assert expected.any()
    assert found.counts["undrawn"] == 2
    with pytest.raises(ImageError, match="neither a segmentation nor a structure set"):
        read_labels(path.parent / "rtplan.dcm", grid_of(np.eye(4)))


def test_planes__equal_scikit_image_wherever_the_contours_lie() -> None:
    from skimage.draw import polygon2mask

    rng = np.random.default_rng(1)
    for _ in range(40):
        polygons = [circle(*rng.uniform(2, 9, 1), tuple(rng.uniform(-6, 40, 2)), n=17) for _ in range(int(rng.integers(1, 4)))]  # type: ignore[arg-type]
        expected = np.logical_xor.reduce([polygon2mask((30, 34), points) for points in polygons])
        assert np.array_equal(fill_plane(polygons, (30, 34))[0], expected)
