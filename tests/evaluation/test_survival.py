"""Survival: concordance and partial likelihood by hand and by plain loops, and a fit that learns."""

from __future__ import annotations

import math

import numpy as np
import pytest

from medssl.errors import RequestError
from medssl.evaluation import survival
from medssl.evaluation.scores import patient_folds
from medssl.evaluation.survival import PartialLikelihood, concordance, cox_path, fit_cox, fold_order


def table(*rows: tuple[float, int, float]) -> np.ndarray:
    return np.array(rows, dtype=np.float64)


@pytest.mark.parametrize(
    ("rows", "index"),
    [
        (table((1, 1, 3), (2, 1, 2), (3, 1, 1)), 1.0),
        (table((1, 1, 1), (2, 1, 2), (3, 1, 3)), 0.0),
        (
            table((1, 1, 3), (2, 0, 9), (3, 1, 1)),
            0.5,
        ),  # the first before the second is wrong, before the third right; the second says nothing
        (table((1, 1, 2), (2, 0, 2), (3, 0, 1)), 0.75),  # one tie of hazards, one right
        (table((1, 1, 2), (1, 0, 1)), 1.0),  # censored at the time of an event: it outlived it
        (table((1, 1, 2), (1, 1, 1)), float("nan")),  # two events at once have no order
        (table((1, 0, 2), (2, 0, 1)), float("nan")),
    ],
)
def test_concordance__by_hand(rows: np.ndarray, index: float) -> None:
    assert concordance(rows) == pytest.approx(index, nan_ok=True)


@pytest.mark.parametrize("seed", range(4))
def test_concordance__equals_the_loop_over_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = np.stack([rng.integers(1, 12, 60), rng.integers(0, 2, 60), rng.integers(0, 8, 60)], axis=1).astype(float)
    pairs = right = 0.0
    for t, e, h in rows:
        for u, f, g in rows:
            if e and (u > t or (u == t and not f)):
                pairs += 1
                right += 1.0 if h > g else 0.5 if h == g else 0.0
    assert concordance(rows) == pytest.approx(right / pairs)
    assert concordance(rows * [1, 1, -1]) == pytest.approx(1 - right / pairs)


def test_likelihood__by_hand_with_ties_as_breslow() -> None:
    """Two events at time 1, one censored at 2, one event at 3, one censored at 3."""
    eta = np.log([2.0, 3.0, 5.0, 7.0, 11.0])
    found, _ = PartialLikelihood(np.array([1.0, 1, 2, 3, 3]), np.array([1, 1, 0, 1, 0])).loss(eta)
    assert found == pytest.approx(-math.log(2 / 28 * 3 / 28 * 7 / 18) / 5)


def toy(seed: int = 0, n: int = 30, wide: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hazards that the first feature doubles and halves, times in whole months, a third censored."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, wide))
    times = np.ceil(12 * rng.exponential(size=n) * np.exp(-1.5 * x[:, 0]))
    return x, np.minimum(times, 40), ((rng.random(n) < 0.67) & (times < 40)).astype(float)


def test_likelihood__has_the_derivatives_of_differences() -> None:
    _, times, events = toy()
    rng = np.random.default_rng(1)
    likelihood, eta, step = PartialLikelihood(times, events), rng.normal(size=30), 1e-5
    assert len(set(times.tolist())) < 30  # ties are there
    _, gradient = likelihood.loss(eta)
    for k in range(30):
        away = step * (np.arange(30) == k)
        assert gradient[k] == pytest.approx(
            (likelihood.loss(eta + away)[0] - likelihood.loss(eta - away)[0]) / (2 * step), abs=1e-8
        )
    direction = rng.normal(size=30)
    change = (likelihood.loss(eta + step * direction)[1] - likelihood.loss(eta - step * direction)[1]) / (2 * step)
    assert likelihood.hessian_times(eta, direction) == pytest.approx(change, abs=1e-8)
    assert likelihood.loss(eta + 700)[0] == pytest.approx(likelihood.loss(eta)[0])  # a level has no say, and does not overflow


def test_cox__of_one_feature_is_where_the_derivative_is_zero_and_of_many_features_the_same() -> None:
    x, times, events = toy(wide=1)
    (weight,) = cox_path(x, times, events, [0.1])
    grid = np.linspace(-3, 3, 6001)
    losses = [PartialLikelihood(times, events).loss(x[:, 0] * w)[0] + 0.05 * w**2 for w in grid]
    assert weight[0] == pytest.approx(grid[int(np.argmin(losses))], abs=1e-3)
    rng = np.random.default_rng(2)
    broad = rng.normal(size=(30, 50))  # more features than cases: in the span of the rows
    strong, weak = cox_path(broad, times, events, [1.0, 0.1])
    _, of_eta = PartialLikelihood(times, events).loss(broad @ weak)
    assert np.abs(broad.T @ of_eta + 0.1 * weak).max() < 1e-5 and np.linalg.norm(strong) < np.linalg.norm(weak)


def test_fit__learns_and_choices_are_of_held_out_cases() -> None:
    x, times, events = toy(n=90)
    groups = [f"p{k // 2}" for k in range(60)]
    for held_out in (None, (x[60:75], times[60:75], events[60:75])):
        model = fit_cox(x[:60], times[:60], events[:60], groups, held_out=held_out)
        assert concordance(np.stack([times[75:], events[75:], model.hazard(x[75:])], axis=1)) > 0.7
    silent = (x[60:75], times[60:75], np.zeros(15))  # nothing to choose by: the strongest penalty
    assert fit_cox(x[:60], times[:60], events[:60], None, held_out=silent).alpha == survival.LOGISTIC_ALPHAS[0]
    with pytest.raises(RequestError, match="1 patient"):
        fit_cox(x[:6], times[:6], events[:6], ["p"] * 6)


def test_folds__spread_sites_and_events() -> None:
    rng = np.random.default_rng(0)
    sites = ["a"] * 50 + ["b"] * 20 + ["c"] * 10
    events, times = (np.arange(80) % 2 == 0).astype(float), rng.exponential(size=80)
    folds = patient_folds(fold_order(times, events, sites), None, folds=5, seed=3)
    for fold in range(5):
        inside = [sites[k] for k in np.flatnonzero(folds == fold)]
        assert [inside.count(site) for site in "abc"] == [10, 4, 2]
        assert [int(events[folds == fold][np.array(inside) == site].sum()) for site in "abc"] == [5, 2, 1]
