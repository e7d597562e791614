"""The table of cells of one label per case: AUC, or mean absolute error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medssl.errors import RequestError
from medssl.evaluation.bootstrap import Statistic
from medssl.evaluation.cell_summary import Asked, Result, summarise_cells
from medssl.evaluation.folds import fold_numbers, mean_over_folds
from medssl.evaluation.scores import mae, mean_auc


def summarise(results: Sequence[Result], *, draws: int = 2000) -> dict[str, Any]:
    """Return the AUC or the mean absolute error per (labels, arm) and paired differences to scratch; see `summarise_cells`."""
    classes = bool(results) and results[0]["task"] == "classification"

    def score(runs: Sequence[Result], less: Sequence[Result] | None) -> Asked:
        table, patients, of_seeds = scored(runs)
        if less is None:
            return table, patients, of_seeds
        other, _ = score_table(less, [case["series_id"] for case in runs[0]["cases"]])
        n = len(runs)
        return np.concatenate([table, other], axis=1), patients, lambda rows: of_seeds(rows[:, :n]) - of_seeds(rows[:, n:])

    return summarise_cells(results, "auroc" if classes else "mae", "higher" if classes else "lower", lambda _: score, draws=draws)


def scored(runs: Sequence[Mapping[str, Any]]) -> Asked:
    """Return what the main score of runs of several seeds is a statistic of, the patients, and that statistic.

    The AUC of folds is the mean over them, see `folds`; absolute errors are those of all cases.
    """
    table, patients = score_table(runs)
    auc = mean_over_folds(mean_auc)
    error: Statistic = lambda rows: mae(rows[:, :-1])  # noqa: E731
    return table, patients, _mean_of_seeds(auc if runs[0]["task"] == "classification" else error)


def score_table(runs: Sequence[Mapping[str, Any]], order: Sequence[str] | None = None) -> tuple[np.ndarray, list[str] | None]:
    """Return (N, S, 2 + K): target, probabilities (or prediction) and fold of every test case and seed, and the patients.

    Args:
        runs: One per seed.
        order: Names of the cases; None takes those of the first run.

    Raises:
        RequestError: The runs were scored on different cases.
    """
    order = [case["series_id"] for case in runs[0]["cases"]] if order is None else order
    columns = []
    for run in runs:
        by_id = {case["series_id"]: case for case in run["cases"]}
        if set(by_id) != set(order):
            raise RequestError(
                "cells were scored on different test cases; one table needs the same; remove the cells and run again"
            )
        cases = [by_id[name] for name in order]
        own = [[case["target"], *(case.get("probability") or [case["prediction"]])] for case in cases]
        columns.append(np.column_stack([np.array(own, dtype=np.float64), fold_numbers(cases)]))
    patient_of = {case["series_id"]: case["patient_id"] for case in runs[0]["cases"]}
    patients = [patient_of[name] for name in order]
    table: np.ndarray = np.stack(columns, axis=1)
    return table, None if None in patients else patients


def _mean_of_seeds(statistic: Statistic) -> Statistic:
    return lambda rows: float(np.mean([statistic(rows[:, seed]) for seed in range(rows.shape[1])]))
