"""Ridge and logistic regression on frozen features, fitted and scored on disjoint patients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from medssl.evaluation.scores import (
    Task,
    accuracy,
    balanced_accuracy,
    check_features,
    encode_classes,
    patient_folds,
    score_rows,
)

# The penalty is alpha / 2 * |w|^2 beside a mean loss over images, so that one grid serves cohorts of all sizes.
RIDGE_ALPHAS = tuple(10.0**e for e in range(4, -7, -1))
LOGISTIC_ALPHAS = tuple(10.0**e for e in range(2, -5, -1))
INNER_FOLDS = 3


@dataclass(frozen=True)
class LinearModel:
    """A fitted linear map of standardised features.

    Args:
        mean: (E,) of the features it was fitted on.
        scale: (E,) their standard deviation, 1 where it is 0.
        weight: (E, K).
        bias: (K,).
        alpha: The penalty that inner validation chose.
        task: `regression` (K = 1) or `classification` (K classes).
    """

    mean: np.ndarray
    scale: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    alpha: float
    task: Task

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Return (N, K) values (K = 1), or logits of classes."""
        found: np.ndarray = (np.asarray(features, dtype=np.float64) - self.mean) / self.scale @ self.weight + self.bias
        return found

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Return (N,) values, or class indices."""
        scores = self.scores(features)
        predicted: np.ndarray = scores[:, 0] if self.task == "regression" else scores.argmax(axis=1)
        return predicted


def ridge_path(x: np.ndarray, y: np.ndarray, alphas: Sequence[float]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Solve ridge regression in closed form for several penalties with one decomposition.

    Minimises 1/n |x w + b - y|^2 + alpha |w|^2; the intercept b is not penalised.

    Args:
        x: (N, E) features, of any mean.
        y: (N,) values.
        alphas: Penalties above 0.

    Returns:
        (weight (E, 1), bias (1,)) per penalty.
    """
    x_mean, y_mean = x.mean(axis=0), y.mean()
    centred, target = x - x_mean, y - y_mean
    # the smaller of the two Gram matrices: images by images, or features by features
    wide = centred.shape[0] < centred.shape[1]
    values, vectors = np.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
    projected = vectors.T @ (target if wide else centred.T @ target)
    path = []
    for alpha in alphas:
        solved = vectors @ (projected / (values.clip(0) + len(x) * alpha))
        weight = centred.T @ solved if wide else solved
        path.append((weight[:, None], np.array([y_mean - x_mean @ weight])))
    return path


def logistic_path(x: np.ndarray, y: np.ndarray, alphas: Sequence[float], *, classes: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Fit multinomial logistic regression for several penalties, strongest first, each from the one before.

    Minimises the mean cross-entropy + alpha / 2 * |W|^2 in float64; biases are not penalised. The optimum
    lies in the span of the rows of x, so the fit runs there, which is smaller when images are fewer than features.

    Args:
        x: (N, E) features.
        y: (N,) class indices.
        alphas: Penalties above 0, in falling order.
        classes: Number of classes K; classes without an image in y are never predicted.

    Returns:
        (weight (E, K), bias (K,)) per penalty.
    """
    basis = row_basis(x) if x.shape[0] < x.shape[1] else None
    reduced = x if basis is None else x @ basis
    present, relabelled = np.unique(y, return_inverse=True)
    one_hot = np.eye(len(present))[relabelled.reshape(-1)]
    weight, bias = np.zeros((reduced.shape[1], len(present))), np.zeros(len(present))
    path = []
    for alpha in alphas:
        weight, bias = _minimise(reduced, one_hot, weight, bias, alpha)
        full_weight, full_bias = np.zeros((x.shape[1], classes)), np.full(classes, -np.inf)
        full_weight[:, present] = weight if basis is None else basis @ weight
        full_bias[present] = bias
        path.append((full_weight, full_bias))
    return path


def row_basis(x: np.ndarray) -> np.ndarray:
    """Return an orthonormal basis (E, R) of the span of the rows of x (N, E), without directions below 1e-5 of the largest."""
    values, vectors = np.linalg.eigh(x @ x.T)
    kept = values > 1e-10 * max(values[-1], np.finfo(np.float64).tiny)
    if not kept.any():
        return np.zeros((x.shape[1], 1))
    basis: np.ndarray = x.T @ vectors[:, kept] / np.sqrt(values[kept])
    return basis


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Return log-probabilities of (N, K) scores; SciPy's own spends ten times longer on arrays this small."""
    shifted = scores - scores.max(axis=1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def _minimise(
    x: np.ndarray, one_hot: np.ndarray, weight: np.ndarray, bias: np.ndarray, alpha: float
) -> tuple[np.ndarray, np.ndarray]:
    """Fit from a starting point by Newton's method with conjugate gradients.

    Not L-BFGS-B: its compiled inner loop calls a threaded BLAS on tiny matrices, 20 times slower on a busy machine.
    """
    from scipy.optimize import minimize

    def split(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return theta[: weight.size].reshape(weight.shape), theta[weight.size :]

    def joined(of_scores: np.ndarray, w: np.ndarray) -> np.ndarray:
        return np.concatenate([(x.T @ of_scores + alpha * w).reshape(-1), of_scores.sum(axis=0)])

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        w, b = split(theta)
        log_p = log_softmax(x @ w + b)
        value = -(one_hot * log_p).sum() / len(x) + alpha / 2 * (w**2).sum()
        return value, joined((np.exp(log_p) - one_hot) / len(x), w)

    @lru_cache(maxsize=1)
    def probabilities(theta: bytes) -> np.ndarray:
        w, b = split(np.frombuffer(theta))
        p: np.ndarray = np.exp(log_softmax(x @ w + b))
        return p

    def hessian_times(theta: np.ndarray, direction: np.ndarray) -> np.ndarray:
        dw, db = split(direction)
        p = probabilities(theta.tobytes())  # the same for all conjugate-gradient steps of one Newton step
        change = p * (x @ dw + db)
        return joined((change - p * change.sum(axis=1, keepdims=True)) / len(x), dw)

    start = np.concatenate([weight.reshape(-1), bias])
    options = {"maxiter": 100, "xtol": 1e-8}
    fitted = minimize(loss, start, jac=True, hessp=hessian_times, method="Newton-CG", options=options)
    return split(fitted.x)


def fit_linear(
    features: np.ndarray,
    targets: np.ndarray,
    groups: Sequence[str] | None,
    *,
    task: Task,
    classes: int | None = None,
    seed: int = 0,
) -> LinearModel:
    """Fit on these images only: standardisation, penalty and weights.

    The penalty is chosen by patient-grouped validation inside these images (lowest squared error; highest balanced
    accuracy, then accuracy); on a tie the stronger penalty wins.

    Args:
        features: (N, E).
        targets: (N,) values, or class indices.
        groups: Patient of each image; None makes each image its own.
        task: `regression` or `classification`.
        classes: Number of classes; None takes the largest index + 1.
        seed: Seed of the inner folds.

    Raises:
        RequestError: Unusable features, or fewer than two patients.
    """
    targets = np.asarray(targets)
    features = check_features(features, targets, groups)
    classes = 1 if task == "regression" else classes or int(targets.max()) + 1
    alphas = RIDGE_ALPHAS if task == "regression" else LOGISTIC_ALPHAS
    inner = patient_folds(targets, groups, folds=INNER_FOLDS, seed=seed)
    predictions = np.empty((len(alphas), len(targets)))
    for fold in np.unique(inner):
        fit, held = inner != fold, inner == fold
        models = _fit_path(features[fit], targets[fit], task, alphas, classes)
        for i, model in enumerate(models):
            predictions[i, held] = model.predict(features[held])
    merits = [_merit(np.stack([targets, row], axis=1), task) for row in predictions]
    best = max(range(len(alphas)), key=lambda i: (merits[i], -i))
    # the path down to the chosen penalty, because logistic fits start from the one before
    return _fit_path(features, targets, task, alphas[: best + 1], classes)[-1]


def fit_on_validation(
    features: np.ndarray,
    targets: np.ndarray,
    val_features: np.ndarray,
    val_targets: np.ndarray,
    *,
    task: Task,
    classes: int | None = None,
) -> LinearModel:
    """Fit on training images, the penalty chosen on validation images; see `fit_linear` for what is best and who wins a tie.

    Args:
        features: (N, E) of training images.
        targets: (N,) values, or class indices.
        val_features: (M, E) of validation images, of other patients.
        val_targets: (M,).
        task: `regression` or `classification`.
        classes: Number of classes; None takes the largest index among the training images + 1.

    Raises:
        RequestError: Unusable features.
    """
    targets, val_targets = np.asarray(targets), np.asarray(val_targets)
    features, val_features = check_features(features, targets, None), np.asarray(val_features, dtype=np.float64)
    classes = 1 if task == "regression" else classes or int(targets.max()) + 1
    alphas = RIDGE_ALPHAS if task == "regression" else LOGISTIC_ALPHAS
    path = _fit_path(features, targets, task, alphas, classes)
    merits = [_merit(np.stack([val_targets, model.predict(val_features)], axis=1), task) for model in path]
    return path[max(range(len(path)), key=lambda i: (merits[i], -i))]


def linear_predict(
    features: np.ndarray,
    targets: np.ndarray,
    groups: Sequence[str] | None,
    *,
    task: Task,
    folds: int = 5,
    seed: int = 0,
) -> np.ndarray:
    """Predict each image by a linear model fitted on the patients of the other folds.

    Args:
        features: (N, E).
        targets: (N,) values, or class indices.
        groups: Patient of each image; None makes each image its own.
        task: `regression` or `classification`.
        folds: Folds of patients, 2 or more; fewer when there are fewer patients.
        seed: Seed of the folds.

    Returns:
        (N,) values, or class indices.

    Raises:
        RequestError: Unusable features, or fewer than three patients (two must be left to choose the penalty).
    """
    targets = np.asarray(targets)
    features = check_features(features, targets, groups)
    outer = patient_folds(targets, groups, folds=folds, seed=seed)
    classes = None if task == "regression" else int(targets.max()) + 1
    predictions = np.empty(len(targets), dtype=np.float64 if task == "regression" else np.int64)
    for fold in np.unique(outer):
        fit, held = np.flatnonzero(outer != fold), np.flatnonzero(outer == fold)
        patients = None if groups is None else [groups[int(i)] for i in fit]
        model = fit_linear(features[fit], targets[fit], patients, task=task, classes=classes, seed=seed)
        predictions[held] = model.predict(features[held])
    return predictions


def linear_probe(
    features: np.ndarray,
    targets: Sequence[Any] | np.ndarray,
    groups: Sequence[str] | None,
    *,
    task: Task,
    name: str = "encoder",
    folds: int = 5,
    seed: int = 0,
    draws: int = 2000,
) -> list[dict[str, Any]]:
    """Score `linear_predict` with intervals by patient.

    Args:
        features: (N, E).
        targets: (N,) values, or labels of any sortable kind.
        groups: Patient of each image, or None.
        task: `regression` (R2, MAE) or `classification` (balanced accuracy, accuracy).
        name: Name of the features in the rows.
        folds: Folds of patients.
        seed: Seed of the folds and of the bootstrap.
        draws: Bootstrap draws.

    Returns:
        Rows as in `score_rows`, with probe `linear`.
    """
    values = encode_classes(targets)[0] if task == "classification" else np.asarray(targets, dtype=np.float64)
    predictions = linear_predict(features, values, groups, task=task, folds=folds, seed=seed)
    return score_rows(name, "linear", values, predictions, groups, task=task, draws=draws, seed=seed)


def _fit_path(features: np.ndarray, targets: np.ndarray, task: Task, alphas: Sequence[float], classes: int) -> list[LinearModel]:
    mean, scale = features.mean(axis=0), features.std(axis=0)
    # a constant feature has a rounding-error deviation, not exactly 0; it must not be blown up to unit size
    scale = np.where(scale > 1e-10 * (1 + np.abs(mean)), scale, 1.0)
    x = (features - mean) / scale
    if task == "regression":
        path = ridge_path(x, targets.astype(np.float64), alphas)
    else:
        path = logistic_path(x, targets, alphas, classes=classes)
    return [LinearModel(mean, scale, weight, bias, alpha, task) for (weight, bias), alpha in zip(path, alphas, strict=True)]


def _merit(rows: np.ndarray, task: Task) -> tuple[float, ...]:
    if task == "regression":
        return (-float(((rows[:, 0] - rows[:, 1]) ** 2).mean()),)
    return balanced_accuracy(rows), accuracy(rows)
