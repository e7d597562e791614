"""Bland and Altman's numbers against worked examples."""

from __future__ import annotations

import numpy as np
import pytest

from medssl.errors import RequestError
from medssl.evaluation.agreement import bland_altman


def test_limits__are_bias_and_two_standard_deviations() -> None:
    reference = np.array([10.0, 20.0, 30.0, 40.0])
    measured = np.array([11.0, 20.0, 33.0, 42.0])
    found = bland_altman(reference, measured, None, draws=50)
    difference = measured - reference
    assert found.bias[0] == pytest.approx(1.5) and found.n == 4
    assert found.lower[0] == pytest.approx(1.5 - 1.96 * difference.std(ddof=1), abs=1e-3)
    assert found.upper[0] == pytest.approx(1.5 + 1.96 * difference.std(ddof=1), abs=1e-3)
    assert found.slope[0] == pytest.approx(np.polyfit((reference + measured) / 2, difference, 1)[0])


def test_intervals__of_the_limits_cover_the_truth_by_patient() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(60):
        patient = np.repeat(np.arange(40), 2)
        offset = rng.normal(size=40)[patient]
        reference = rng.uniform(50, 100, 80)
        measured = reference + 2 + offset + 0.2 * rng.normal(size=80)
        found = bland_altman(reference, measured, [str(p) for p in patient], draws=200, seed=trial)
        covered += found.bias[1] <= 2 <= found.bias[2]
    assert 50 <= covered <= 60


def test_error_that_grows_with_size__has_a_slope_away_from_0() -> None:
    rng = np.random.default_rng(0)
    reference = rng.uniform(50, 100, 100)
    growing = bland_altman(reference, 1.2 * reference + rng.normal(size=100), None, draws=200)
    steady = bland_altman(reference, reference + 10 + rng.normal(size=100), None, draws=200)
    assert growing.slope[1] > 0.1 and steady.slope[1] < 0 < steady.slope[2]


def test_pairs_that_are_none__are_refused() -> None:
    with pytest.raises(RequestError, match="3 references and 2 measurements"):
        bland_altman([1, 2, 3], [1, 2], None)
