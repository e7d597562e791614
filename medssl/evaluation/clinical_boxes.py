"""What a clinician asks of a detector, from the results of its cells: what is missed and what is found for nothing, case by case.

FROC is read over all scores. For single cases an answer takes a threshold: the one that was fitted on validation cases, to at most one false
positive per image there; where there were none, the score at which the test cases of the same cell have as many, which is FROC's own point.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from medssl.evaluation.bootstrap import Statistic, bootstrap_interval, bootstrap_vector
from medssl.evaluation.box_cases import image_boxes
from medssl.evaluation.box_summary import DRAWS, case_name, in_order, map_over_folds, map_score, matches_of
from medssl.evaluation.detection import (
    FROC_OVERLAP,
    OPERATING_RATE,
    RATES,
    froc,
    of_images,
    operating_point,
    outcomes,
    over_images,
    pick,
    together,
)
from medssl.evaluation.folds import finite_mean, fold_numbers

Result = Mapping[str, Any]


def counted(result: Result) -> dict[str, Any]:
    """Return the result of a cell with its cases counted at its threshold.

    Cases get `threshold`, `fitted` (whether on validation cases), `asked` (whether it was to be: an earlier medssl fitted none), `objects`,
    `right`, `missed`, `wrong` and `f1`: twice what is right over objects and found boxes together; 1 where nothing is and nothing was found.
    """
    images = [image_boxes(case) for case in result["cases"]]
    fitted = result.get("fitted") or {}
    known = fitted.get("threshold")
    threshold = operating_point(images, len(result["classes"])) if known is None else float(known)
    cases = []
    for case, image in zip(result["cases"], images):
        real, found = outcomes(image, threshold)
        right, missed, wrong = int((real == 1).sum()), int((real == 0).sum()), int((found == 0).sum())
        every = 2 * right + missed + wrong
        counts = {
            "objects": right + missed,
            "right": right,
            "missed": missed,
            "wrong": wrong,
            "f1": 2 * right / every if every else 1.0,
        }
        cases.append({**case, "threshold": threshold, "fitted": known is not None, "asked": "threshold" in fitted, **counts})
    return {**result, "cases": cases}


def by_name(result: Result) -> dict[str, Any]:
    """Return a result with its cases in the order of their names, that in which `box_summary` matches them, which it then does once."""
    ordered = {**result, "cases": in_order(result)}
    return {**ordered, "matched": cache(lambda: matches_of(ordered))}


def worst_first(cases: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return counted cases in the order of `how_bad`, equal ones by name; cases without an error are left out."""
    return sorted([case for case in cases if case["f1"] < 1], key=lambda case: (*how_bad(case), case_name(case)))


def how_bad(case: Mapping[str, Any]) -> tuple[bool, float, int]:
    """Return a key that sorts counted cases, worst first: those with a missed object before others, by F1, then by number of errors.

    One box found for nothing in an image without an object makes its F1 0; that is no worse than an object that is missed.
    """
    return not case["missed"], float(case["f1"]), -int(case["missed"]) - int(case["wrong"])


def is_alarm(case: Mapping[str, Any]) -> bool:
    """Say whether something was found in a counted case without an object."""
    return not case["objects"] and case["wrong"] > 0


def headline(results: Sequence[Result]) -> dict[str, Any]:
    """Return the mAP of one number of labels and arm, the mean over seeds."""
    first = results[0]
    found: dict[str, Any] = {"labels": int(first["labels"]), "arm": str(first["arm"]), "seeds": len(results)}
    row = next(row for row in first["rows"] if row["metric"] == "map_10_50")
    if len(results) == 1 and "low" in row:  # as the cell has it: minutes less where there are many boxes
        counts = {"n_cases": row["n_images"], "n_patients": row["n_patients"]}
        return {**found, **counts, **{key: row[key] for key in ("value", "low", "high")}}
    places, patients, statistic = map_score(results)(results, None)
    value, low, high = (_finite(v) for v in bootstrap_interval(places, patients, draws=DRAWS, statistic=statistic))
    counts = {"n_cases": len(places), "n_patients": None if patients is None else len(set(patients))}
    return {**found, **counts, "value": value, "low": low, "high": high}


def froc_row(arm: str, runs: Sequence[Result], patients: Sequence[str] | None, draws: int) -> dict[str, Any]:
    """Return the sensitivity at each rate of false positives per image, and their mean, with intervals; of folds and seeds the mean over them.

    Args:
        arm: Its name.
        runs: Results of one or more seeds on the same cases, folds put together.
        patients: Of the cases in the order of their names, or None.
        draws: Bootstrap draws.

    Returns:
        `at` (rate -> value, low, high), `value`, `low` and `high` of the mean, `n` cases, `n_boxes` objects.
    """
    matches = [together([pick(m, FROC_OVERLAP) for m in matches_of(result)]) for result in runs]
    n, seeds = len(matches[0].real), []
    for own, result in zip(matches, runs, strict=True):
        folds = fold_numbers(in_order(result))
        seeds.append([(folds == k, of_images(own, folds == k)) for k in np.unique(folds)])

    def asked(rows: np.ndarray) -> np.ndarray:
        times = np.bincount(np.asarray(rows, dtype=np.int64), minlength=n)
        of_seeds = []
        for parts in seeds:
            of_folds = np.array([froc(own, times * there)[0] for there, own in parts])
            of_seeds.append([finite_mean(column) for column in of_folds.T])
        at: np.ndarray = np.mean(of_seeds, axis=0)
        return np.append(at, at.mean())

    found = bootstrap_vector(np.arange(n, dtype=np.float64), patients, draws=min(draws, DRAWS), statistic=asked)
    rows = [dict(zip(("value", "low", "high"), map(_finite, numbers))) for numbers in zip(*found)]
    at = {f"{rate:g}": row for rate, row in zip(RATES, rows)}
    return {"arm": arm, "at": at, **rows[-1], "n": n, "n_boxes": int(matches[0].real.sum())}


def operating_rows(
    arm: str, cases: Sequence[Mapping[str, Any]], patients: Sequence[str] | None, draws: int
) -> list[dict[str, Any]]:
    """Return sensitivity and false positives per image on test cases at thresholds fitted on validation cases; none where one was not.

    Args:
        arm: Its name.
        cases: Counted ones.
        patients: Of these, or None.
        draws: Bootstrap draws.
    """
    if not all(case["fitted"] for case in cases):
        return []
    counts = np.array([[case["right"], case["objects"], case["wrong"]] for case in cases], dtype=np.float64)
    asked: dict[str, Statistic] = {
        "sensitivity": lambda rows: rows[:, 0].sum() / rows[:, 1].sum() if rows[:, 1].any() else float("nan"),
        "false_positives": lambda rows: rows[:, 2].mean(),
    }
    found = []
    for metric, statistic in asked.items():
        value, low, high = (_finite(v) for v in bootstrap_interval(counts, patients, draws=draws, statistic=statistic))
        found.append({"arm": arm, "metric": metric, "value": value, "low": low, "high": high, "n": len(cases)})
    return found


def sensitivity(arms: Mapping[str, Result], patients: Mapping[str, Sequence[str] | None], draws: int) -> dict[str, Any]:
    """Return FROC and operating points of the arms.

    Args:
        arms: Name -> result of one seed, its cases counted and in the order of their names.
        patients: Name -> patient of each case, or None.
        draws: Bootstrap draws.
    """
    rows = [row for arm, run in arms.items() for row in operating_rows(arm, run["cases"], patients[arm], draws)]
    return {
        "froc": [froc_row(arm, [run], patients[arm], draws) for arm, run in arms.items()],
        "rows": rows,
        "overlap": FROC_OVERLAP,
        "rate": OPERATING_RATE,
        "asked": all(case["asked"] for run in arms.values() for case in run["cases"]),
        "threshold": {arm: sorted({case["threshold"] for case in run["cases"]}) for arm, run in arms.items()},
    }


def group_map(result: Result) -> tuple[np.ndarray, Callable[[np.ndarray], Statistic]]:
    """Return places of the cases of a result, and places of a group -> its mAP as a statistic of them; of folds the mean over them.

    What was found in other cases is left out before anything is drawn: it would be counted some thousand times for nothing.
    """
    matches, cases = matches_of(result), in_order(result)
    place, folds = {case_name(case): k for k, case in enumerate(cases)}, fold_numbers(cases)

    def of_group(rows: np.ndarray) -> Statistic:
        there = np.isin(np.arange(len(cases)), rows)
        return over_images(map_over_folds([of_images(m, there) for m in matches], folds), len(cases))

    return np.array([place[case_name(case)] for case in result["cases"]], dtype=np.float64), of_group


def is_volume(result: Result) -> bool:
    """Say whether the cases are volumes."""
    boxes = (row[0] for case in result["cases"] for row in [*case["real"], *case["found"]])
    return len(next(boxes, [0] * 4)) == 6


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
