"""Calibration against plain loops and worked examples."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from medssl.errors import RequestError
from medssl.evaluation.calibration import (
    brier,
    calibration_rows,
    equal_mass_bins,
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


def looped(rows: np.ndarray, bins: int) -> float:
    """Equal-mass calibration error in plain Python: ranks, then the bin of the middle of the ranks of one confidence."""
    cases = sorted((max(row[1:]), float(list(row[1:]).index(max(row[1:])) == row[0])) for row in rows.tolist())
    held: dict[int, list[tuple[float, float]]] = {}
    for own in {confidence for confidence, _ in cases}:
        ranks = [rank for rank, (confidence, _) in enumerate(cases) if confidence == own]
        middle = Fraction(ranks[0] + ranks[-1] + 1, 2)
        held.setdefault(math.floor(bins * middle / len(cases)), []).extend(cases[rank] for rank in ranks)
    gaps = [abs(sum(right for _, right in part) - sum(confidence for confidence, _ in part)) for part in held.values()]
    return sum(gaps) / len(cases)


def test_calibration_error__worked_example() -> None:
    """Two bins of two cases: 0.6 right and 0.7 wrong; 0.9 wrong and 1.0 right."""
    rows = np.array([[0, 0.9, 0.1], [1, 0.7, 0.3], [0, 0.6, 0.4], [1, 0.0, 1.0]])
    rows[0, 0] = 1
    assert expected_calibration_error(rows, bins=2) == pytest.approx((2 * abs(0.5 - 0.65) + 2 * abs(0.5 - 0.95)) / 4)
    found = reliability(rows[:, 1:], rows[:, 0].astype(int), bins=2)
    assert [(row["low"], row["high"], row["n"], row["accuracy"]) for row in found] == [(0.6, 0.7, 2, 0.5), (0.9, 1.0, 2, 0.5)]
    assert [row["confidence"] for row in found] == pytest.approx([0.65, 0.95])


@pytest.mark.parametrize("n", [1, 7, 14, 15, 16, 100, 1001])
@pytest.mark.parametrize("digits", [1, 2, 12])
def test_calibration_error__against_a_loop_in_any_order(n: int, digits: int) -> None:
    rng = np.random.default_rng(n)
    chances = np.round(rng.dirichlet([1, 1, 1], size=n), digits)  # of one digit nearly all are ties
    rows = np.concatenate([rng.integers(3, size=n)[:, None], chances], axis=1)
    asked = expected_calibration_error(rows)
    assert asked == pytest.approx(looped(rows, 15), abs=1e-12)
    order = rng.permutation(n)
    places = equal_mass_bins(chances.max(axis=1))
    assert np.array_equal(equal_mass_bins(chances.max(axis=1)[order]), places[order])
    assert expected_calibration_error(rows[order]) == pytest.approx(asked, abs=1e-12)
    found = reliability(chances, rows[:, 0].astype(int))
    assert sum(row["n"] * abs(row["accuracy"] - row["confidence"]) for row in found) / n == pytest.approx(asked, abs=1e-12)
    assert all(a["high"] < b["low"] for a, b in zip(found, found[1:])), "a confidence lies in one bin, and bins are in order"


@pytest.mark.parametrize("n", [15, 16, 29, 100, 1001])
def test_bins__hold_as_equal_numbers_as_can_be(n: int) -> None:
    sizes = np.bincount(equal_mass_bins(np.random.default_rng(0).random(n)), minlength=15)
    assert len(sizes) == 15 and sizes.max() - sizes.min() <= 1 and sizes.sum() == n


def test_bins__of_ties_and_of_few_cases() -> None:
    assert len(set(equal_mass_bins(np.full(40, 0.7)))) == 1
    assert list(equal_mass_bins(np.array([0.9, 0.5, 0.9, 0.9, 0.6]), bins=5)) == [3, 0, 3, 3, 1]  # ranks 2 to 4: the middle one
    few = np.array([[0, 0.8, 0.2], [0, 0.3, 0.7], [1, 0.4, 0.6]])
    assert len(set(equal_mass_bins(few[:, 1:].max(axis=1)))) == 3
    assert expected_calibration_error(few) == pytest.approx((0.2 + 0.7 + 0.4) / 3)  # every case alone


def test_calibration_error__of_few_cases_is_too_high_even_of_the_true_probabilities() -> None:
    logits, targets = calibrated()
    rows = np.concatenate([targets[:, None], softmax(logits)], axis=1)
    small = np.mean([expected_calibration_error(part) for part in np.split(rows, 100)])  # of 40 cases
    assert small > 0.1 > 5 * expected_calibration_error(rows)


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
