from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from medssl.errors import RequestError
from medssl.evaluation.linear_probe import (
    LOGISTIC_ALPHAS,
    RIDGE_ALPHAS,
    fit_linear,
    linear_predict,
    linear_probe,
    logistic_path,
    ridge_path,
)
from medssl.evaluation.scores import balanced_accuracy, patient_folds, r2


def test_r2_and_balanced_accuracy__equal_plain_sums():
    rows = np.array([[1.0, 1.5], [2.0, 2.0], [4.0, 3.0]])
    mean = 7 / 3
    total = (1 - mean) ** 2 + (2 - mean) ** 2 + (4 - mean) ** 2
    assert r2(rows) == pytest.approx(1 - (0.25 + 0 + 1) / total, abs=1e-14)
    assert np.isnan(r2(np.ones((3, 2))))
    assert balanced_accuracy(np.array([[0, 0], [0, 0], [0, 1], [1, 0]])) == pytest.approx((2 / 3 + 0) / 2, abs=1e-14)


@pytest.mark.parametrize("shape", [(12, 4), (6, 9)])
def test_ridge__solves_the_normal_equations(shape):
    generator = np.random.default_rng(0)
    x, y = generator.normal(1, 2, shape), generator.normal(3, 1, shape[0])
    for alpha, (weight, bias) in zip([10.0, 0.1], ridge_path(x, y, [10.0, 0.1]), strict=True):
        # with the intercept as a column of ones that is not penalised
        design = np.hstack([x, np.ones((len(x), 1))])
        penalty = np.diag([len(x) * alpha] * shape[1] + [0.0])
        expected = np.linalg.solve(design.T @ design + penalty, design.T @ y)
        np.testing.assert_allclose(np.append(weight[:, 0], bias), expected, rtol=1e-9)


@pytest.mark.parametrize("shape", [(30, 4), (12, 20)])
def test_logistic__gradient_vanishes_at_the_fit(shape):
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=shape), generator.integers(3, size=shape[0])
    for alpha, (weight, bias) in zip([1.0, 0.01], logistic_path(x, y, [1.0, 0.01], classes=3), strict=True):
        w = torch.tensor(weight, requires_grad=True)
        b = torch.tensor(bias, requires_grad=True)
        loss = torch.nn.functional.cross_entropy(torch.tensor(x) @ w + b, torch.tensor(y)) + alpha / 2 * (w**2).sum()
        loss.backward()
        assert w.grad.abs().max() < 1e-6 and b.grad.abs().max() < 1e-6
        assert np.abs(weight).max() > 0.01


def test_logistic__of_two_classes_equals_newton():
    generator = np.random.default_rng(2)
    x = generator.normal(size=(40, 2))
    y = (x[:, 0] + generator.normal(0, 1, 40) > 0).astype(int)
    ((weight, bias),) = logistic_path(x, y, [0.1], classes=2)
    # softmax of two classes with penalty alpha / 2 (|w0|^2 + |w1|^2) is a sigmoid of w = w1 - w0 with alpha / 4 |w|^2
    design = np.hstack([x, np.ones((40, 1))])
    theta = np.zeros(3)
    for _ in range(30):
        p = 1 / (1 + np.exp(-design @ theta))
        penalty = np.array([0.05, 0.05, 0.0])
        gradient = design.T @ (p - y) / 40 + penalty * theta
        hessian = (design * (p * (1 - p))[:, None]).T @ design / 40 + np.diag(penalty)
        theta = theta - np.linalg.solve(hessian, gradient)
    np.testing.assert_allclose(weight[:, 1] - weight[:, 0], theta[:2], atol=1e-6)
    assert bias[1] - bias[0] == pytest.approx(theta[2], abs=1e-6)


def test_logistic__never_predicts_a_class_it_has_not_seen():
    x = np.random.default_rng(3).normal(size=(20, 3))
    ((weight, bias),) = logistic_path(x, np.repeat([0, 2], 10), [0.1], classes=4)
    scores = 100 * np.random.default_rng(4).normal(size=(50, 3)) @ weight + bias
    assert set(scores.argmax(axis=1)) == {0, 2}


def test_folds__split_no_patient_and_balance_classes():
    generator = np.random.default_rng(5)
    labels = np.array([0] * 40 + [1] * 10)
    groups = [f"p{i // 2}" for i in range(50)]
    folds = patient_folds(labels, groups, folds=5, seed=3)
    for patient in set(groups):
        assert len({f for f, g in zip(folds, groups, strict=True) if g == patient}) == 1
    assert [int((folds == f).sum()) for f in range(5)] == [10] * 5
    assert [int(labels[folds == f].sum()) for f in range(5)] == [2] * 5
    order = generator.permutation(50)
    shuffled = patient_folds(labels[order], [groups[i] for i in order], folds=5, seed=3)
    assert (shuffled == folds[order]).all()
    assert (patient_folds(labels, groups, folds=5, seed=4) != folds).any()


def test_fit__uses_statistics_of_the_fit_set_only():
    generator = np.random.default_rng(6)
    x = generator.normal(5, 3, size=(30, 4))
    model = fit_linear(x, x[:, 0], None, task="regression")
    np.testing.assert_allclose(model.mean, x.mean(axis=0))
    np.testing.assert_allclose(model.scale, x.std(axis=0))
    shifted = model.predict(x + 100)
    np.testing.assert_allclose(shifted - model.predict(x), 100 * (model.weight[:, 0] / model.scale).sum(), rtol=1e-8)


def test_fit__penalty_follows_the_noise():
    generator = np.random.default_rng(7)
    x = generator.normal(size=(60, 20))
    clean = fit_linear(x, x @ generator.normal(size=20), None, task="regression")
    noise = fit_linear(x, generator.normal(size=60), None, task="regression")
    assert clean.alpha <= 1e-4 and noise.alpha >= 1
    assert sorted(RIDGE_ALPHAS, reverse=True) == list(RIDGE_ALPHAS)
    assert sorted(LOGISTIC_ALPHAS, reverse=True) == list(LOGISTIC_ALPHAS)


def test_predict__scored_on_disjoint_patients():
    # every patient has its own random label, written into a feature of its own: only a leak could score above chance
    generator = np.random.default_rng(8)
    patients = np.repeat(np.arange(40), 4)
    labels = generator.integers(2, size=40)[patients]
    features = np.eye(40)[patients] + generator.normal(0, 0.01, (160, 40))
    groups = [f"p{i}" for i in patients]
    clean = linear_predict(features, labels, groups, task="classification")
    leaky = linear_predict(features, labels, None, task="classification")
    assert (leaky == labels).mean() > 0.95
    assert (clean == labels).mean() < 0.7


def test_probe__finds_a_linear_target_and_constant_features_do_no_harm():
    generator = np.random.default_rng(9)
    features = np.hstack([generator.normal(size=(80, 6)), np.full((80, 1), 0.1)])
    target = features[:, :6] @ np.arange(6.0) + 7
    groups = [f"p{i // 2}" for i in range(80)]
    rows = linear_probe(features, target, groups, task="regression", draws=200)
    by_metric = {row["metric"]: row for row in rows}
    assert by_metric["r2"]["value"] > 0.9999 and by_metric["mae"]["value"] < 0.01
    assert by_metric["r2"]["low"] <= by_metric["r2"]["value"] <= by_metric["r2"]["high"]
    assert by_metric["r2"]["n_patients"] == 40 and by_metric["r2"]["by"] == "by patient"
    noise = linear_probe(features, generator.normal(size=80), groups, task="regression", draws=200)
    assert noise[0]["value"] < 0.1
    assert json.loads(json.dumps(rows)) == rows


def test_probe__classes_by_image_when_patients_are_unknown():
    generator = np.random.default_rng(10)
    labels = np.array(["t1", "t2", "flair"])[np.arange(45) % 3]
    features = np.array([[0, 4.0], [4, 0], [-4, -4]])[np.arange(45) % 3] + generator.normal(size=(45, 2))
    rows = linear_probe(features, labels, None, task="classification", draws=100)
    assert rows[0]["value"] > 0.9
    assert {row["by"] for row in rows} == {"by image"} and rows[0]["n_patients"] is None


def test_probe__is_reproducible():
    generator = np.random.default_rng(11)
    x, y = generator.normal(size=(30, 5)), generator.normal(size=30)
    first = linear_probe(x, y, None, task="regression", draws=50, seed=1)
    assert first == linear_probe(x, y, None, task="regression", draws=50, seed=1)
    assert first != linear_probe(x, y, None, task="regression", draws=50, seed=2)


def test_probe__refuses_two_patients():
    # with two, one is left to fit on, and no penalty can be chosen across patients
    with pytest.raises(RequestError, match=r"1 patient\(s\)"):
        linear_predict(np.random.default_rng(12).normal(size=(8, 2)), np.arange(8.0), ["a", "b"] * 4, task="regression")
