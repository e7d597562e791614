"""Calibration against plain loops and worked examples."""

from __future__ import annotations

import math

import numpy as np
import pytest

from medssl.errors import RequestError
from medssl.evaluation.calibration import (
    brier,
    calibration_rows,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    reliability,
    softmax,
    threshold_at_specificity,
)


def calibrated(n: int = 4000, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose softmax is the truth, and classes drawn from it."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(n, classes))
    return logits, np.array([rng.choice(classes, p=row) for row in softmax(logits)])


def test_softmax_and_likelihood__against_a_loop() -> None:
    logits, targets = np.random.default_rng(0).normal(size=(5, 4)) * 50, np.array([0, 1, 2, 3, 0])
    rows = [[math.exp((v - max(row)) / 2.0) for v in row] for row in logits]
    expected = np.array([[v / sum(row) for v in row] for row in rows])
    assert np.allclose(softmax(logits, 2.0), expected)
    assert negative_log_likelihood(logits, targets, 2.0) == pytest.approx(
        -np.mean([math.log(expected[n, k]) for n, k in enumerate(targets)])
    )


def test_temperature__of_sharpened_logits_is_found() -> None:
    logits, targets = calibrated()
    assert fit_temperature(logits, targets) == pytest.approx(1.0, abs=0.06)
    assert fit_temperature(3 * logits, targets) == pytest.approx(3.0, abs=0.18)
    assert fit_temperature(logits / 2, targets) == pytest.approx(0.5, abs=0.03)
    with pytest.raises(RequestError, match="mark some cases as val"):
        fit_temperature(logits[:0], targets[:0])


def test_brier__worked_example() -> None:
    rows = np.array([[0, 0.8, 0.2], [1, 0.8, 0.2], [1, 0.0, 1.0]])
    assert brier(rows) == pytest.approx((0.2**2 * 2 + 0.8**2 * 2 + 0) / 3)


def test_calibration_error__worked_example_and_edges() -> None:
    """Confidence 0.9 twice, right once: bin (0.8, 1]; confidence 0.6, right: bin (0.4, 0.6]; confidence 1 stays inside."""
    rows = np.array([[0, 0.9, 0.1], [1, 0.9, 0.1], [0, 0.6, 0.4], [1, 0.0, 1.0]])
    upper = 3 * abs(2 / 3 - (0.9 + 0.9 + 1.0) / 3)
    assert expected_calibration_error(rows, bins=5) == pytest.approx((upper + 1 * abs(1 - 0.6)) / 4)
    found = reliability(rows[:, 1:], rows[:, 0].astype(int), bins=5)
    assert [(row["low"], row["high"], row["n"]) for row in found] == [(0.4, 0.6, 1), (0.8, 1.0, 3)]


def test_calibration_error__is_small_when_calibrated_and_large_when_too_sure() -> None:
    logits, targets = calibrated()
    patients = [str(n // 2) for n in range(len(targets))]
    honest = calibration_rows(softmax(logits), targets, patients, draws=100)
    sure = calibration_rows(softmax(4 * logits), targets, patients, draws=100)
    assert honest["ece"][0] < 0.03 and sure["ece"][0] > 0.1 and sure["brier"][0] > honest["brier"][0]
    for value, low, high in (*honest.values(), *sure.values()):
        assert low <= high and low - 0.02 < value < high + 0.02


def test_threshold__keeps_the_specificity_of_the_cases_it_was_fitted_on() -> None:
    scores = np.array([0.1, 0.2, 0.3, 0.3, 0.9, 0.8])
    targets = np.array([0, 0, 0, 0, 1, 0])
    for wanted in (0.2, 0.5, 0.8, 1.0):
        threshold = threshold_at_specificity(scores, targets, wanted)
        negatives = scores[targets == 0]
        assert (negatives < threshold).mean() >= wanted
        lower = np.nextafter(threshold, -np.inf)
        assert (negatives < lower).mean() < wanted, "a lower threshold would do"
    with pytest.raises(RequestError, match="no validation case of class 0"):
        threshold_at_specificity(scores[4:5], targets[4:5], 0.9)
    with pytest.raises(RequestError, match="above 0, at most 1"):
        threshold_at_specificity(scores, targets, 0.0)
