"""Labelled cases of one label each, a class or a number: which of them train, and what is refused before any does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medssl.errors import RequestError
from medssl.evaluation.folds import few_label_rows
from medssl.evaluation.outside import Look
from medssl.evaluation.scores import Task
from medssl.seeding import counter_rng


@dataclass(frozen=True)
class Cases:
    """Labelled cases.

    Args:
        ids: (N,) int64.
        targets: (N,) float64: the number, or the place of the class in `classes`.
        groups: Patient of each case, or None.
        split: (N,) `train`, `val` or `test`.
        classes: Names; empty for numbers.
        looks: Voxel size and vendor of each case where they are known, or empty.
        facts: What the index says of person and scanner of each case, or empty.
        one_fold: Whether the test cases are one fold of several, which may lack a class: all folds are scored together.
        orders: Seed -> `few_label_order` of these cases, where it was asked for.
    """

    ids: np.ndarray
    targets: np.ndarray
    groups: Sequence[str] | None
    split: np.ndarray
    classes: Sequence[Any] = ()
    looks: Sequence[Look] = ()
    facts: Sequence[Mapping[str, str]] = ()
    one_fold: bool = False
    orders: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def task(self) -> Task:
        """`classification` or `regression`."""
        return "classification" if len(self.classes) else "regression"

    @property
    def balance(self) -> np.ndarray:
        """(N,) number in which folds are to be alike: the target."""
        return self.targets

    def where(self, split: str) -> np.ndarray:
        """Return the rows of a split."""
        return np.flatnonzero(self.split == split)

    def patients(self, rows: np.ndarray) -> list[str] | None:
        """Return the patients of rows, or None when they are unknown."""
        return None if self.groups is None else [str(self.groups[int(row)]) for row in rows]


def few_label_order(cases: Cases, seed: int) -> np.ndarray:
    """Return the rows of the training cases in an order of which every beginning holds all classes in about their shares.

    Patients stay together where they are known, so that n labels are of as few patients as that allows.

    Args:
        cases: The cases.
        seed: Another seed draws other patients first.
    """
    return few_label_rows(cases, seed, lambda of_patient: _drawn(cases, of_patient, seed))


def _drawn(cases: Cases, of_patient: Mapping[str, list[int]], seed: int) -> list[str]:
    kinds: dict[float, list[str]] = {}
    for name in sorted(of_patient):  # a patient counts for the class that most of its cases have
        values = cases.targets[of_patient[name]]
        kind = float(np.bincount(values.astype(int)).argmax()) if cases.task == "classification" else 0.0
        kinds.setdefault(kind, []).append(name)
    begin, rest = [], []
    for kind, members in sorted(kinds.items()):
        shuffled = counter_rng(seed, "few labels", str(kind)).permutation(len(members))
        placed = [((place + 0.5) / len(members), -len(members), members[int(k)]) for place, k in enumerate(shuffled)]
        begin.append(placed[0])  # the first of every class before the second of any
        rest += placed[1:]
    return [name for _, _, name in [*sorted(begin), *sorted(rest)]]


def check(cases: Cases, train: np.ndarray) -> None:
    """Refuse cases that cannot be learnt from or scored.

    Raises:
        RequestError: A split is empty, a class has no training case, or no test case where there are no folds, or numbers do not vary.
    """
    for split, rows in (("train", train), ("test", cases.where("test"))):
        if not len(rows):
            raise RequestError(f"no labelled case is marked {split}; splits come from the index (`medssl archive split`, --splits)")
    if cases.task == "regression":
        if np.ptp(cases.targets[train]) == 0:
            raise RequestError(
                f"all {len(train)} training targets are {cases.targets[train][0]:g}; nothing can be learnt from them"
            )
        return
    there = set(cases.targets[train].astype(int))
    absent = [str(name) for k, name in enumerate(cases.classes) if k not in there]
    if absent:
        raise RequestError(
            f"{', '.join(absent)} of {len(cases.classes)} classes: no case among the {len(train)} training cases; give more labels, or leave "
            "it out. Classes that the recipe does not name are counted in the order of their sorted values"
        )
    tested = set(cases.targets[cases.where("test")].astype(int))
    unscored = [str(name) for k, name in enumerate(cases.classes) if k not in tested]
    if unscored and not cases.one_fold:
        raise RequestError(
            f"{', '.join(unscored)} of {len(cases.classes)} classes: no case among the {len(cases.where('test'))} test cases, so that no AUC can "
            "be given; mark other cases as test, ask for folds, or leave the class out"
        )


def training_rows(cases: Cases, labels: int | None, seed: int) -> np.ndarray:
    """Return the rows of the first training cases, after checking that they can be learnt from and the test cases scored.

    Args:
        cases: The cases.
        labels: How many, in `few_label_order` of the seed; None takes all.
        seed: Of that order.

    Raises:
        RequestError: There are fewer, or as `check`.
    """
    train = few_label_order(cases, seed)[:labels]
    if labels is not None and len(train) < labels:
        raise RequestError(f"{labels} labels are asked for, and {len(train)} training cases have one; ask for fewer")
    check(cases, train)
    return train
