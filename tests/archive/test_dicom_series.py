"""Grouping, ordering and geometry of DICOM slices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medssl.archive.dicom_series import role_of, slice_geometry, split_series
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


@pytest.mark.parametrize("tilt", [0.0, 0.3, 0.8, 18.5])
def test_slice_geometry__tilt_measured_and_refused_above_half_a_degree(tilt: float) -> None:
    turned = rotation((tilt, 0, 0)) @ np.array([[1.0, 0, 0], [0, 1, 0]]).T
    geometry = slice_geometry(stack(10, 4.0), [*turned[:, 0], *turned[:, 1]], [1, 1])
    assert geometry.tilt_deg == pytest.approx(tilt, abs=1e-5)
    assert geometry.faults == (("gantry_tilt",) if tilt > 0.5 else ())


def test_slice_geometry__rounded_positions_are_regular_and_a_missing_slice_is_not() -> None:
    positions = np.round(stack(100, 0.625) + 0.3333, 2)
    assert slice_geometry(positions, AXIAL, [1, 1]).faults == ()
    missing = slice_geometry(np.delete(positions, 50, axis=0), AXIAL, [1, 1])
    assert missing.faults == ("irregular_slices",)
    assert missing.max_gap_mm == pytest.approx(1.25, abs=0.02) and missing.step_cv > 0.05
    sideways = stack(10)
    sideways[5, 0] += 3
    assert slice_geometry(sideways, AXIAL, [1, 1]).faults == ("irregular_slices",)


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
