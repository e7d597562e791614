"""Grouping, ordering and geometry of DICOM slices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medssl.archive.headers.dicom_header import read_header
from medssl.archive.headers.dicom_series import _clusters, slice_geometry, split_series
from medssl.archive.rows.roles import role_of
from tests.synthetic import LPS, oblique_affine, rotation

AXIAL = [1.0, 0, 0, 0, 1, 0]


def headers(positions: Any, orientation: Any = AXIAL, **tags: Any) -> list[dict[str, Any]]:
    """One header per position; a list-valued tag gives one value each."""
    rows = []
    for k, position in enumerate(positions):
        row = {"rows": 8, "columns": 9, "pixel_spacing": [1.5, 0.5], "instance_number": k + 1}
        row |= {"position": list(position), "orientation": list(orientation)}
        rows.append(row | {name: value[k] if isinstance(value, list) else value for name, value in tags.items()})
    return rows


def stack(n: int, step: float = 2.0) -> np.ndarray:
    return np.array([[0, 0, step * k] for k in range(n)], dtype=float)


def test_slice_geometry__order_and_affine_against_a_plain_loop() -> None:
    affine = oblique_affine()
    lps = LPS @ affine
    columns = lps[:3, :3] / np.linalg.norm(lps[:3, :3], axis=0)
    true = np.array([(lps @ [0, 0, k, 1])[:3] for k in range(9)])
    shuffled = np.random.default_rng(0).permutation(9)
    geometry = slice_geometry(true[shuffled], [*columns[:, 0], *columns[:, 1]], [1.1, 0.8])
    assert geometry.faults == () and geometry.affine is not None
    normal = np.cross(columns[:, 0], columns[:, 1])
    depths = [float(normal @ true[i]) for i in shuffled]
    assert geometry.order.tolist() == [i for _, i in sorted((depth, i) for i, depth in enumerate(depths))]
    for k, i in enumerate(geometry.order):
        np.testing.assert_allclose(geometry.affine @ [0, 0, k, 1], LPS @ [*true[shuffled[i]], 1], atol=1e-9)
    assert geometry.spacing_mm == pytest.approx((0.8, 1.1, 2.5))


@pytest.mark.parametrize("tilt", [0.0, 0.3, 0.8, 18.5, 30.0])
def test_slice_geometry__tilt_measured_and_corrected_above_half_a_degree(tilt: float) -> None:
    turned = rotation((tilt, 0, 0)) @ np.array([[1.0, 0, 0], [0, 1, 0]]).T
    geometry = slice_geometry(stack(10, 4.0), [*turned[:, 0], *turned[:, 1]], [1, 1])
    assert geometry.tilt_deg == pytest.approx(tilt, abs=1e-5)
    assert geometry.faults == () and geometry.step_mm == pytest.approx(4.0)
    assert geometry.affine is not None and geometry.spacing_mm is not None
    if tilt <= 0.5:
        assert geometry.flags == () and geometry.shifts is None and geometry.grow == (0, 0)
        return
    assert geometry.flags == ("tilt_corrected",)
    # The planes stay; their distance along the normal is the position step times the cosine.
    assert geometry.spacing_mm[2] == pytest.approx(4.0 * np.cos(np.deg2rad(tilt)))
    edges = geometry.affine[:3, :3] / np.linalg.norm(geometry.affine[:3, :3], axis=0)
    np.testing.assert_allclose(edges.T @ edges, np.eye(3), atol=1e-9)
    # Pixel (0, 0) of every slice, moved by its shift, is where its position says.
    assert geometry.shifts is not None and geometry.shifts.min() == 0
    for k in range(10):
        x, y = geometry.shifts[k]
        np.testing.assert_allclose(geometry.affine @ [x, y, k, 1], [*(LPS[:3, :3] @ [0, 0, 4.0 * k]), 1], atol=1e-6)
    assert geometry.shape(9, 8) == (9, 8 + int(np.ceil(36 * np.sin(np.deg2rad(tilt)))), 10)


def test_slice_geometry__sheared_beyond_any_gantry_is_refused() -> None:
    turned = rotation((50.0, 0, 0)) @ np.array([[1.0, 0, 0], [0, 1, 0]]).T
    assert slice_geometry(stack(10, 4.0), [*turned[:, 0], *turned[:, 1]], [1, 1]).faults == ("gantry_tilt",)


def test_slice_geometry__rounded_positions_are_regular() -> None:
    positions = np.round(stack(100, 0.625) + 0.3333, 2)
    geometry = slice_geometry(positions, AXIAL, [1, 1])
    assert geometry.faults == () and geometry.planes is None
    sideways = stack(10)
    sideways[5, 0] += 3
    assert slice_geometry(sideways, AXIAL, [1, 1]).faults == ("irregular_slices",)


@pytest.mark.parametrize("where", ["position", "orientation", "spacing"])
def test_slice_geometry__beyond_any_scanner_is_no_position(where: str) -> None:
    """Squares of such numbers are infinite, and warnings of numpy are errors here."""
    positions, orientation, spacing = stack(5), list(AXIAL), [1.0, 1.0]
    if where == "position":
        positions[2, 2] = 1e300
    elif where == "orientation":
        orientation[0] = 1e300
    else:
        spacing[1] = 1e300
    assert slice_geometry(positions, orientation, spacing).faults == ("no_position",)


def test_slice_geometry__few_missing_slices_become_empty_planes() -> None:
    positions = np.delete(np.round(stack(40, 0.625) + 0.3333, 2), [20, 31, 32], axis=0)
    geometry = slice_geometry(positions, AXIAL, [1, 1])
    assert geometry.faults == () and geometry.flags == ("gaps_filled",)
    assert geometry.planes is not None and np.flatnonzero(np.isnan(geometry.planes)).tolist() == [20, 31, 32]
    np.testing.assert_array_equal(geometry.planes[~np.isnan(geometry.planes)], np.arange(37))
    assert geometry.affine is not None
    for plane, place in enumerate(geometry.planes):
        if not np.isnan(place):
            np.testing.assert_allclose((geometry.affine @ [0, 0, plane, 1])[2], positions[int(place), 2], atol=0.02)
    assert geometry.max_gap_mm == pytest.approx(1.875, abs=0.02) and geometry.step_cv > 0.05
    many = slice_geometry(np.delete(stack(20), [5, 10, 15], axis=0), AXIAL, [1, 1])
    assert many.faults == ("irregular_slices",) and many.flags == ()


def test_slice_geometry__jitter_is_interpolated_onto_even_steps() -> None:
    positions = stack(12)
    positions[:, 2] += np.random.default_rng(1).uniform(-0.2, 0.2, 12) * (np.arange(12) % 11 > 0)
    geometry = slice_geometry(positions, AXIAL, [1, 1])
    assert geometry.faults == () and geometry.flags == ("slices_resampled",)
    assert geometry.affine is not None and geometry.planes is not None
    depth = (geometry.affine @ np.array([[0, 0, k, 1] for k in range(12)]).T)[2]
    np.testing.assert_allclose(np.interp(geometry.planes, np.arange(12), positions[:, 2]), depth, atol=1e-9)


def test_split__stacks_of_two_steps_are_two_blocks_and_needless_tags_are_recorded() -> None:
    """As the GE head CT, whose AcquisitionNumber changes with nearly every slice."""
    positions = np.array([[0, 0, z] for z in [*np.arange(6) * 4.0, 21.0, *(21.0 + np.arange(1, 7) * 7.0)]])
    groups = split_series(headers(positions, acquisition_number=[1, 2, 3, 4, 5, 6, *[7] * 3, *[8] * 4]))
    assert [group.indices for group in groups] == [tuple(range(6)), tuple(range(6, 13))]
    assert [group.geometry.step_mm for group in groups] == [4.0, 7.0]
    assert [(group.split_by, group.volume_index, group.n_volumes) for group in groups] == [("block", 0, 2), ("block", 1, 2)]
    assert all(group.flags == ("split_by_block",) and group.varying == ("acquisition_number",) for group in groups)


def test_split__a_stray_slice_goes_to_a_group_of_its_own() -> None:
    groups = split_series(headers([*stack(8), [0, 0, 47.0]]))
    assert [group.indices for group in groups] == [tuple(range(8)), (8,)]
    assert [group.geometry.faults for group in groups] == [(), ("single_slice",)]


def test_split__by_the_tag_that_separates_regular_geometry() -> None:
    """Two interleaved stacks of 4 and 5 mm that share no position: no block, but the tag knows."""
    positions = [*np.add(stack(6, 4.0), [0, 0, 1.3]), *stack(6, 5.0)]
    groups = split_series(headers(positions, acquisition_number=[1] * 6 + [2] * 6))
    assert [(group.split_by, group.indices) for group in groups] == [
        ("acquisition_number", tuple(range(6))),
        ("acquisition_number", tuple(range(6, 12))),
    ]
    assert all(group.varying == () and group.geometry.faults == () for group in groups)


def test_split__by_two_tags_where_one_leaves_collisions() -> None:
    """Multi-echo times: three echoes at four times."""
    rows = [(echo, time, z) for time in range(4) for z in range(5) for echo in range(3)]
    groups = split_series(
        headers(
            [[0, 0, 2.0 * z] for _, _, z in rows],
            echo_number=[e for e, _, _ in rows],
            temporal_position=[t for _, t, _ in rows],
        )
    )
    assert {group.split_by for group in groups} == {"echo_number+temporal_position"} and len(groups) == 12
    for group in groups:
        assert len({rows[i][:2] for i in group.indices}) == 1
        assert [rows[i][2] for i in group.indices] == list(range(5))


def test_ge_head__two_blocks(shared_data: Path) -> None:
    """Positions as pydicom reads them: 14 slices every 4.22 mm, 14 every 7.38 mm, 1.14 mm apart."""
    import pydicom

    paths = sorted((shared_data / "ct_ge_gantry_tilt").glob("*.dcm"))
    sets = [pydicom.dcmread(path, stop_before_pixels=True) for path in paths]
    assert len({str(ds.AcquisitionNumber) for ds in sets}) == 21
    groups = split_series([read_header(path) for path in paths])
    assert [len(group.indices) for group in groups] == [14, 14]
    for group, step in zip(groups, (4.22, 7.38)):
        z = [float(sets[i].ImagePositionPatient[2]) for i in group.indices]
        np.testing.assert_allclose(np.diff(z), step, atol=1e-6)
        assert group.geometry.step_mm == pytest.approx(step, abs=1e-6) and group.split_by == "block"
        assert "acquisition_number" in group.varying and group.geometry.faults == ()
        assert group.geometry.tilt_deg == pytest.approx(float(sets[0].GantryDetectorTilt), abs=1e-3)


def test_nih_ge_fmri__fifteen_slices_at_ten_times(shared_data: Path) -> None:
    import pydicom

    paths = sorted((shared_data / "mr_dicom_nih" / "20180918GE" / "mr_0004").glob("*.dcm"))
    groups = split_series([read_header(path) for path in paths])
    assert [(len(group.indices), group.split_by) for group in groups] == [(15, "visit")] * 10
    for k, group in enumerate(groups):
        numbers = [int(pydicom.dcmread(paths[i], stop_before_pixels=True).InstanceNumber) for i in group.indices]
        assert sorted(numbers) == list(range(15 * k + 1, 15 * k + 16))


@pytest.mark.parametrize(
    ("orientation", "spacing", "fault"),
    [([1, 0, 0, 1, 0, 0], [1, 1], "bad_orientation"), ([0] * 6, [1, 1], "bad_orientation"), (AXIAL, None, "no_spacing")],
)
def test_slice_geometry__faults(orientation: list[float], spacing: list[float] | None, fault: str) -> None:
    assert slice_geometry(stack(4), orientation, spacing).faults == (fault,)


def test_split__nothing_without_collisions_although_tags_vary() -> None:
    groups = split_series(headers(stack(6), acquisition_number=[1, 2, 3, 4, 5, 6], echo_time=[1.0, 1, 1, 2, 2, 2]))
    assert len(groups) == 1 and groups[0].flags == () and groups[0].indices == (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize("tag", ["echo_number", "temporal_position", "b_value", "trigger_time"])
def test_split__by_the_tag_that_removes_collisions(tag: str) -> None:
    positions = np.repeat(stack(5), 3, axis=0)
    rows = headers(positions, **{tag: [float(k % 3) for k in range(15)]}, acquisition_time=[str(k) for k in range(15)])
    groups = split_series(rows)
    assert [group.split_by for group in groups] == [tag] * 3
    assert [group.indices for group in groups] == [tuple(range(k, 15, 3)) for k in range(3)]
    assert {(group.n_volumes, group.flags) for group in groups} == {(3, ("split_by_tag",))}


def test_split__by_visit_in_the_order_of_instance_numbers() -> None:
    """As the NIH GE fMRI series: no tag varies, slices are interleaved within each time."""
    interleaved = [0, 2, 4, 1, 3]
    positions = np.concatenate([stack(5)[interleaved] for _ in range(4)])
    groups = split_series(headers(positions, n_temporal_positions=4))
    assert len(groups) == 4 and all(group.flags == ("split_by_visit",) for group in groups)
    for k, group in enumerate(groups):
        assert sorted(group.indices) == list(range(5 * k, 5 * k + 5))
        np.testing.assert_array_equal(positions[list(group.indices)], stack(5))
    stated = split_series(headers(positions, n_temporal_positions=7))
    assert stated[0].flags == ("split_by_visit", "temporal_mismatch")


def test_split__unequal_visits_stay_a_collision() -> None:
    positions = np.concatenate([stack(5), stack(5)[:2]])
    (group,) = split_series(headers(positions))
    assert group.geometry.faults == ("collision",) and len(group.indices) == 7


def test_split__orientation_and_size_apart() -> None:
    rows = headers(stack(3)) + headers(stack(4)[:, ::-1], orientation=[0, 1, 0, 0, 0, -1]) + headers(stack(2), rows=16)
    rows += [{"rows": 8, "columns": 9}]
    groups = split_series(rows)
    assert [len(group.indices) for group in groups] == [3, 4, 2, 1]
    assert groups[-1].geometry.faults == ("no_position",)
    assert sorted(i for group in groups for i in group.indices) == list(range(10))


def test_clusters__as_numpys_allclose_against_every_first_member() -> None:
    rng = np.random.default_rng(0)
    orientations = rng.choice([0.0, 0.1, 0.102, 0.1021, 0.1042, 0.5, 0.5025], size=(200, 6))
    slices = headers(np.zeros((200, 3)))
    for header, orientation, spacing in zip(slices, orientations, rng.choice([0.7, 0.7021, 0.7055], size=(200, 2))):
        header.update(
            orientation=[*orientation[:2].tolist(), 0, 0, 1, 0], pixel_spacing=spacing.tolist(), rows=8 + int(rng.integers(2))
        )
    slices[7]["pixel_spacing"] = None
    slices[9]["orientation"] = None
    expected: list[list[int]] = []
    for i, header in enumerate(slices):
        for members in expected:
            first = slices[members[0]]
            if all((header[k] is None) == (first[k] is None) for k in ("orientation", "pixel_spacing")) and all(
                np.allclose(first[k] or (), header[k] or (), rtol=1e-3, atol=2e-3) for k in ("orientation", "pixel_spacing", "rows")
            ):
                members.append(i)
                break
        else:
            expected.append([i])
    assert 20 < len(expected) < 120
    assert _clusters(slices, range(200)) == expected


@pytest.mark.parametrize(
    ("image_type", "role"),
    [
        (["ORIGINAL", "PRIMARY", "AXIAL"], "source"),
        (["ORIGINAL", "PRIMARY", "LOCALIZER"], "localiser"),
        (["DERIVED", "SECONDARY", "REFORMATTED", "AVERAGE"], "reformat"),
        (["DERIVED", "SECONDARY", "MPR"], "reformat"),
        (["DERIVED", "PRIMARY", "DIFFUSION", "ADC"], "derived_map"),
        (["DERIVED", "SECONDARY", "PROJECTION IMAGE", "MIP"], "mip"),
        (["DERIVED", "SECONDARY", "SCREEN SAVE"], "screenshot"),
        (["DERIVED", "SECONDARY"], "source"),
        ([], "source"),
    ],
)
def test_role__from_image_type(image_type: list[str], role: str) -> None:
    assert role_of(image_type) == role
