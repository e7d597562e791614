"""The overlay of matched points: which are drawn, and on which side."""

from __future__ import annotations

import io

import numpy as np

from medssl.report.figures import DPI
from medssl.report.match_figure import COLUMN, GAP, HEAD, MOST, drawn_points, matches_png, middle_point

ONE = (1.0, 1.0, 1.0)


def test_drawn_points__the_focus_then_the_matched_nearest_of_its_planes() -> None:
    here = np.array([[50, 50, 50], [20, 50, 50], [52, 90, 10], [90, 90, 90], [50, 40, 52], [50, 51, 50]], dtype=float)
    there = here.copy()
    there[4] = np.nan  # without a match
    assert drawn_points((here, there), (ONE, ONE), 0) == [0, 5, 1, 2]  # 3 lies beside no plane
    assert drawn_points((here, there), ((1.0, 1.0, 0.1), ONE), 0) == [0, 5, 1, 2, 3]  # 40 voxels of 0.1 mm are 4 mm
    many = np.tile([50.0, 50.0, 50.0], (100, 1))
    assert drawn_points((many, many), (ONE, ONE), 7)[0] == 7 and len(drawn_points((many, many), (ONE, ONE), 7)) == MOST


def test_middle_point__is_a_matched_one() -> None:
    points = np.array([[0, 0, 0], [4, 0, 0], [5, 0, 0], [10, 0, 0]], dtype=float)
    assert middle_point(points, np.array([True, True, True, True])) == 2
    assert middle_point(points, np.array([True, True, False, True])) == 1
    assert middle_point(points, np.zeros(4, dtype=bool)) == 0


def test_picture__has_the_patients_left_on_the_right() -> None:
    from PIL import Image

    dark = np.zeros((40, 40, 40), dtype=np.float32)
    point = np.array([[5.0, 33.0, 20.0]])  # low x is left, high y is anterior
    data = matches_png((dark, dark), (ONE, ONE), (point, point), scores=np.array([0.9]))
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    axial = pixels[round(HEAD * DPI) : round((HEAD + COLUMN) * DPI), round(GAP * DPI) : round((GAP + COLUMN) * DPI)]
    rows, columns = np.nonzero((axial == 255).all(axis=2))  # the mark in focus alone is white
    assert len(rows) > 20
    assert np.median(columns) / axial.shape[1] > 0.75 and np.median(rows) / axial.shape[0] < 0.3
