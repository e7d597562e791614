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


def expected_calibration_error(rows: np.ndarray, bins: int = BINS) -> float:
    """Return how far confidence and accuracy are apart: mean over bins of equal width, weighted by the cases in each.

    Args:
        rows: (N, 1 + K), class and probabilities.
        bins: Bins of the confidence, which is the largest probability.

    Reference:
        Naeini et al. 2015, "Obtaining Well Calibrated Probabilities Using Bayesian Binning", section 2; bins (0, 1/M], (1/M, 2/M] ...
    """
    found = reliability(rows[:, 1:], rows[:, 0].astype(int), bins)
    return float(sum(row["n"] * abs(row["accuracy"] - row["confidence"]) for row in found) / len(rows))


def reliability(probabilities: np.ndarray, targets: np.ndarray, bins: int = BINS) -> list[dict[str, Any]]:
    """Return the bins of a reliability plot that hold a case: low, high, n, confidence and accuracy (means over the bin)."""
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == targets
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return [
        {
            "low": k / bins,
            "high": (k + 1) / bins,
            "n": int((place == k).sum()),
            "confidence": float(confidence[place == k].mean()),
            "accuracy": float(right[place == k].mean()),
        }
        for k in np.unique(place)
    ]


def calibration_rows(
    probabilities: np.ndarray, targets: np.ndarray, groups: Sequence[str] | None, *, draws: int = 2000, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """Return Brier score and calibration error with intervals by patient: value, lower and upper bound.

    The calibration error of few cases is too high, the more bins and the fewer cases: hold it against the interval, not against 0.
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
