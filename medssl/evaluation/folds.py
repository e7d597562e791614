"""Repeated patient-level folds: patients dealt anew for every seed, and the results of a seed's folds put together.

Every patient is tested once, so the tested cases of all folds are one test set: of errors, accuracies and overlaps, which each case has by
itself. Scores that rank cases (AUC, average precision, FROC) are the mean over folds, each ranked by its own network alone: those of another
network may lie higher or lower for no reason but its training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, replace
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np

from medssl.errors import RequestError
from medssl.evaluation.bootstrap import Statistic
from medssl.evaluation.scores import patient_folds


class SplitCases(Protocol):
    """A frozen dataclass of labelled cases with the fields `split` and `one_fold`."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def ids(self) -> np.ndarray:
        """(N,) number of each case."""
        ...

    @property
    def orders(self) -> dict[int, np.ndarray]:
        """Seed -> what `few_label_rows` returned."""
        ...

    @property
    def groups(self) -> Sequence[str] | None:
        """Patient of each case, or None."""
        ...

    @property
    def balance(self) -> np.ndarray:
        """(N,) number of each case in which folds are to be alike."""
        ...

    def where(self, split: str) -> np.ndarray:
        """Return the rows of a split."""
        ...

    def patients(self, rows: np.ndarray) -> list[str] | None:
        """Return the patients of rows, or None when they are unknown."""
        ...


C = TypeVar("C", bound=SplitCases)
TrainingRows = Callable[[Any, int | None, int], np.ndarray]
"""(cases, labels, seed) -> rows of the first training cases (None: all), refused where they cannot be learnt from or nothing be scored."""
Dealt = Mapping[tuple[int, int | None], C]
"""(seed, fold) -> the cases with the splits of that cell; fold None where the splits are given."""
Result = Mapping[str, Any]
OF_ONE_FOLD = ("fold", "reliability", "fitted", "training_range", "curve", "mean", "mean_dice", "n_test")
"""Parts of a result that belong to the network of one fold; pooled results have none of them."""


def deal(cases: C, folds: int, seed: int, fold: int) -> C:
    """Return the cases with other splits: one fold of patients is tested, the next validates, the others train.

    Args:
        cases: The cases; their own splits are set aside.
        folds: Number of folds, 3 or more.
        seed: Another seed deals the patients anew.
        fold: The fold that is tested.

    Raises:
        RequestError: There are fewer patients than folds.
    """
    number = patient_folds(cases.balance, cases.groups, folds=folds, seed=seed)
    if number.max() + 1 < folds:
        raise RequestError(f"folds: {folds}, and the labelled cases are of {number.max() + 1} patients; ask for fewer folds")
    split = np.where(number == fold, "test", np.where(number == (fold + 1) % folds, "val", "train"))
    return replace(cases, split=split, one_fold=True)


def deals(cases: C, folds: int | None, seeds: Sequence[int], training_rows: TrainingRows) -> dict[tuple[int, int | None], C]:
    """Return (seed, fold) -> the cases with the splits of that cell, each checked with all its training cases.

    Raises:
        RequestError: A split cannot be learnt from or scored.
    """
    found: dict[tuple[int, int | None], C]
    if folds is None:
        found = {(seed, None): cases for seed in seeds}
    else:
        found = {(seed, k): deal(cases, folds, seed, k) for seed in seeds for k in range(folds)}
    for (seed, _), one in found.items():
        training_rows(one, None, seed)
    return found


def refuse_counts(dealt: Dealt[C], counts: Sequence[int], training_rows: TrainingRows) -> None:
    """Refuse label counts that a cell could not train with, before any does.

    Raises:
        RequestError: A cell has fewer training cases, or a class is not among the first.
    """
    for (seed, _), cases in dealt.items():
        for count in counts:
            training_rows(cases, count, seed)


def fewest(dealt: Dealt[C]) -> int:
    """Return how many training cases every cell has at least."""
    return min(len(cases.where("train")) for cases in dealt.values())


def few_label_rows(cases: SplitCases, seed: int, drawn: Callable[[Mapping[str, list[int]]], Sequence[str]]) -> np.ndarray:
    """Return the rows of the training cases, patient by patient, and keep them with the cases.

    Args:
        cases: The cases; where patients are unknown each case is one of its own.
        seed: What `drawn` depends on besides the cases.
        drawn: Rows of every patient -> the patients in the order in which they train.
    """
    if seed not in cases.orders:
        rows = cases.where("train")
        of_patient: dict[str, list[int]] = {}
        for row, patient in zip(rows, cases.patients(rows) or [str(cases.ids[row]) for row in rows]):
            of_patient.setdefault(patient, []).append(int(row))
        cases.orders[seed] = np.array([row for name in drawn(of_patient) for row in of_patient[name]], dtype=np.int64)
    return cases.orders[seed]


def pool_folds(results: Sequence[Result]) -> list[Result]:
    """Return one result per arm, labels and seed: the tested cases of all its folds together, and the mean of the folds' scores.

    Folds that are not finished leave their arm's seed out, so that no table mixes other patients. Results without folds come back as
    they are.

    Args:
        results: Contents of `results.json` of cells.

    Returns:
        Results; a pooled one has `folds` (fold, fitted, training_range of each), its cases have `fold`, and its rows have a value and no
        interval.
    """
    if all(result.get("fold") is None for result in results):
        return list(results)
    grouped: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        grouped.setdefault((result["arm"], result["labels"], result["seed"]), []).append(result)
    fullest = max(len(group) for group in grouped.values())
    return [_pooled(group) for group in grouped.values() if len(group) == (group[0].get("of_folds") or fullest)]


def _pooled(group: Sequence[Result]) -> dict[str, Any]:
    group = sorted(group, key=lambda result: int(result["fold"]))
    values: dict[tuple[str, Any], list[float]] = {}
    for result in group:
        for row in result.get("rows") or []:  # segmentation has scores of cases alone
            if row["value"] is not None:
                values.setdefault((row["metric"], row.get("class")), []).append(row["value"])
    choices = list(dict.fromkeys(str(result["choice"]) for result in group if result.get("choice")))
    shared = {key: value for key, value in group[0].items() if key not in OF_ONE_FOLD}
    return {
        **shared,
        "cases": [{**case, "fold": result["fold"]} for result in group for case in result["cases"]],
        "rows": [{"metric": metric, "class": kind, "value": float(np.mean(found))} for (metric, kind), found in values.items()],
        "seconds": {"train": float(np.mean([result["seconds"]["train"] for result in group]))},
        "choice": choices[0] if len(choices) == 1 else "by fold: " + "; ".join(choices) if choices else None,
        "folds": [{key: result.get(key) for key in ("fold", "fitted", "training_range")} for result in group],
    }


def fold_numbers(cases: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Return (N,) the fold of every case of a pooled result; 0 where there are none."""
    return np.array([case.get("fold") or 0 for case in cases], dtype=np.int64)


def mean_over_folds(statistic: Statistic) -> Statistic:
    """Return the mean over folds of a statistic, for rows whose last column is the fold.

    A fold of which the statistic is not finite (a bootstrap draw that left it one class) is left out; NaN where all are.
    """

    def mean(rows: np.ndarray) -> float:
        return finite_mean([statistic(rows[rows[:, -1] == fold, :-1]) for fold in np.unique(rows[:, -1])])

    return mean


def finite_mean(values: Sequence[float]) -> float:
    """Return the mean of the finite values, NaN where there are none."""
    known = [float(value) for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")
