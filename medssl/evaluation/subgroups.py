"""Scores by subgroup: nobody is told that a model is fair from a handful of patients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def gap(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the best and the worst group with a number and what lies between them; None with fewer than two such groups.

    Higher is taken for better; `unknown` is no group here.
    """
    known = [row for row in rows if row["value"] is not None and row["group"] != "unknown"]
    if len(known) < 2:
        return None
    best, worst = max(known, key=lambda row: row["value"]), min(known, key=lambda row: row["value"])
    return {"best": best["group"], "worst": worst["group"], "worst_value": worst["value"], "gap": best["value"] - worst["value"]}
