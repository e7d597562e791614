"""Scores by subgroup: nobody is told that a model is fair from a handful of patients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from medssl.evaluation.bootstrap import Statistic
from medssl.evaluation.scores import score_row

SMALLEST, POSITIVES = 50, 10
"""Cases, and cases of the rarer class, below which a group has no number of its own."""
BANDS = (18, 40, 60, 75)
"""Ages at which a band begins: 0 to 17, 18 to 39, 40 to 59, 60 to 74, 75 and over."""


def age_band(age: float | None) -> str:
    """Return the band of an age in years, or `unknown`."""
    if age is None or not np.isfinite(age):
        return "unknown"
    edges = (0, *BANDS)
    place = int(np.searchsorted(BANDS, age, side="right"))
    return f"{edges[place]} and over" if place == len(BANDS) else f"{edges[place]} to {BANDS[place] - 1}"


def subgroup_rows(
    name: str,
    probe: str,
    metric: str,
    values: np.ndarray,
    attribute: Sequence[str],
    groups: Sequence[str] | None,
    *,
    statistic: Statistic = np.mean,
    statistic_of: Callable[[np.ndarray], Statistic] | None = None,
    positives: Sequence[bool] | np.ndarray | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Score each value of an attribute by itself.

    Args:
        name: See `scores.score_row`.
        probe: See there.
        metric: See there.
        values: (N,) or (N, K), what the statistic is of.
        attribute: (N,) for instance sex, band of age, scanner; `unknown` is a group like the others.
        groups: Patient of each case, or None.
        statistic: Of the rows.
        statistic_of: Values of a group -> its statistic, where each has its own.
        positives: (N,) bool for scores of two classes, whose rarer one must be there too.
        draws: Bootstrap draws.
        seed: Seed of the draws.

    Returns:
        One row per group, with `group` and `sufficient`; `value`, `low` and `high` are None where there are fewer than 50 cases, or
        fewer than 10 of either class.

    Reference:
        The rule of the smallest group: card evaluation-protocols, section B.
    """
    kinds = np.asarray(attribute, dtype=str)
    rows = []
    for kind in sorted(set(kinds.tolist())):
        inside = np.flatnonzero(kinds == kind)
        own = None if groups is None else [str(groups[int(k)]) for k in inside]
        enough = len(inside) >= SMALLEST
        if positives is not None:
            share = int(np.asarray(positives, dtype=bool)[inside].sum())
            enough = enough and min(share, len(inside) - share) >= POSITIVES
        if enough:
            mine = np.asarray(values)[inside]
            asked = statistic if statistic_of is None else statistic_of(mine)
            row = score_row(name, probe, metric, mine, own, statistic=asked, draws=draws, seed=seed)
        else:
            row = {"name": name, "probe": probe, "metric": metric, "value": None, "low": None, "high": None}
            row |= {"n_images": len(inside), "n_patients": None if own is None else len(set(own))}
            row |= {"by": "by image" if groups is None else "by patient"}
        rows.append({**row, "group": kind, "sufficient": enough})
    return rows


def equalised_odds(
    name: str,
    probe: str,
    calls: np.ndarray,
    targets: np.ndarray,
    attribute: Sequence[str],
    groups: Sequence[str] | None,
    usable: Collection[str],
    *,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Return the equalised-odds difference: of the spreads over groups of true- and false-positive rate, the larger.

    The interval is of the rate and the two groups that make it, signed, or no interval could hold 0; as they were picked on these same
    cases the difference is too large.

    Args:
        name: See `scores.score_row`.
        probe: See there.
        calls: (N,) bool, called positive at a threshold that these cases had no part in.
        targets: (N,) 0 or 1.
        attribute: (N,) group of each case.
        groups: Patient of each case, or None.
        usable: Groups that are large enough (see `subgroup_rows`).
        draws: Bootstrap draws.
        seed: Seed of the draws.

    Returns:
        A row (`scores.score_row`) with `rate` (true_positive_rate or false_positive_rate) and `groups`, the one with more and the one with
        fewer; None with fewer than two groups.

    Reference:
        Hardt et al. 2016, "Equality of Opportunity in Supervised Learning", definition 2.1; the larger of the two differences as in
        Bird et al. 2020, "Fairlearn", `equalized_odds_difference`.
    """
    kinds, table = np.asarray(attribute, dtype=str), np.stack([targets, calls], axis=1).astype(np.float64)
    names = sorted(usable)
    if len(names) < 2:
        return None
    spreads = []
    for rate, kind in (("true_positive_rate", 1.0), ("false_positive_rate", 0.0)):
        found = [called(table[kinds == group], kind) for group in names]
        high, low = int(np.argmax(found)), int(np.argmin(found))
        spreads.append((found[high] - found[low], rate, kind, names[high], names[low]))
    _, rate, kind, high_group, low_group = max(spreads, key=lambda spread: spread[0])
    marked = np.concatenate([table, (kinds == high_group)[:, None], (kinds == low_group)[:, None]], axis=1)

    def difference(rows: np.ndarray) -> float:
        return called(rows[rows[:, 2] > 0], kind) - called(rows[rows[:, 3] > 0], kind)

    row = score_row(name, probe, "equalised_odds_difference", marked, groups, statistic=difference, draws=draws, seed=seed)
    inside = np.isin(kinds, names)
    row |= {"n_images": int(inside.sum())}
    row |= {"n_patients": None if groups is None else len({str(groups[int(k)]) for k in np.flatnonzero(inside)})}
    return {**row, "rate": rate, "groups": (high_group, low_group)}


def called(rows: np.ndarray, kind: float) -> float:
    """Return the share of the cases of a class that is called positive; NaN without one.

    Args:
        rows: (N, 2 or more), target and call.
        kind: 1 for the true-positive rate, 0 for the false-positive rate.
    """
    calls = rows[rows[:, 0] == kind, 1]
    return float(calls.mean()) if len(calls) else float("nan")


def gap(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the best and the worst group with a number and what lies between them; None with fewer than two such groups.

    Higher is taken for better; `unknown` is no group here.
    """
    known = [row for row in rows if row["value"] is not None and row["group"] != "unknown"]
    if len(known) < 2:
        return None
    best, worst = max(known, key=lambda row: row["value"]), min(known, key=lambda row: row["value"])
    return {"best": best["group"], "worst": worst["group"], "worst_value": worst["value"], "gap": best["value"] - worst["value"]}
