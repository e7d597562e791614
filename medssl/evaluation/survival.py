"""Survival on frozen features: proportional hazards with a ridge penalty, and how often the order of events is foretold.

A case has a time, and an event (1) at that time or none until then (0: censored). What is predicted is a log-hazard: higher means earlier.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medssl.evaluation.linear_probe import INNER_FOLDS, LOGISTIC_ALPHAS, row_basis
from medssl.evaluation.scores import check_features, patient_folds
from medssl.evaluation.target_cases import Cases


@dataclass(frozen=True)
class SurvivalCases:
    """Labelled cases whose targets are times, and (N,) whether an event (1) ended each, or it was censored (0)."""

    cases: Cases
    events: np.ndarray

    def rows(self, rows: np.ndarray, hazard: np.ndarray) -> np.ndarray:
        """Return (M, 3) time, event and hazard of rows, as `concordance` takes them."""
        return np.stack([self.cases.targets[rows], self.events[rows], hazard], axis=1)


def concordance(rows: np.ndarray) -> float:
    """Return Harrell's index: of the pairs whose order is known, the share in which the case with the earlier event has the higher hazard.

    The order of a pair is known where the earlier time is an event; a case censored at the time of an event outlived it; two events at one
    time have no order. Equal hazards count half.

    Args:
        rows: (N, 3), time, event (0 or 1) and hazard, on any scale.

    Returns:
        0 to 1, 0.5 by chance; NaN without such a pair.

    Reference:
        Harrell et al. 1996, "Multivariable prognostic models", section 5.5; ties as in Therneau's R package survival, `concordance`.
    """
    pairs, right = 0, 0.0
    outlived: list[
        float
    ] = []  # hazards, sorted, of those who outlived the case at hand: cases are met from the last time to the first
    at_once: list[float] = []  # of events at its time
    before = math.nan
    for time, event, hazard in rows[np.lexsort((rows[:, 1] > 0.5, -rows[:, 0]))].tolist():
        if time != before:
            for one in at_once:
                insort(outlived, one)
            at_once, before = [], time
        if event > 0.5:
            lower, as_low = bisect_left(outlived, hazard), bisect_right(outlived, hazard)
            pairs += len(outlived)
            right += lower + 0.5 * (as_low - lower)
            at_once.append(hazard)
        else:
            insort(outlived, hazard)
    return right / pairs if pairs else float("nan")


class PartialLikelihood:
    """Minus Cox's log partial likelihood per case, with ties of events as Breslow takes them, and its derivatives by the log-hazards.

    Args:
        times: (N,).
        events: (N,) 0 or 1.

    Reference:
        Cox 1972, "Regression Models and Life-Tables", section 4; Breslow 1974, "Covariance Analysis of Censored Survival Data", section 4:
        every one of d events at a time has the whole risk set below it.
    """

    def __init__(self, times: np.ndarray, events: np.ndarray) -> None:
        self.events = np.asarray(events, dtype=np.float64)
        values, place = np.unique(times, return_inverse=True)
        self._place, self._count = place.reshape(-1), len(values)
        self._deaths = self._sum(self.events)  # (T,) at every time

    def _sum(self, values: np.ndarray) -> np.ndarray:
        """Return (T,) the sums of (N,) values over the cases of every time."""
        return np.bincount(self._place, weights=values, minlength=self._count)

    def _at_risk(self, values: np.ndarray) -> np.ndarray:
        """Return (T,) the sums of (N,) values over the cases that are still there at every time."""
        found: np.ndarray = np.cumsum(self._sum(values)[::-1])[::-1]
        return found

    def loss(self, eta: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the value at log-hazards (N,), and its gradient (N,)."""
        largest = eta.max()
        hazard = np.exp(eta - largest)
        risk = self._at_risk(hazard)
        died = self._deaths > 0
        value = float((self._deaths[died] * np.log(risk[died])).sum()) + largest * self.events.sum() - float(self.events @ eta)
        gradient = hazard * self._hazard_so_far(risk)[self._place] - self.events
        return value / len(eta), gradient / len(eta)

    def hessian_times(self, eta: np.ndarray, direction: np.ndarray) -> np.ndarray:
        """Return the second derivative at log-hazards (N,), times a direction (N,)."""
        hazard = np.exp(eta - eta.max())
        risk = self._at_risk(hazard)
        share = self._at_risk(hazard * direction) / risk**2
        found: np.ndarray = hazard * (
            self._hazard_so_far(risk)[self._place] * direction - np.cumsum(self._deaths * share)[self._place]
        )
        return found / len(eta)

    def _hazard_so_far(self, risk: np.ndarray) -> np.ndarray:
        """Return (T,) the baseline hazard up to every time: deaths over the sum of hazards at risk."""
        found: np.ndarray = np.cumsum(self._deaths / risk)
        return found


@dataclass(frozen=True)
class CoxModel:
    """Fitted proportional hazards of standardised features.

    Args:
        mean: (E,) of the features it was fitted on.
        scale: (E,) their standard deviation, 1 where it is 0.
        weight: (E,).
        alpha: The penalty that was chosen.
    """

    mean: np.ndarray
    scale: np.ndarray
    weight: np.ndarray
    alpha: float

    def hazard(self, features: np.ndarray) -> np.ndarray:
        """Return (N,) log-hazards, against a case with mean features."""
        found: np.ndarray = (np.asarray(features, dtype=np.float64) - self.mean) / self.scale @ self.weight
        return found


def cox_path(x: np.ndarray, times: np.ndarray, events: np.ndarray, alphas: Sequence[float]) -> list[np.ndarray]:
    """Fit proportional hazards for several penalties, strongest first, each from the one before.

    Minimises the loss of `PartialLikelihood` + alpha / 2 * |w|^2, in the span of the rows of x where these are fewer than features.

    Args:
        x: (N, E) features.
        times: (N,).
        events: (N,) 0 or 1.
        alphas: Penalties above 0, in falling order.

    Returns:
        Weights (E,) per penalty.
    """
    from scipy.optimize import minimize

    basis = row_basis(x) if x.shape[0] < x.shape[1] else None
    reduced = x if basis is None else x @ basis
    likelihood, weight, path = PartialLikelihood(times, events), np.zeros(reduced.shape[1]), []
    for alpha in alphas:

        def loss(w: np.ndarray, alpha: float = alpha) -> tuple[float, np.ndarray]:
            value, of_eta = likelihood.loss(reduced @ w)
            return value + alpha / 2 * float(w @ w), reduced.T @ of_eta + alpha * w

        def hessian_times(w: np.ndarray, direction: np.ndarray, alpha: float = alpha) -> np.ndarray:
            found: np.ndarray = reduced.T @ likelihood.hessian_times(reduced @ w, reduced @ direction) + alpha * direction
            return found

        options = {"maxiter": 100, "xtol": 1e-8}
        weight = minimize(loss, weight, jac=True, hessp=hessian_times, method="Newton-CG", options=options).x
        path.append(weight if basis is None else basis @ weight)
    return path


def fit_cox(
    features: np.ndarray,
    times: np.ndarray,
    events: np.ndarray,
    groups: Sequence[str] | None,
    *,
    held_out: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
    seed: int = 0,
) -> CoxModel:
    """Fit with the penalty of the best concordance on held-out cases, or on inner folds of patients; on a tie the stronger one wins.

    Args:
        features: (N, E).
        times: (N,).
        events: (N,) 0 or 1.
        groups: Patient of each case; None makes each case its own.
        held_out: Features, times and events of validation cases; None takes inner folds.
        seed: Of the inner folds.

    Raises:
        RequestError: Unusable features, or fewer than two patients where folds are dealt.
    """
    own = None if held_out is not None else groups  # one patient may train where others validate
    features = check_features(features, times, own)
    if held_out is not None:
        rows = [(np.arange(len(times)), held_out)]
    else:
        inner = patient_folds(fold_order(times, events), groups, folds=INNER_FOLDS, seed=seed)
        rows = [
            (np.flatnonzero(inner != k), (features[inner == k], times[inner == k], events[inner == k])) for k in np.unique(inner)
        ]
    found = []
    for fit, (x, t, e) in rows:
        models = _models(features[fit], times[fit], events[fit], LOGISTIC_ALPHAS)
        found.append([concordance(np.stack([t, e, model.hazard(x)], axis=1)) for model in models])
    merits = np.array(found)
    known = np.isfinite(merits).all(axis=1)  # a fold without a pair of known order has no say
    best = int(merits[known].mean(axis=0).argmax()) if known.any() else 0
    return _models(features, times, events, LOGISTIC_ALPHAS[: best + 1])[-1]


def _models(features: np.ndarray, times: np.ndarray, events: np.ndarray, alphas: Sequence[float]) -> list[CoxModel]:
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 1e-10 * (1 + np.abs(mean)), scale, 1.0)  # as `linear_probe`: a constant is not blown up
    path = cox_path((features - mean) / scale, times, events, alphas)
    return [CoxModel(mean, scale, weight, alpha) for weight, alpha in zip(path, alphas, strict=True)]


def fold_order(times: np.ndarray, events: np.ndarray, sites: Sequence[str] | None = None) -> np.ndarray:
    """Return (N,) numbers by which `patient_folds` deals cases so that folds are alike in sites, then events, then times.

    Args:
        times: (N,).
        events: (N,) 0 or 1.
        sites: Site of each case; None for one site.
    """
    site = np.zeros(len(times)) if sites is None else np.unique(np.asarray(sites, dtype=str), return_inverse=True)[1].reshape(-1)
    rank = np.unique(times, return_inverse=True)[1].reshape(-1) / max(1, len(times))
    found: np.ndarray = site + 0.5 * np.asarray(events) + 0.49 * rank
    return found
