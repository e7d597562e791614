"""The table of cells of detection: mAP over overlaps 0.1 to 0.5, and what all other readers of their results share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from medssl.errors import RequestError
from medssl.evaluation.box_cases import image_boxes
from medssl.evaluation.cell_summary import Asked, Result, Score, summarise_cells
from medssl.evaluation.detection import Matches, match_classes, mean_average_precision, over_images

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
    known: dict[int, list[Matches]] = {}

    def matched(runs: Sequence[Result]) -> list[list[Matches]]:
        for run in runs:
            if id(run) not in known:
                if case_names(run) != names:
                    raise RequestError(
                        "cells were scored on different test cases; one table needs the same; remove the cells and run again"
                    )
                known[id(run)] = matches_of(run)
        return [known[id(run)] for run in runs]

    def score(runs: Sequence[Result], less: Sequence[Result] | None) -> Asked:
        ours = _mean_of(matched(runs))
        asked = ours
        if less is not None:
            theirs = _mean_of(matched(less))
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
    """Match the boxes of every class of a result, images in the order of their names."""
    return match_classes([image_boxes(case) for case in in_order(result)], len(result["classes"]))


def _mean_of(seeds: Sequence[Sequence[Matches]]) -> Callable[[np.ndarray], float]:
    return lambda times: float(np.mean([mean_average_precision(one, times) for one in seeds]))
