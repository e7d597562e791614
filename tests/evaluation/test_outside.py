"""Flags of cases that lie outside the training range."""

from __future__ import annotations

import numpy as np
import pytest

from medssl.errors import RequestError
from medssl.evaluation.outside import Look, distance, outside, training_range


def cloud(n: int, seed: int = 0) -> list[Look]:
    rng = np.random.default_rng(seed)
    return [Look((1.0, 1.0, 2.0 + 0.1 * k), "siemens", np.array([1.0, 0, 0]) + 0.05 * rng.normal(size=3)) for k in range(n)]


def by(look: Look, looks: list[Look]) -> list[str]:
    return [flag["by"] for flag in outside(look, training_range(looks))]


def test_case_like_the_training_cases__has_no_flag() -> None:
    assert by(Look((1.0, 1.0, 2.3), "siemens", np.array([1.0, 0, 0])), cloud(10)) == []


def test_spacing_vendor_and_distance__are_flagged_with_numbers() -> None:
    looks = cloud(10)
    flags = outside(Look((1.0, 1.0, 5.0), "ge", np.array([0, 1.0, 0])), training_range(looks))
    assert [flag["by"] for flag in flags] == ["spacing", "vendor", "knn"]
    assert flags[0]["reason"] == "voxel size 5 mm along axis 3, in training 2 to 2.9 mm"
    assert flags[1]["reason"] == "vendor ge, in training siemens"
    assert "distance 1" in flags[2]["reason"] or "distance 0.9" in flags[2]["reason"]


def test_rounded_headers_and_unknown_vendors__are_no_flag() -> None:
    assert by(Look((1.004, 0.996, 2.0), "unknown", None), cloud(5)) == []
    assert by(Look(None, "ge", None), [Look((1.0, 1.0, 1.0), "unknown")]) == []


def test_limit__is_the_quantile_of_leave_one_out_distances() -> None:
    looks = cloud(40)
    span = training_range(looks)
    unit = np.stack([look.feature / np.linalg.norm(look.feature) for look in looks if look.feature is not None])
    away = 1 - unit @ unit.T
    loo = [np.sort(np.delete(away[i], i))[:5].mean() for i in range(len(unit))]
    assert span.limit == pytest.approx(np.quantile(loo, 0.99))
    assert distance(unit[0], span) < loo[0]  # itself is among the neighbours here: why the limit leaves one out


def test_flags_of_exchangeable_cases__are_rare() -> None:
    span = training_range(cloud(200))
    flagged = sum(bool(outside(look, span)) for look in [Look(None, None, c.feature) for c in cloud(200, seed=1)])
    assert flagged <= 10


def test_few_training_cases__give_no_limit() -> None:
    span = training_range(cloud(2))
    assert span.limit is None and outside(Look(None, None, np.array([0, 1.0, 0])), span) == []
    assert span.facts()["knn_limit"] is None and span.facts()["n"] == 2
    with pytest.raises(RequestError, match="no training case"):
        training_range([])
    assert training_range([Look((1.0, 1.0)), Look((1.0, 1.0, 1.0))]).low_mm == ()


def patients(count: int, images: int, first: int = 0) -> list[Look]:
    """Cases of one patient lie close together, patients far apart."""
    rng = np.random.default_rng(3)
    middles = rng.normal(size=(50, 6))
    return [
        Look(None, None, middles[k] + 0.01 * rng.normal(size=6), f"patient{k}")
        for k in range(first, first + count)
        for _ in range(images)
    ]


def test_limit__leaves_out_all_cases_of_the_patient() -> None:
    span = training_range(patients(20, 8))
    flagged = sum(bool(outside(look, span)) for look in patients(20, 8, first=20))
    assert flagged <= 16  # of 160; with the neighbours of one's own all of them
    assert (span.facts()["n"], span.facts()["n_patients"], span.facts()["neighbours"]) == (160, 20, 5)


def test_many_cases_of_few_patients__give_no_limit() -> None:
    assert training_range(patients(2, 30)).limit is None
    most = [*patients(1, 30), *patients(2, 1, first=1)]
    span = training_range(most)
    assert span.neighbours == 2 and span.limit is not None and np.isfinite(span.limit)
    assert np.isfinite(distance(np.ones(6), span))
