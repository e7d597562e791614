"""How far probabilities can be believed: Brier score, calibration error, reliability, and what makes them better.

Temperature and threshold are fitted on validation cases and used on test cases; nothing here knows the difference, so callers keep them
apart. Probabilities are (N, K), one row per case; classes are numbers from 0 to K - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from medssl.errors import RequestError
from medssl.evaluation.bootstrap import bootstrap_interval

BINS = 15
TEMPERATURES = (0.05, 20.0)


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Return probabilities (N, K) of logits (N, K)."""
    z = np.asarray(logits, dtype=np.float64) / temperature
    powers = np.exp(z - z.max(axis=1, keepdims=True))
    found: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
    return found


def negative_log_likelihood(logits: np.ndarray, targets: np.ndarray, temperature: float = 1.0) -> float:
    """Return the mean of -ln p(target) in nats."""
    z = np.asarray(logits, dtype=np.float64) / temperature
    z = z - z.max(axis=1, keepdims=True)
    return float((np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), targets]).mean())


def fit_temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """Return the temperature, 0.05 to 20, with which validation logits are most likely.

    Args:
        logits: (N, K) of validation cases.
        targets: (N,) classes.

    Raises:
        RequestError: There is no case.

    Reference:
        Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4.2.
    """
    if len(logits) == 0:
        raise RequestError("calibration: no validation case to fit a temperature on; mark some cases as val")
    low, high = np.log(TEMPERATURES)
    found = minimize_scalar(
        lambda t: negative_log_likelihood(logits, targets, float(np.exp(t))), bounds=(low, high), method="bounded"
    )
    return float(np.exp(found.x))


def brier(rows: np.ndarray) -> float:
    """Return the mean over cases of the squared distance between probabilities and the true class, 0 to 2.

    Args:
        rows: (N, 1 + K), class and probabilities.

    Reference:
        Brier 1950, "Verification of forecasts expressed in terms of probability", equation 2.
    """
    target, probability = rows[:, 0].astype(int), rows[:, 1:]
    return float((((probability - np.eye(probability.shape[1])[target]) ** 2).sum(axis=1)).mean())


def equal_mass_bins(confidence: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Return (N,) the bin, 0 to bins - 1, of each case: bins hold as equal numbers of cases as can be, lowest confidence first.

    Equal confidences lie in one bin, whatever the order of the rows: the cases of one confidence take a run of ranks, and the middle of that run
    says the bin, floor(bins * middle / N). Without ties every bin has N / bins cases, rounded up or down. A run longer than a bin makes
    its bin larger and may leave neighbours empty. With fewer cases than bins every confidence is a bin of its own.

    Args:
        confidence: (N,).
        bins: 1 or more.

    Reference:
        Nguyen and O'Connor 2015, "Posterior calibration and exploratory analysis for natural language processing models", adaptive binning;
        Nixon et al. 2019, "Measuring Calibration in Deep Learning", adaptive calibration error. They say nothing of ties; the rule is ours.
    """
    _, place, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    twice_middle = 2 * np.cumsum(counts) - counts  # whole numbers, so that nothing is rounded
    found: np.ndarray = (twice_middle * bins // (2 * len(confidence)))[place.reshape(-1)]
    return found


def expected_calibration_error(rows: np.ndarray, bins: int = BINS) -> float:
    """Return how far confidence and accuracy are apart: mean over bins of equal numbers of cases, weighted by the cases in each.

    With no more cases than bins each confidence is alone in its bin, and the number is the mean of |1 - p| of the cases called rightly and |p| of the
    others: how unsure the network is, rather than how wrong it is about it.

    Args:
        rows: (N, 1 + K), class and probabilities.
        bins: Bins of the confidence, which is the largest probability; see `equal_mass_bins`.

    Reference:
        Naeini et al. 2015, "Obtaining Well Calibrated Probabilities Using Bayesian Binning", section 2, with the bins of Nguyen and O'Connor
        2015. Confidence alone is looked at, not every class as Nixon et al. 2019 do.
    """
    confidence, right, place = _binned(rows[:, 1:], rows[:, 0], bins)
    gaps = np.bincount(place, weights=right - confidence, minlength=bins)  # n of the bin times (accuracy - confidence)
    return float(np.abs(gaps).sum() / len(rows))


def reliability(probabilities: np.ndarray, targets: np.ndarray, bins: int = BINS) -> list[dict[str, Any]]:
    """Return the bins of a reliability plot that hold a case, those of `equal_mass_bins`, lowest confidence first.

    Each has `low` and `high`, the smallest and largest confidence in it, `n`, and `confidence` and `accuracy`, means over the bin.
    """
    confidence, right, place = _binned(probabilities, targets, bins)
    return [
        {
            "low": float(confidence[place == k].min()),
            "high": float(confidence[place == k].max()),
            "n": int((place == k).sum()),
            "confidence": float(confidence[place == k].mean()),
            "accuracy": float(right[place == k].mean()),
        }
        for k in np.unique(place)
    ]


def _binned(probabilities: np.ndarray, targets: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return confidence, whether the likeliest class is the true one (1 or 0), and bin of each case."""
    confidence = probabilities.max(axis=1)
    right = (probabilities.argmax(axis=1) == targets).astype(np.float64)
    return confidence, right, equal_mass_bins(confidence, bins)


def calibration_rows(
    probabilities: np.ndarray, targets: np.ndarray, groups: Sequence[str] | None, *, draws: int = 2000, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """Return Brier score and calibration error with intervals by patient: value, lower and upper bound.

    The calibration error of few cases is too high, the more bins and the fewer cases: hold it against the interval, not against 0. At 15 cases
    or fewer it is no longer one, see `expected_calibration_error`.
    """
    rows = np.concatenate([np.asarray(targets, dtype=np.float64)[:, None], probabilities], axis=1)
    measures = {"brier": brier, "ece": expected_calibration_error}
    return {name: bootstrap_interval(rows, groups, draws=draws, seed=seed, statistic=measure) for name, measure in measures.items()}


def threshold_at_specificity(scores: np.ndarray, targets: np.ndarray, specificity: float) -> float:
    """Return the lowest threshold at which validation cases of class 0 stay below it at least as often as asked.

    A case is called positive when its score is at the threshold or above.

    Args:
        scores: (N,) of validation cases; higher means class 1.
        targets: (N,) 0 or 1.
        specificity: Above 0, at most 1.

    Raises:
        RequestError: There is no case of class 0, or the share is out of range.
    """
    negatives = np.sort(np.asarray(scores, dtype=np.float64)[np.asarray(targets) == 0])
    if not 0 < specificity <= 1:
        raise RequestError(f"specificity is {specificity}; accepted: above 0, at most 1")
    if len(negatives) == 0:
        raise RequestError("no validation case of class 0 to fit a threshold on; mark some as val")
    below = int(np.ceil(specificity * len(negatives) - 1e-9))  # so many must lie below the threshold
    return float(np.nextafter(negatives[below - 1], np.inf))
