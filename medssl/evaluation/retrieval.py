"""Retrieval with frozen features: are the nearest images of other patients of the same kind, and is a patient found again across studies?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from medssl.errors import RequestError
from medssl.evaluation.knn import ROWS_AT_ONCE
from medssl.evaluation.scores import check_features, group_indices


def precision_at_k(features: np.ndarray, labels: np.ndarray, groups: Sequence[str] | None, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (N,) precision and (N,) chance of one k; see `precisions`."""
    found, chance = precisions(features, labels, groups, [k])
    return found[k], chance


def precisions(
    features: np.ndarray, labels: np.ndarray, groups: Sequence[str] | None, ks: Sequence[int]
) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """Return for each image the share of its k nearest images of other patients with its label, and that share by chance.

    Args:
        features: (N, E); nearest is by cosine.
        labels: (N,) class indices.
        groups: Patient of each image; None excludes the image itself only.
        ks: Numbers of neighbours, each all where there are fewer.

    Returns:
        k -> (N,) precision, and (N,) share of the label among all images of other patients.

    Raises:
        RequestError: A k is below 1, or there are fewer than two patients.
    """
    if low := [k for k in ks if k < 1]:
        raise RequestError(f"retrieval: k {low[0]}; give 1 or more")
    labels = np.asarray(labels)
    unit = _unit(check_features(features, labels, groups))
    index = group_indices(len(labels), groups)
    parts: dict[int, list[np.ndarray]] = {k: [] for k in ks}
    chance = []
    for rows in _blocks(len(labels)):
        other = index[rows, None] != index[None, :]
        same = labels[rows, None] == labels[None, :]
        order = np.argsort(-np.where(other, unit[rows] @ unit.T, -np.inf), axis=1, kind="stable")[:, : max(ks, default=1)]
        taken = np.take_along_axis(other, order, axis=1)  # a patient with almost all images leaves fewer than k
        hits = np.take_along_axis(same, order, axis=1) & taken
        for k in ks:
            parts[k].append(hits[:, :k].sum(axis=1) / taken[:, :k].sum(axis=1))
        chance.append((same & other).sum(axis=1) / other.sum(axis=1))
    return {k: np.concatenate(found) for k, found in parts.items()}, np.concatenate(chance)


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
    unit = _unit(np.asarray(features, dtype=np.float64))
    patient, study = group_indices(len(unit), patients), group_indices(len(unit), studies)
    places, hits, chance = [], [], []
    for rows in _blocks(len(unit)):
        other = study[rows, None] != study[None, :]
        again = (patient[rows, None] == patient[None, :]) & other
        asked = np.flatnonzero(again.any(axis=1))
        nearest = np.where(other, unit[rows] @ unit.T, -np.inf).argmax(axis=1)
        places.append(asked + rows.start)
        hits.append(again[asked, nearest[asked]].astype(np.float64))
        chance.append(again[asked].sum(axis=1) / other[asked].sum(axis=1))
    return np.concatenate(places), np.concatenate(hits), np.concatenate(chance)


def _blocks(n: int) -> Iterator[slice]:
    return (slice(start, start + ROWS_AT_ONCE) for start in range(0, n, ROWS_AT_ONCE))


def _unit(features: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    found: np.ndarray = features / np.where(norms == 0, 1.0, norms)
    return found
