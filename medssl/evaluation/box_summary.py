"""The table of cells of detection: mAP over overlaps 0.1 to 0.5, and what all other readers of their results share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from medssl.errors import RequestError
from medssl.evaluation.box_cases import image_boxes
from medssl.evaluation.cell_summary import Asked, Result, Score, summarise_cells
from medssl.evaluation.detection import Matches, match_classes, mean_average_precision, of_images, over_images
from medssl.evaluation.folds import finite_mean, fold_numbers

DRAWS = 1000
"""Bootstrap draws: each counts all found boxes again."""


def summarise(results: Sequence[Result], *, intervals: bool = True) -> dict[str, Any]:
    """Return the mAP per (labels, arm) and paired differences to scratch; see `summarise_cells`.

    Args:
        results: Of finished cells.
        intervals: Whether to draw them: minutes where test cases have many boxes, so that they wait for the last cell.
    """
    return summarise_cells(results, "map_10_50", "higher", map_score, draws=DRAWS if intervals else 0)


def map_score(results: Sequence[Result]) -> Score:
    """Return how runs are scored: rows are places of test images, matched once and counted as often as they are drawn."""
    names = case_names(results[0])
    known: dict[int, Callable[[np.ndarray], float]] = {}

    def scores_of(runs: Sequence[Result]) -> list[Callable[[np.ndarray], float]]:
        for run in runs:
            if id(run) not in known:
                if case_names(run) != names:
                    raise RequestError(
                        "cells were scored on different test cases; one table needs the same; remove the cells and run again"
                    )
                known[id(run)] = map_over_folds(matches_of(run), fold_numbers(in_order(run)))
        return [known[id(run)] for run in runs]

    def score(runs: Sequence[Result], less: Sequence[Result] | None) -> Asked:
        ours = _mean_of(scores_of(runs))
        asked = ours
        if less is not None:
            theirs = _mean_of(scores_of(less))
            asked = lambda times: ours(times) - theirs(times)  # noqa: E731
        patients = [case["patient_id"] for case in in_order(runs[0])]
        places = np.arange(len(names), dtype=np.float64)
        return places, None if None in patients else patients, over_images(asked, len(names))

    return score


def case_name(case: Mapping[str, Any]) -> str:
    """Return how results call a case."""
    return str(case.get("series_id") or case["case"])


def in_order(result: Result) -> list[Mapping[str, Any]]:
    """Return the cases of a result by name: folds and seeds score them in another order."""
    return sorted(result["cases"], key=case_name)


def case_names(result: Result) -> list[str]:
    """Return the names of the tested cases, sorted."""
    return [case_name(case) for case in in_order(result)]


def matches_of(result: Result) -> list[Matches]:
    """Match the boxes of every class of a result, images in the order of their names; `matched` of a result has done so."""
    if (known := result.get("matched")) is not None:
        done: list[Matches] = known()
        return done
    return match_classes([image_boxes(case) for case in in_order(result)], len(result["classes"]))


def over_folds(
    matches: Sequence[Matches], folds: np.ndarray, score: Callable[[Sequence[Matches], np.ndarray], float]
) -> Callable[[np.ndarray], float]:
    """Return the mean over folds of a score of matches, as a function of how often each image counts; see `folds`.

    Args:
        matches: Of one class each.
        folds: (I,) fold of each image.
        score: (matches of a fold, times) -> number; a fold without one is left out.
    """
    parts = [(folds == k, [of_images(m, folds == k) for m in matches]) for k in np.unique(folds)]
    return lambda times: finite_mean([score(own, times * there) for there, own in parts])


def map_over_folds(matches: Sequence[Matches], folds: np.ndarray) -> Callable[[np.ndarray], float]:
    """Return the mAP as a function of how often each image counts; of folds their mean."""
    return over_folds(matches, folds, mean_average_precision)


def _mean_of(seeds: Sequence[Callable[[np.ndarray], float]]) -> Callable[[np.ndarray], float]:
    return lambda times: float(np.mean([one(times) for one in seeds]))
