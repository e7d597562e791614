"""The table of cells of one label per case: AUC, or mean absolute error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medssl.errors import RequestError
from medssl.evaluation.bootstrap import Statistic
from medssl.evaluation.cell_summary import Asked, Result, summarise_cells
from medssl.evaluation.scores import mae, mean_auc


def summarise(results: Sequence[Result], *, draws: int = 2000) -> dict[str, Any]:
    """Return the AUC or the mean absolute error per (labels, arm) and paired differences to scratch; see `summarise_cells`."""
    classes = bool(results) and results[0]["task"] == "classification"
    statistic: Statistic = mean_auc if classes else mae

    def score(runs: Sequence[Result], less: Sequence[Result] | None) -> Asked:
        table, patients = score_table(runs)
        if less is None:
            return table, patients, _mean_of_seeds(statistic)
        other, _ = score_table(less)
        n, of_seeds = len(runs), _mean_of_seeds(statistic)
        return np.concatenate([table, other], axis=1), patients, lambda rows: of_seeds(rows[:, :n]) - of_seeds(rows[:, n:])

    return summarise_cells(results, "auroc" if classes else "mae", "higher" if classes else "lower", lambda _: score, draws=draws)


def score_table(runs: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, list[str] | None]:
    """Return (N, S, 1 + K): target and probabilities (or prediction) of every test case and seed, and the patients.

    Raises:
        RequestError: The runs were scored on different cases.
    """
    order = [case["series_id"] for case in runs[0]["cases"]]
    columns = []
    for run in runs:
        by_id = {case["series_id"]: case for case in run["cases"]}
        if set(by_id) != set(order):
            raise RequestError(
                "cells were scored on different test cases; one table needs the same; remove the cells and run again"
            )
        columns.append([[by_id[n]["target"], *(by_id[n].get("probability") or [by_id[n]["prediction"]])] for n in order])
    patients = [case["patient_id"] for case in runs[0]["cases"]]
    table: np.ndarray = np.array(columns, dtype=np.float64).transpose(1, 0, 2)
    return table, None if None in patients else patients


def _mean_of_seeds(statistic: Statistic) -> Statistic:
    return lambda rows: float(np.mean([statistic(rows[:, seed]) for seed in range(rows.shape[1])]))
