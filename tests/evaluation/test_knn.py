from __future__ import annotations

import math

import numpy as np
import pytest

from medssl.errors import RequestError
from medssl.evaluation.knn import knn_predict, knn_probe


def plain_loop(features, targets, groups, k, temperature):
    """Return per image the (weight, target) pairs of its neighbours, one scalar at a time."""
    neighbours = []
    for i, a in enumerate(features):
        similar = []
        for j, b in enumerate(features):
            if groups[i] != groups[j]:
                cosine = sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
                similar.append((cosine, targets[j]))
        similar.sort(key=lambda pair: -pair[0])
        neighbours.append([(math.exp(s / temperature), t) for s, t in similar[:k]])
    return neighbours


@pytest.fixture(name="cohort")
def _cohort():
    generator = np.random.default_rng(0)
    groups = [f"p{i // 3}" for i in range(24)]
    return generator.normal(size=(24, 5)), generator.normal(size=24), generator.integers(3, size=24), groups


@pytest.mark.parametrize("k", [1, 4, 100])
def test_regression__equals_plain_loop(cohort, k):
    features, values, _, groups = cohort
    expected = [sum(w * t for w, t in pairs) / sum(w for w, _ in pairs) for pairs in plain_loop(features, values, groups, k, 0.07)]
    found = knn_predict(features, values, groups, task="regression", k=k)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("k", [1, 4, 100])
def test_classification__equals_plain_loop(cohort, k):
    features, _, labels, groups = cohort
    expected = []
    for pairs in plain_loop(features, labels, groups, k, 0.3):
        votes = [sum(w for w, t in pairs if t == label) for label in range(3)]
        expected.append(votes.index(max(votes)))
    found = knn_predict(features, labels, groups, task="classification", k=k, temperature=0.3)
    assert found.tolist() == expected


def test_knn__never_uses_the_same_patient():
    # two images per patient, almost equal; the label is the patient's own and unlike that of the nearest other patient
    angles = np.repeat(np.arange(8) * 0.1, 2) + np.tile([0.0, 1e-4], 8)
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    labels = np.repeat(np.arange(8) % 2, 2)
    patients = [f"p{i}" for i in np.repeat(np.arange(8), 2)]
    by_patient = knn_predict(features, labels, patients, task="classification", k=1)
    by_image = knn_predict(features, labels, None, task="classification", k=1)
    assert (by_patient == labels).mean() == 0
    assert (by_image == labels).mean() == 1


def test_knn__chunks_change_nothing(cohort, monkeypatch):
    features, values, _, groups = cohort
    whole = knn_predict(features, values, groups, task="regression")
    monkeypatch.setattr("medssl.evaluation.knn.ROWS_AT_ONCE", 7)
    np.testing.assert_allclose(knn_predict(features, values, groups, task="regression"), whole, rtol=1e-12)


def test_knn__scale_of_features_has_no_influence_and_small_temperature_is_finite(cohort):
    features, values, _, groups = cohort
    scale = np.linspace(0.1, 9, 24)[:, None]
    np.testing.assert_allclose(
        knn_predict(features * scale, values, groups, task="regression"),
        knn_predict(features, values, groups, task="regression"),
        rtol=1e-10,
    )
    sharp = knn_predict(features, values, groups, task="regression", k=9, temperature=1e-5)
    np.testing.assert_allclose(sharp, knn_predict(features, values, groups, task="regression", k=1), rtol=1e-6)


def test_probe__rows():
    generator = np.random.default_rng(1)
    centres = np.array([[5.0, 0, 0], [0, 5, 0], [0, 0, 5]])
    labels = np.repeat(["aorta", "liver", "spleen"], 10)
    features = centres[np.repeat([0, 1, 2], 10)] + generator.normal(0, 0.5, (30, 3))
    groups = [f"p{i % 15}" for i in range(30)]
    rows = knn_probe(features, labels, groups, task="classification", k=3, draws=100)
    assert [row["metric"] for row in rows] == ["balanced_accuracy", "accuracy"]
    assert all(row["value"] == row["low"] == row["high"] == 1.0 for row in rows)
    assert rows[0] == {
        "name": "encoder", "probe": "knn3", "metric": "balanced_accuracy", "value": 1.0, "low": 1.0, "high": 1.0,
        "n_images": 30, "n_patients": 15, "by": "by patient",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"k": 0}, "knn: k 0"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"groups": ["a"] * 4}, r"1 patient\(s\)"),
        ({"groups": ["a"] * 3}, "3 groups"),
        ({"features": np.full((4, 2), np.nan)}, "4 images are not finite"),
        ({"targets": np.array([0.0, 1, 2, np.nan])}, "1 targets are not finite"),
    ],
)
def test_knn__refuses(change, match):
    arguments = {"features": np.eye(4), "targets": np.arange(4.0), "groups": list("aabb"), **change}
    with pytest.raises(RequestError, match=match):
        knn_predict(task="regression", **arguments)
