"""Scores of out-of-sample predictions, with intervals by patient: one place for kNN, linear probe and controls."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

import numpy as np

from medssl.errors import RequestError
from medssl.evaluation.bootstrap import Statistic, bootstrap_interval
from medssl.seeding import counter_rng

Task = Literal["regression", "classification"]


def r2(rows: np.ndarray) -> float:
    """Return 1 - residual sum / total sum of squares; NaN when all targets are equal.

    Args:
        rows: (N, 2), target and prediction.
    """
    target, prediction = rows[:, 0], rows[:, 1]
    total = float(((target - target.mean()) ** 2).sum())
    if total == 0:
        return float("nan")
    return 1 - float(((target - prediction) ** 2).sum()) / total


def mae(rows: np.ndarray) -> float:
    """Return the mean absolute error in the target's unit; rows as in `r2`."""
    return float(np.abs(rows[:, 0] - rows[:, 1]).mean())


def accuracy(rows: np.ndarray) -> float:
    """Return the share of right predictions; rows (N, 2) of class indices, target and prediction."""
    return float((rows[:, 0] == rows[:, 1]).mean())


def balanced_accuracy(rows: np.ndarray) -> float:
    """Return the mean recall over the classes present among the targets; rows as in `accuracy`."""
    target = rows[:, 0]
    recalls = [float((rows[target == label, 1] == label).mean()) for label in np.unique(target)]
    return float(np.mean(recalls))


def roc_auc(rows: np.ndarray) -> float:
    """Return the area under the ROC curve: how often an image of class 1 scores above one of class 0, ties counting half.

    Args:
        rows: (N, 2), target 0 or 1 and score; higher means class 1.

    Returns:
        0 to 1; NaN when a class has no image.

    Reference:
        Hanley and McNeil 1982: the Mann-Whitney statistic.
    """
    target, score = rows[:, 0] > 0.5, rows[:, 1]
    ones, zeros = int(target.sum()), int((~target).sum())
    if not ones or not zeros:
        return float("nan")
    _, place, counts = np.unique(score, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts - 1) / 2  # mean rank of equal scores, from 1
    ranks = middle[place.reshape(-1)]
    return float((ranks[target].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def mean_auc(rows: np.ndarray) -> float:
    """Return the area under the ROC curve, with more than two classes the mean of each against the rest; rows (N, 1 + K)."""
    classes = rows.shape[1] - 1
    kinds = [1] if classes == 2 else range(classes)
    return float(np.mean([roc_auc(np.stack([rows[:, 0] == k, rows[:, 1 + k]], axis=1).astype(float)) for k in kinds]))


METRICS: dict[str, dict[str, Statistic]] = {
    "regression": {"r2": r2, "mae": mae},
    "classification": {"balanced_accuracy": balanced_accuracy, "accuracy": accuracy},
}


def score_rows(
    name: str,
    probe: str,
    targets: np.ndarray,
    predictions: np.ndarray,
    groups: Sequence[str] | None,
    *,
    task: Task,
    draws: int = 2000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Score predictions; the interval draws patients again and keeps the fitted predictions.

    Args:
        name: Name of the features, for instance `encoder` or `raw_pixels`.
        probe: What made the predictions, for instance `linear` or `knn5`.
        targets: (N,) values, or class indices.
        predictions: (N,) out-of-sample predictions.
        groups: Patient of each image; None when unknown: rows then say `by image`, with `n_patients` None.
        task: `regression` or `classification`.
        draws: Bootstrap draws.
        seed: Seed of the bootstrap.

    Returns:
        One JSON-able row {name, probe, metric, value, low, high, n_images, n_patients, by} per metric; `low` and `high`
        are None where no interval can be given.
    """
    rows = np.stack([np.asarray(targets, dtype=np.float64), np.asarray(predictions, dtype=np.float64)], axis=1)
    return [
        score_row(name, probe, metric, rows, groups, statistic=statistic, draws=draws, seed=seed)
        for metric, statistic in METRICS[task].items()
    ]


def score_row(
    name: str,
    probe: str,
    metric: str,
    values: np.ndarray,
    groups: Sequence[str] | None,
    *,
    statistic: Statistic = np.mean,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Return one row of a table of scores (see `score_rows`) for any statistic of values (N,), or of rows (N, K)."""
    value, low, high = bootstrap_interval(values, groups, draws=draws, seed=seed, statistic=statistic)
    return {
        "name": name,
        "probe": probe,
        "metric": metric,
        "value": _finite(value),
        "low": _finite(low),
        "high": _finite(high),
        "n_images": len(values),
        "n_patients": None if groups is None else len(set(groups)),
        "by": "by image" if groups is None else "by patient",
    }


def encode_classes(targets: Sequence[Any] | np.ndarray) -> tuple[np.ndarray, list[Any]]:
    """Return class indices (N,) in sorted order of the labels, and the labels."""
    labels, index = np.unique(np.asarray(targets), return_inverse=True)
    return index.reshape(-1), labels.tolist()


def check_features(features: np.ndarray, targets: np.ndarray, groups: Sequence[str] | None) -> np.ndarray:
    """Return the features as float64 (N, E), one finite row per target and group.

    Raises:
        RequestError: Shapes differ, a value is not finite, or fewer than two patients are there.
    """
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or len(features) != len(targets) or (groups is not None and len(groups) != len(targets)):
        found = f"features {features.shape}, {len(targets)} targets, {'no' if groups is None else len(groups)} groups"
        raise RequestError(f"probe: {found}; it needs (N, E) features, N targets and N groups (or None)")
    if not np.isfinite(features).all():
        bad = int((~np.isfinite(features).all(axis=1)).sum())
        raise RequestError(f"probe: features of {bad} images are not finite; leave them out, or look for a NaN in the run")
    if np.asarray(targets).dtype.kind == "f" and not np.isfinite(targets).all():
        bad = int((~np.isfinite(targets)).sum())
        raise RequestError(f"probe: {bad} targets are not finite; leave out the images without a label")
    n_groups = len(targets) if groups is None else len(set(groups))
    if n_groups < 2:
        raise RequestError(
            f"probe: {n_groups} patient(s); it needs two or more, because it is fitted and scored on disjoint patients"
        )
    return features


def group_indices(n: int, groups: Sequence[str] | None) -> np.ndarray:
    """Return (N,) group numbers, in sorted order of the names; without groups every image is its own."""
    if groups is None:
        return np.arange(n)
    return np.unique(np.asarray(groups, dtype=str), return_inverse=True)[1].reshape(-1)


def patient_folds(targets: np.ndarray, groups: Sequence[str] | None, *, folds: int, seed: int) -> np.ndarray:
    """Deal patients into folds so that no patient is in two, and the folds have similar targets.

    Patients are shuffled, sorted by their mean target, and dealt in turn; the sort is what balances classes and ranges.

    Args:
        targets: (N,) values, or class indices.
        groups: Patient of each image; None makes each image its own.
        folds: Number of folds, 2 or more; fewer when there are fewer patients.
        seed: Seed of the shuffle.

    Returns:
        (N,) fold number of each image, 0 to min(folds, patients) - 1.
    """
    index = group_indices(len(targets), groups)
    n_groups = int(index.max()) + 1
    folds = min(folds, n_groups)
    if folds < 2:
        raise RequestError(f"probe: {folds} fold(s) of {n_groups} patient(s); it needs two or more of both")
    means = np.bincount(index, weights=np.asarray(targets, dtype=np.float64)) / np.bincount(index)
    generator = counter_rng(seed, "patient_folds")
    shuffled = generator.permutation(n_groups)
    ordered = shuffled[np.argsort(means[shuffled], kind="stable")]
    fold_of_group = np.empty(n_groups, dtype=np.int64)
    for start in range(0, n_groups, folds):
        dealt = ordered[start : start + folds]
        fold_of_group[dealt] = generator.permutation(folds)[: len(dealt)]
    folds_of_images: np.ndarray = fold_of_group[index]
    return folds_of_images


def presence_folds(groups: Sequence[str], present: Sequence[Collection[int]], *, folds: int, seed: int) -> np.ndarray:
    """Deal patients into folds so that what only some of them have is spread over the folds.

    The rarest thing goes first: each patient who has it goes to a fold with the fewest of these, of such folds the one farthest from those
    that have any (fold k is tested and k + 1 validates, so that what two neighbours hold alone would not be trained on), then the emptiest,
    then one at random. Fold sizes differ by one patient at most. Where every patient has the same, folds are those of `patient_folds`.

    Args:
        groups: (N,) patient of each image.
        present: (N,) what each image has, for instance the structures of its label map.
        folds: Number of folds, 2 or more, at most the number of patients.
        seed: Seed of what is random.

    Returns:
        (N,) fold number of each image.

    Reference:
        Sechidis et al. 2011, "On the Stratification of Multi-Label Data", algorithm 1 (iterative stratification); the distance is ours.
    """
    index = group_indices(len(groups), groups)
    n = int(index.max()) + 1
    has: list[set[int]] = [set() for _ in range(n)]
    for patient, own in zip(index, present, strict=True):
        has[int(patient)] |= set(own)
    some = {thing for own in has for thing in own if any(thing not in other for other in has)}
    if not some:
        return patient_folds(np.zeros(len(groups)), groups, folds=folds, seed=seed)
    generator = counter_rng(seed, "presence_folds")
    room = np.full(folds, n // folds)
    room[generator.permutation(folds)[: n % folds]] += 1
    left = [int(patient) for patient in generator.permutation(n)]
    fold_of, holds = np.full(n, -1), {thing: np.zeros(folds, dtype=int) for thing in sorted(some)}
    while left:
        owners = {thing: sum(thing in has[patient] for patient in left) for thing in holds}
        rarest = min((thing for thing in holds if owners[thing]), key=lambda thing: owners[thing], default=None)
        for patient in [p for p in left if rarest is None or rarest in has[p]]:
            counts = np.zeros(folds, dtype=int) if rarest is None else holds[rarest]
            chance = generator.permutation(folds)
            best = min(np.flatnonzero(room), key=lambda fold: (counts[fold], -_apart(int(fold), counts), -room[fold], chance[fold]))
            fold_of[patient] = best
            room[best] -= 1
            left.remove(patient)
            for thing in has[patient] & some:
                holds[thing][best] += 1
    found: np.ndarray = fold_of[index]
    return found


def _apart(fold: int, counts: np.ndarray) -> int:
    """Return the steps on the ring of folds to the nearest one that has something; 0 where none has."""
    steps = np.abs(np.flatnonzero(counts) - fold)
    return int(np.minimum(steps, len(counts) - steps).min(initial=len(counts))) if len(steps) else 0


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
