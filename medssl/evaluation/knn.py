"""Leave-one-patient-out nearest neighbours on frozen features: the cheapest measure, without anything to fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from medssl.errors import RequestError
from medssl.evaluation.scores import Task, check_features, encode_classes, group_indices, score_rows

ROWS_AT_ONCE = 1024  # bounds the similarity matrix to 1024 x N


def knn_predict(
    features: np.ndarray,
    targets: np.ndarray,
    groups: Sequence[str] | None,
    *,
    task: Task,
    k: int = 5,
    temperature: float = 0.07,
) -> np.ndarray:
    """Predict each image from its k most similar images of other patients.

    Similarity s is the cosine; a neighbour's weight is exp(s / temperature). A class gets the sum of the weights of its
    neighbours; a value is their weighted mean. All images of the same patient are excluded, not only the image itself.

    Args:
        features: (N, E).
        targets: (N,) values, or class indices from 0.
        groups: Patient of each image; None excludes the image itself only.
        task: `regression` or `classification`.
        k: Neighbours; all images of other patients when there are fewer.
        temperature: Above 0.

    Returns:
        (N,) float64 predicted values, or int64 class indices (the smaller index on a tie).

    Raises:
        RequestError: k or temperature out of range, or unusable features (`check_features`).

    Reference:
        Wu, Xiong, Yu and Lin 2018 (instance discrimination), section 3.4, temperature 0.07.
    """
    if k < 1 or temperature <= 0:
        raise RequestError(f"knn: k {k}, temperature {temperature}; give k of 1 or more and a temperature above 0")
    targets = np.asarray(targets)
    features = check_features(features, targets, groups)
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    unit = features / np.where(norms == 0, 1.0, norms)
    index = group_indices(len(unit), groups)
    parts = []
    for start in range(0, len(unit), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        similarity = unit[rows] @ unit.T
        similarity[index[rows, None] == index[None, :]] = -np.inf
        parts.append(_vote(similarity, targets, task, k, temperature))
    return np.concatenate(parts)


def knn_probe(
    features: np.ndarray,
    targets: Sequence[Any] | np.ndarray,
    groups: Sequence[str] | None,
    *,
    task: Task,
    name: str = "encoder",
    k: int = 5,
    temperature: float = 0.07,
    draws: int = 2000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Score `knn_predict` with intervals by patient.

    Args:
        features: (N, E).
        targets: (N,) values, or labels of any sortable kind.
        groups: Patient of each image, or None.
        task: `regression` (R2, MAE) or `classification` (balanced accuracy, accuracy).
        name: Name of the features in the rows.
        k: Neighbours.
        temperature: Above 0.
        draws: Bootstrap draws.
        seed: Seed of the bootstrap.

    Returns:
        Rows as in `score_rows`, with probe `knn<k>`.
    """
    values = encode_classes(targets)[0] if task == "classification" else np.asarray(targets, dtype=np.float64)
    predictions = knn_predict(features, values, groups, task=task, k=k, temperature=temperature)
    return score_rows(name, f"knn{k}", values, predictions, groups, task=task, draws=draws, seed=seed)


def _vote(similarity: np.ndarray, targets: np.ndarray, task: Task, k: int, temperature: float) -> np.ndarray:
    """Combine the neighbours of (R, N) similarities, -inf where excluded."""
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    nearest = np.take_along_axis(similarity, order, axis=1)
    # relative to the nearest, so that exp does not overflow at small temperatures; excluded ones get exp(-inf) = 0
    weights = np.exp((nearest - nearest[:, :1]) / temperature)
    if task == "regression":
        means: np.ndarray = (weights * targets[order]).sum(axis=1) / weights.sum(axis=1)
        return means
    votes = np.zeros((len(order), int(targets.max()) + 1))
    np.add.at(votes, (np.arange(len(order))[:, None], targets[order]), weights)
    winners: np.ndarray = votes.argmax(axis=1)
    return winners
