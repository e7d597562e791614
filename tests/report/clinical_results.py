"""Results of fine-tunings as cells leave them, made up: what the clinical page is drawn from."""

from __future__ import annotations

from typing import Any

import numpy as np

from medssl.evaluation.box_cases import image_boxes
from medssl.evaluation.calibration import brier, expected_calibration_error, reliability
from medssl.evaluation.detection import detection_rows
from medssl.evaluation.scores import score_row

SECRET = "St Elsewhere"


def segmentation(arm: str = "pretrained", seed: int = 0, labels: int = 20, n: int = 60, shift: float = 0.0) -> dict[str, Any]:
    """Two structures; case 3 is bad and outside the range, case 5 misses a structure."""
    rng = np.random.default_rng(7)
    cases = []
    for k in range(n):
        dice = {"liver": float(0.9 + 0.02 * rng.normal() + shift), "spleen": float(0.8 + 0.03 * rng.normal() + shift)}
        ml = {"liver": float(1500 + 200 * rng.normal()), "spleen": float(200 + 40 * rng.normal())}
        if k == 3:
            dice = {"liver": 0.2, "spleen": 0.1}
        if k == 5:
            dice["spleen"] = 0.0
        found = {name: value * (1.02 + 0.03 * float(rng.normal())) for name, value in ml.items()}
        if k == 5:
            found["spleen"] = 0.0
        flags = [{"by": "spacing", "reason": "voxel size 5 mm along axis 3, in training 1 to 2 mm"}] if k == 3 else []
        cases.append(
            {
                "id": f"case{k + 1:04d}",
                "patient": f"patient{k + 1:04d}",
                "dice": dice,
                "hd95_mm": {name: 20 * (1 - value) + 1 for name, value in dice.items()},
                "reference_ml": ml,
                "volume_ml": found,
                "outside": flags,
                "facts": {"sex": "F" if k % 3 else "M", "age_band": "unknown", "vendor": "ge", "site": SECRET},
            }
        )
    span = {
        "n": labels,
        "spacing_mm": [[1, 1, 1], [1, 1, 2]],
        "vendors": ["ge"],
        "knn_limit": 0.02,
        "neighbours": 5,
        "quantile": 0.99,
    }
    facts = {"arm": arm, "seed": seed, "labels": labels, "structures": ["liver", "spleen"], "cases": cases, "curve": []}
    return {
        **facts,
        "training_range": span,
        "choice": "last state; validation labels chose nothing",
        "settings": {"network": "segresnet"},
    }


def classification(arm: str = "pretrained", seed: int = 0, n: int = 80, noise: float = 1.0, labels: int = 40) -> dict[str, Any]:
    """Two classes, half and half, the seed moving scores a little."""
    rng = np.random.default_rng(3)
    targets = np.arange(n) % 2
    logits = 2.5 * (targets - 0.5) + noise * rng.normal(size=n) + 0.1 * np.random.default_rng(seed).normal(size=n)
    p = 1 / (1 + np.exp(-logits))
    chances = np.stack([1 - p, p], axis=1)
    patients = [f"{k:032x}" for k in range(n)]
    cases = [
        {
            "series_id": f"{k + 16**8:032x}"[::-1],
            "patient_id": patients[k],
            "target": float(targets[k]),
            "probability": chances[k].tolist(),
            "outside": [],
            "facts": {"sex": "F" if k % 8 else "M", "site": SECRET},
        }
        for k in range(n)
    ]
    values = np.concatenate([targets[:, None], chances], axis=1).astype(np.float64)
    called = p >= 0.7
    rows = [
        score_row(arm, "finetune", "brier", values, patients, statistic=brier, draws=50),
        score_row(arm, "finetune", "ece", values, patients, statistic=expected_calibration_error, draws=50),
        score_row(arm, "finetune", "sensitivity", called[targets == 1].astype(float), None, draws=50),
        score_row(arm, "finetune", "specificity", 1 - called[targets == 0].astype(float), None, draws=50),
    ]
    fitted = {"temperature": 1.3, "threshold": 0.7}
    facts = {
        "arm": arm,
        "seed": seed,
        "labels": labels,
        "task": "classification",
        "classes": ["class_1", "class_2"],
        "cases": cases,
    }
    span = {"n": labels, "spacing_mm": None, "vendors": [], "knn_limit": 0.02, "neighbours": 5, "quantile": 0.99}
    return {**facts, "rows": rows, "fitted": fitted, "reliability": reliability(chances, targets), "training_range": span}


def folds(arm: str = "pretrained", seed: int = 0) -> list[dict[str, Any]]:
    """The cases of `classification` dealt into two folds, each with its own threshold, temperature and training range."""
    whole = classification(arm, seed)
    return [
        {
            **whole,
            "fold": fold,
            "cases": whole["cases"][40 * fold : 40 * fold + 40],
            "rows": [{**row, "value": 0.1 * (fold + 1)} for row in whole["rows"]],
            "reliability": [],
            "fitted": {"temperature": 1.1 + fold, "threshold": 0.3 + 0.4 * fold},
            "seconds": {"train": 2.0 + 2 * fold},
            "choice": f"step {fold + 1}, the best of 9 validation cases",
        }
        for fold in (0, 1)
    ]


def detection(arm: str = "pretrained", seed: int = 0, n: int = 60, *, fitted: float | None = 0.5, miss: int = 7) -> dict[str, Any]:
    """Two objects in each picture but every tenth, which has none: one of every `miss`-th is missed, all of the fourth, with much for nothing.

    Found boxes are sure (0.9); every picture also has one that is wrong and unsure (0.3).
    """
    cases: list[dict[str, Any]] = []
    for k in range(n):
        boxes = [] if k % 10 == 9 else [[10.0, 10.0, 20.0, 20.0], [40.0, 10.0, 50.0, 20.0]]
        right = [] if k == 3 else boxes[k % miss == 1 :]
        found = [[box, 0, 0.9 - 0.001 * seed] for box in right] + [[[70.0, 70.0, 75.0, 75.0], 0, 0.3]]
        if k == 3:
            found = [[[60.0 + m, 5.0, 70.0 + m, 9.0], 0, 0.8] for m in range(3)]
        flags = [{"by": "vendor", "reason": "vendor ge, in training siemens"}] if k == 3 else []
        cases.append(
            {
                "series_id": f"{k + 16**8:032x}"[::-1],
                "patient_id": f"{k // 2:032x}",
                "real": [[box, 0, False, False] for box in boxes],
                "found": found,
                "outside": flags,
                "facts": {"sex": "F" if k % 8 else "M", "vendor": "ge", "site": SECRET},
            }
        )
    images, patients = [image_boxes(case) for case in cases], [case["patient_id"] for case in cases]
    facts = {"arm": arm, "seed": seed, "labels": 9, "task": "detection", "classes": ["class_1"], "cases": cases}
    span = {
        "n": 9,
        "n_patients": 5,
        "spacing_mm": None,
        "vendors": ["siemens"],
        "knn_limit": None,
        "neighbours": 0,
        "quantile": 0.99,
    }
    return {
        **facts,
        "rows": detection_rows(arm, images, ["class_1"], patients, draws=20),
        "fitted": {"threshold": fitted, "rate": 1.0},
        "training_range": span,
        "seconds": {"train": 1.0},
    }


def regression(arm: str = "pretrained", n: int = 30) -> dict[str, Any]:
    """Numbers that are found 10 too high."""
    rng = np.random.default_rng(5)
    truth = 50 + 10 * rng.normal(size=n)
    cases = [
        {
            "series_id": f"{k + 16**9:032x}"[::-1],
            "patient_id": str(k),
            "target": float(t),
            "prediction": float(t + 10 + rng.normal()),
        }
        for k, t in enumerate(truth)
    ]
    return {"arm": arm, "seed": 0, "labels": 9, "task": "regression", "classes": [], "cases": cases, "rows": [], "fitted": {}}
