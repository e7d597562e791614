"""Retrieval with frozen features: are the nearest images of other patients of the same kind, and is a patient found again across studies?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medssl.errors import RequestError
from medssl.evaluation.scores import check_features, group_indices


def precision_at_k(features: np.ndarray, labels: np.ndarray, groups: Sequence[str] | None, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return for each image the share of its k nearest images of other patients with its label, and that share by chance.

    Args:
        features: (N, E); nearest is by cosine.
        labels: (N,) class indices.
        groups: Patient of each image; None excludes the image itself only.
        k: Neighbours, all where there are fewer.

    Returns:
        (N,) precision, and (N,) share of the label among all images of other patients.

    Raises:
        RequestError: k is below 1, or there are fewer than two patients.
    """
    if k < 1:
        raise RequestError(f"retrieval: k {k}; give 1 or more")
    labels = np.asarray(labels)
    similarity = _cosine(check_features(features, labels, groups))
    index = group_indices(len(labels), groups)
    other = index[:, None] != index[None, :]
    same = labels[:, None] == labels[None, :]
    order = np.argsort(-np.where(other, similarity, -np.inf), axis=1, kind="stable")[:, :k]
    taken = np.take_along_axis(other, order, axis=1)  # a patient with almost all images leaves fewer than k
    hits = np.take_along_axis(same, order, axis=1) & taken
    return hits.sum(axis=1) / taken.sum(axis=1), (same & other).sum(axis=1) / other.sum(axis=1)


def reidentified(
    features: np.ndarray, patients: Sequence[str], studies: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return whether the nearest image of another study is of the same patient, for images whose patient has another study.

    High is a risk to privacy, whoever can compare features.

    Args:
        features: (N, E); nearest is by cosine.
        patients: Patient of each image.
        studies: Study of each image.

    Returns:
        (M,) rows of the images that have an answer, (M,) 0 or 1, and (M,) the share by chance.
    """
    similarity = _cosine(np.asarray(features, dtype=np.float64))
    patient, study = group_indices(len(similarity), patients), group_indices(len(similarity), studies)
    other = study[:, None] != study[None, :]
    again = (patient[:, None] == patient[None, :]) & other
    rows = np.flatnonzero(again.any(axis=1))
    nearest = np.where(other, similarity, -np.inf).argmax(axis=1)
    return rows, again[rows, nearest[rows]].astype(np.float64), again[rows].sum(axis=1) / other[rows].sum(axis=1)


def _cosine(features: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    unit = features / np.where(norms == 0, 1.0, norms)
    found: np.ndarray = unit @ unit.T
    return found
