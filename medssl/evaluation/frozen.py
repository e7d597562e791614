"""Linear and few-shot probes of frozen features on a three-way split: fitted on training, chosen on validation, scored on test cases."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medssl.evaluation.calibration import softmax
from medssl.evaluation.linear_probe import LinearModel, fit_linear, fit_on_validation, logistic_path
from medssl.evaluation.target_cases import Cases
from medssl.seeding import counter_rng


def fit_probe(features: np.ndarray, cases: Cases, train: np.ndarray, seed: int = 0) -> LinearModel:
    """Fit logistic or ridge regression on training rows, the penalty chosen on the validation cases, by folds of patients where there are none.

    Args:
        features: (N, E), one row per case.
        cases: Their targets and splits.
        train: Rows to fit on.
        seed: Of the folds.
    """
    val, targets = cases.where("val"), _targets(cases)
    classes = len(cases.classes) or None
    if len(val):
        return fit_on_validation(features[train], targets[train], features[val], targets[val], task=cases.task, classes=classes)
    return fit_linear(features[train], targets[train], cases.patients(train), task=cases.task, classes=classes, seed=seed)


def predicted(model: LinearModel, features: np.ndarray, cases: Cases, rows: np.ndarray) -> np.ndarray:
    """Return (M, 1 + K): the target and the probabilities, or the target and the number, of rows."""
    scores = model.scores(features[rows])
    values = softmax(scores) if cases.task == "classification" else scores
    return np.concatenate([cases.targets[rows][:, None], values], axis=1)


def few_shot(features: np.ndarray, cases: Cases, shots: int, seeds: Sequence[int]) -> tuple[np.ndarray, list[list[int]]]:
    """Probe with a few training cases of each class: logistic regression with C = 1 on features of length 1.

    Args:
        features: (N, E).
        cases: Of a classification.
        shots: Training cases of each class.
        seeds: Each draws others.

    Returns:
        (M, S, 1 + K) target and probabilities of the test cases, and the ids drawn with each seed.

    Reference:
        C = 1 and normalised features as in the card evaluation-protocols, section D; C = 1 of a sum over n cases is 1 / n of a mean.
    """
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    unit = np.asarray(features, dtype=np.float64) / np.where(norms == 0, 1.0, norms)
    train, test, targets = cases.where("train"), cases.where("test"), _targets(cases)
    tables, ids = [], []
    for seed in seeds:
        drawn = [
            row
            for kind in range(len(cases.classes))
            for row in counter_rng(seed, "few shot", kind).permutation(train[targets[train] == kind])[:shots]
        ]
        ((weight, bias),) = logistic_path(unit[drawn], targets[drawn], [1 / len(drawn)], classes=len(cases.classes))
        tables.append(np.concatenate([cases.targets[test][:, None], softmax(unit[test] @ weight + bias)], axis=1))
        ids.append(sorted(int(cases.ids[row]) for row in drawn))
    table: np.ndarray = np.stack(tables, axis=1)
    return table, ids


def fewest(cases: Cases) -> int:
    """Return the number of training cases of the rarest class."""
    return int(np.bincount(_targets(cases)[cases.where("train")], minlength=len(cases.classes)).min())


def _targets(cases: Cases) -> np.ndarray:
    return cases.targets.astype(np.int64) if cases.task == "classification" else cases.targets
