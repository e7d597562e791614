"""Parts of the suite: retrieval, probes chosen on validation, few labels, rows, tables, p-values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medssl.errors import RequestError
from medssl.evaluation import retrieval
from medssl.evaluation.bootstrap import paired_p
from medssl.evaluation.frozen import few_shot, fewest, fit_probe, predicted
from medssl.evaluation.linear_probe import RIDGE_ALPHAS, fit_on_validation
from medssl.evaluation.retrieval import precision_at_k, precisions, reidentified
from medssl.evaluation.scores import mean_auc
from medssl.evaluation.suite_rows import markdown, overall, pairs, row_of, skip, tables
from medssl.evaluation.target_cases import Cases


def blobs(n: int = 60, seed: int = 0) -> tuple[np.ndarray, Cases]:
    """Two classes along the first of six features, train, val and test in thirds."""
    rng = np.random.default_rng(seed)
    targets = np.arange(n) % 2
    features = rng.normal(size=(n, 6))
    features[:, 0] += 3 * targets
    split = np.array(["train", "val", "test"])[np.arange(n) // 2 % 3]
    return features, Cases(np.arange(n), targets.astype(float), [f"p{k}" for k in range(n)], split, ["a", "b"])


def test_precision_at_k__leaves_out_the_patient_itself() -> None:
    features = np.array([[1, 0], [1, 0.01], [0, 1], [0.01, 1], [1, 0.02]], dtype=float)
    labels = np.array([0, 0, 1, 1, 1])
    hits, chance = precision_at_k(features, labels, ["p", "p", "q", "r", "s"], 1)
    assert hits.tolist() == [0, 0, 1, 1, 0]  # the nearest of the first two is the fifth: the other is of the same patient
    assert chance == pytest.approx([0, 0, 0.5, 0.5, 0.5])
    assert precision_at_k(features, labels, None, 1)[0].tolist() == [1, 0, 1, 1, 0]
    with pytest.raises(RequestError, match="k 0"):
        precision_at_k(features, labels, None, 0)


def test_precision_at_k__counts_what_is_there_where_others_are_few() -> None:
    hits, _ = precision_at_k(np.eye(3), np.array([0, 0, 1]), ["p", "q", "q"], 5)
    assert hits.tolist() == [0.5, 1.0, 0.0]


def test_reidentified__asks_only_patients_with_another_study() -> None:
    features = np.array([[1, 0], [1, 0.1], [0, 1], [1, 0.02], [0.5, 0.5]], dtype=float)
    rows, hits, chance = reidentified(features, ["p", "p", "q", "r", "q"], ["s1", "s2", "s3", "s4", "s5"])
    assert rows.tolist() == [0, 1, 2, 4] and hits.tolist() == [0, 0, 1, 0]
    assert chance == pytest.approx([0.25] * 4)
    assert len(reidentified(features, list("abcde"), list("abcde"))[0]) == 0


def test_retrieval__is_the_same_in_blocks_and_for_several_k_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(23, 3)), np.arange(23) % 3
    patients, studies = [f"p{k // 3}" for k in range(23)], [f"s{k // 2}" for k in range(23)]
    whole, again = precisions(x, labels, patients, [1, 4]), reidentified(x, patients, studies)
    monkeypatch.setattr(retrieval, "ROWS_AT_ONCE", 5)
    parts = precisions(x, labels, patients, [1, 4])
    assert all(np.array_equal(whole[0][k], parts[0][k]) for k in (1, 4)) and np.array_equal(whole[1], parts[1])
    assert np.array_equal(parts[0][4], precision_at_k(x, labels, patients, 4)[0]) and len(again[0])
    assert all(np.array_equal(a, b) for a, b in zip(again, reidentified(x, patients, studies), strict=True))


def test_penalty__is_chosen_by_validation_cases_alone() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3))
    y = x[:, 0] + 0.01 * rng.normal(size=40)
    good = fit_on_validation(x, y, x[:5], x[:5, 0], task="regression")
    none = fit_on_validation(x, y, x[:5], np.full(5, y.mean()), task="regression")
    assert good.alpha < 1e-2 and none.alpha == RIDGE_ALPHAS[0]


def test_probe__predicts_test_cases_and_labels_of_test_have_no_part() -> None:
    features, cases = blobs()
    test = cases.where("test")
    table = predicted(fit_probe(features, cases, cases.where("train")), features, cases, test)
    assert table.shape == (len(test), 3) and mean_auc(table) > 0.9
    assert table[:, 1:].sum(axis=1) == pytest.approx(np.ones(len(test)))
    flipped = Cases(
        cases.ids, np.where(cases.split == "test", 1 - cases.targets, cases.targets), cases.groups, cases.split, cases.classes
    )
    assert np.array_equal(
        predicted(fit_probe(features, flipped, cases.where("train")), features, flipped, test)[:, 1:], table[:, 1:]
    )


def test_few_shot__draws_each_class_and_says_which() -> None:
    features, cases = blobs()
    table, ids = few_shot(features, cases, 3, range(4))
    assert table.shape == (len(cases.where("test")), 4, 3) and fewest(cases) == 10
    train = set(cases.ids[cases.where("train")].tolist())
    for drawn in ids:
        assert len(set(drawn)) == 6 and set(drawn) <= train and sum(cases.targets[drawn]) == 3
    assert ids[0] != ids[1] and few_shot(features, cases, 3, range(4))[1] == ids
    assert mean_auc(table[:, 0]) > 0.7


def test_paired_p__is_small_for_a_real_difference_and_large_for_none() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=50)
    groups = [str(k) for k in range(50)]
    assert paired_p(a + 1, a + 0.1 * rng.normal(size=50), groups, draws=200) == pytest.approx(1 / 200)
    assert paired_p(a, a + rng.normal(size=50) * 0.5, groups, draws=200) > 0.05
    assert np.isnan(paired_p(a[:1], a[:1], ["p"], draws=20))


def score(name: str, metric: str, value: float | None) -> dict[str, Any]:
    return {"name": name, "metric": metric, "value": value, "low": None, "high": None, "n_images": 20, "n_patients": 18}


def test_tables__have_controls_and_twin_even_where_they_did_not_run() -> None:
    rows = [
        row_of(score("encoder", "auroc", 0.9), "frozen", "finding", "logistic", main=True),
        row_of(score("random_init", "auroc", 0.6), "frozen", "finding", "logistic", main=True),
        row_of(score("pretrained", "auroc", 0.95), "classification", "finding", "20 labels", main=True),
        row_of(score("scratch", "auroc", 0.8), "classification", "finding", "20 labels", seeds=2, main=True),
        row_of(score("raw_pixels", "auroc", 0.7), "classification", "finding", "20 labels", main=True),
        row_of(score("encoder", "mae", None), "fairness", "organ", "by ward", subgroup="group_1"),
    ]
    found = {tier["tier"]: tier for tier in tables(rows, {"detection": [skip("", "mAP", "no recipe")]})}
    (frozen,) = found["frozen"]["tables"]
    assert frozen["models"] == ["weights", "scratch", "random_init", "raw_pixels", "intensity_statistics"]
    assert [line["what"] for line in frozen["lines"]] == ["logistic, auroc", "for comparison, fine-tuned: 20 labels, auroc"]
    assert frozen["lines"][1]["cells"]["scratch"]["value"] == 0.8
    assert found["detection"]["skipped"] == [{"task": "", "what": "mAP", "why": "no recipe"}]
    totals = {row["model"]: row for row in overall(rows)}
    assert totals["weights"]["tasks"] == 1 and totals["random_init"]["missing"] == 1
    z = pytest.approx(-0.162, abs=1e-3)
    assert totals["scratch"] == {"model": "scratch", "z": z, "z_modality": z, "rank": 2.0, "tasks": 1, "missing": 0}
    text = markdown(list(found.values()), list(totals.values()), [], pairs(rows))
    assert "- not in z and rank, of two models only: frozen: finding, logistic, auroc: weights minus random_init +0.300" in text
    assert "0.800 [seeds: 2]" in text
    assert "| logistic, auroc | 0.900 | - | 0.600 | - | - | 20 | 18 | 1 |" in text
    assert "- skipped: mAP: no recipe" in text and "insufficient" in text and "not run: the recipe leaves this tier out" in text


def test_lower_is_better__for_errors() -> None:
    rows = [
        row_of(score("encoder", "mae", 1.0), "regression", "organ", "ridge", main=True),
        row_of(score("raw_pixels", "mae", 2.0), "regression", "organ", "ridge", main=True),
        row_of(score("random_init", "mae", 3.0), "regression", "organ", "ridge", main=True),
    ]
    assert [row["model"] for row in overall(rows)] == ["weights", "raw_pixels", "random_init"]


def test_overall__weighs_modalities_alike_beside_tasks() -> None:
    """The weights are first in both tasks of MR and last in the one of CT."""
    rows = []
    for task, modality, values in (("a", "mri", (3, 2, 1)), ("b", "mri", (3, 2, 1)), ("c", "ct", (1, 2, 3))):
        for model, value in zip(("encoder", "raw_pixels", "random_init"), values):
            rows.append({**row_of(score(model, "auroc", value), "frozen", task, "logistic", main=True), "modality": modality})
    totals = {row["model"]: row for row in overall(rows)}
    edge = 1.5**0.5
    assert totals["weights"]["z"] == pytest.approx(edge / 3) and totals["weights"]["z_modality"] == pytest.approx(0)
    text = markdown([], list(totals.values()), [])
    assert "mean z, modalities alike" in text and f"| weights | {edge / 3:+.2f} | +0.00 |" in text
