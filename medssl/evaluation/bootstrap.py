"""Percentile bootstrap by patient: images of one patient are not independent, so patients are what is drawn again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from medssl.errors import RequestError
from medssl.seeding import counter_rng

Statistic = Callable[[np.ndarray], float]


def bootstrap_interval(
    values: np.ndarray,
    groups: Sequence[str] | None,
    *,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    statistic: Statistic = np.mean,
) -> tuple[float, float, float]:
    """Estimate a statistic and its percentile interval, drawing whole groups with replacement.

    Every draw takes as many groups as there are, each with all its rows, and the statistic sees the rows of the drawn
    groups; large groups weigh more in it, as they do in the estimate. Draws in which the statistic is not finite (a
    class without an image, say) are left out of the interval.

    Args:
        values: (N,) one value per image, or (N, K) one row per image, for instance target and prediction.
        groups: Patient of each row; None draws single images, which gives intervals that are too narrow where patients
            have several.
        draws: Number of draws, 1 or more.
        seed: Seed of the draws; the order of the rows has no influence on which groups are drawn.
        level: Coverage, between 0 and 1.
        statistic: Function of the drawn rows, (M,) or (M, K), to a number.

    Returns:
        Estimate on all rows, lower and upper bound; the bounds are NaN with fewer than two groups, or no finite draw.

    Raises:
        RequestError: No values, values that are not finite, or not one group per value.

    Reference:
        Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13 (percentile interval), with clusters as
        units (Davison and Hinkley 1997, section 3.8).
    """
    asked = lambda rows: np.array([float(statistic(rows))])  # noqa: E731
    found = bootstrap_vector(values, groups, draws=draws, seed=seed, level=level, statistic=asked)
    value, low, high = (float(numbers[0]) for numbers in found)
    return value, low, high


def bootstrap_vector(
    values: np.ndarray,
    groups: Sequence[str] | None,
    *,
    statistic: Callable[[np.ndarray], np.ndarray],
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Estimate several numbers and their percentile intervals from the same draws; see `bootstrap_interval`.

    Args:
        values: See there.
        groups: See there.
        statistic: Function of the drawn rows to (K,) numbers.
        draws: Number of draws, 1 or more.
        seed: Seed of the draws.
        level: Coverage, between 0 and 1.

    Returns:
        Estimates, lower and upper bounds, (K,) each.

    Raises:
        RequestError: As `bootstrap_interval`.
    """
    values = np.asarray(values, dtype=np.float64)
    _check_values(values, draws, level)
    estimate = np.asarray(statistic(values), dtype=np.float64)
    members = _members(len(values), groups)
    if len(members) < 2:
        return estimate, np.full_like(estimate, np.nan), np.full_like(estimate, np.nan)
    results = np.array([statistic(values[rows]) for rows in _draws(members, draws, seed)], dtype=np.float64)
    bounds = np.array([_bounds(column, level) for column in results.T])
    return estimate, bounds[:, 0], bounds[:, 1]


def paired_bootstrap(
    a: np.ndarray,
    b: np.ndarray,
    groups: Sequence[str] | None,
    *,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    statistic: Statistic = np.mean,
) -> tuple[float, float, float]:
    """Estimate statistic(a) - statistic(b) and its percentile interval; both see the same drawn patients.

    Args:
        a: (N,) or (N, K) rows of the first model, one per image.
        b: Rows of the second model for the same images in the same order.
        groups: Patient of each row; None draws single images.
        draws: Number of draws, 1 or more.
        seed: Seed of the draws.
        level: Coverage, between 0 and 1.
        statistic: Function of the drawn rows to a number.

    Returns:
        Difference on all rows, lower and upper bound; the bounds are NaN with fewer than two groups, or no finite draw.

    Raises:
        RequestError: The models do not have the same number of rows, or the values are unusable (`bootstrap_interval`).
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if len(a) != len(b):
        raise RequestError(
            f"paired bootstrap: {len(a)} values of one model and {len(b)} of the other; it compares the same images "
            "in the same order; keep the images that both models scored"
        )
    _check_values(a, draws, level)
    _check_values(b, draws, level)
    difference = float(statistic(a)) - float(statistic(b))
    members = _members(len(a), groups)
    if len(members) < 2:
        return difference, float("nan"), float("nan")
    results = np.array([float(statistic(a[rows])) - float(statistic(b[rows])) for rows in _draws(members, draws, seed)])
    return difference, *_bounds(results, level)


def paired_p(
    a: np.ndarray, b: np.ndarray, groups: Sequence[str] | None, *, draws: int = 2000, seed: int = 0, statistic: Statistic = np.mean
) -> float:
    """Return the two-sided p-value of statistic(a) - statistic(b) being 0: twice the share of draws on the rarer side, at least 1 / draws.

    Arguments as in `paired_bootstrap`; NaN with fewer than two groups, or no finite draw.

    Reference:
        Efron and Tibshirani 1993, section 15.4 (a bootstrap achieved significance level by inverting the percentile interval).
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    _check_values(a, draws, 0.95)
    _check_values(b, draws, 0.95)
    members = _members(len(a), groups)
    if len(members) < 2:
        return float("nan")
    found = np.array([float(statistic(a[rows])) - float(statistic(b[rows])) for rows in _draws(members, draws, seed)])
    found = found[np.isfinite(found)]
    if not len(found):
        return float("nan")
    return min(1.0, max(2 * min(float((found <= 0).mean()), float((found >= 0).mean())), 1 / len(found)))


def _check_values(values: np.ndarray, draws: int, level: float) -> None:
    if len(values) == 0 or not np.isfinite(values).all():
        found = "no values" if len(values) == 0 else f"{int((~np.isfinite(values)).sum())} values that are not finite"
        raise RequestError(f"bootstrap: {found}; it needs one finite number or more; leave such images out and count them")
    if draws < 1 or not 0 < level < 1:
        raise RequestError(f"bootstrap: draws {draws}, level {level}; give 1 draw or more and a level between 0 and 1")


def _members(n: int, groups: Sequence[str] | None) -> list[np.ndarray]:
    """Return the row numbers of each group, groups in sorted order so that the order of the rows does not matter."""
    if groups is None:
        return [np.array([i]) for i in range(n)]
    if len(groups) != n:
        raise RequestError(f"bootstrap: {len(groups)} group names for {n} values; give one per value")
    names, inverse = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    return [np.flatnonzero(inverse == i) for i in range(len(names))]


def _draws(members: list[np.ndarray], draws: int, seed: int) -> Iterator[np.ndarray]:
    generator = counter_rng(seed, "bootstrap")
    for _ in range(draws):
        picked = generator.integers(len(members), size=len(members))
        yield np.concatenate([members[i] for i in picked])


def _bounds(results: np.ndarray, level: float) -> tuple[float, float]:
    results = results[np.isfinite(results)]
    if len(results) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(results, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
