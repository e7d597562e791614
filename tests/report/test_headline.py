from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medssl.report.collect import Leftovers
from medssl.report.headline import (
    Comparison,
    Estimate,
    bootstrap_mean,
    budget,
    comparisons,
    from_results,
    from_table,
    verdict,
)


def result(arm: str, dice: list[float], *, seed: int = 0, labels: int = 5, as_list: bool = False) -> dict:
    def scores(value: float) -> object:
        return [value + 0.1, value - 0.1] if as_list else {"a": value + 0.1, "b": value - 0.1}

    cases = [{"id": f"c{i}", "patient": f"p{i}", "dice": scores(value)} for i, value in enumerate(dice)]
    settings = {"network": "segresnet"}
    return {"arm": arm, "labels": labels, "seed": seed, "structures": ["a", "b"], "cases": cases, "settings": settings}


@pytest.mark.parametrize("as_list", [True, False])
def test_from_results__pairs_cases_and_averages_seeds(as_list: bool) -> None:
    scratch = [0.5, 0.6, 0.7]
    results = [
        result("scratch", scratch, seed=0, as_list=as_list),
        result("scratch", [v + 0.02 for v in scratch], seed=1, as_list=as_list),
        result("mae", [0.6, 0.7, 0.8], seed=0, as_list=as_list),
        result("mae", [0.6, 0.7, 0.8], seed=1, as_list=as_list),
    ]
    (line,) = from_results(results)
    assert (line.network, line.labels, line.arm, line.seeds, line.n_test) == ("segresnet", "5", "mae", 2, 3)
    assert line.scratch.value == pytest.approx(0.61) and line.pretrained.value == pytest.approx(0.7)
    assert line.difference.value == pytest.approx(0.09)
    assert line.difference.low == pytest.approx(0.09) and line.difference.high == pytest.approx(0.09)
    assert line.scratch.low < 0.61 < line.scratch.high


def test_from_results__a_missing_structure_and_a_missing_case_do_not_break_the_pair() -> None:
    scratch, mae = result("scratch", [0.5, 0.6]), result("mae", [0.7, 0.8, 0.9])
    scratch["cases"][0]["dice"]["b"] = None
    (line,) = from_results([scratch, mae])
    assert line.n_test == 2
    assert line.difference.value == pytest.approx(((0.7 - 0.6) + (0.8 - 0.6)) / 2)


def test_from_results__draws_cases_where_a_patient_is_not_known() -> None:
    known = [result("scratch", [0.5, 0.6, 0.7]), result("mae", [0.6, 0.9, 0.8])]
    nobody = [{**r, "cases": [{**case, "patient": None} for case in r["cases"]]} for r in known]
    some = [{**r, "cases": [{**case, "patient": None if k else "p"} for k, case in enumerate(r["cases"])]} for r in known]
    (by_patient,), (by_case,), (mixed,) = from_results(known), from_results(nobody), from_results(some)
    assert not by_patient.by_case and by_case.by_case and mixed.by_case
    for line in (by_case, mixed):
        assert line.difference == by_patient.difference  # as many patients as cases there
        assert line.difference.low < line.difference.high


def test_from_results__one_arm_alone_has_no_difference() -> None:
    (line,) = from_results([result("scratch", [0.5, 0.6])])
    assert line.scratch.value == pytest.approx(0.55) and line.difference == Estimate() and line.pretrained == Estimate()
    assert "missing" in verdict(line)


def test_bootstrap_mean__draws_patients_not_cases() -> None:
    values = [0.0] * 50 + [1.0] * 50
    by_case = bootstrap_mean(values, [str(i) for i in range(100)], "x")
    by_patient = bootstrap_mean(values, ["a"] * 50 + ["b"] * 50, "x")
    assert by_case.value == by_patient.value == 0.5
    assert 0.35 < by_case.low < by_case.high < 0.65
    assert (by_patient.low, by_patient.high) == (0.0, 1.0)
    assert bootstrap_mean([0.4, 0.6], ["a", "a"], "x") == Estimate(0.5)
    assert bootstrap_mean([], [], "x") == Estimate()


def test_bootstrap_mean__interval_has_the_width_of_the_standard_error() -> None:
    values = np.random.default_rng(0).normal(0.7, 0.1, 200)
    found = bootstrap_mean(values.tolist(), [str(i) for i in range(200)], "width")
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(200), rel=0.1)


def test_comparisons__label_curve_beats_results_and_matches_arms(tmp_path: Path) -> None:
    curve = {
        "name": "curve",
        "shared": {"settings": {"network": "unetr"}},
        "rows": [
            {"labels": 20, "arm": "scratch", "dice": 0.8, "low": 0.7, "high": 0.9, "seeds": [0, 1], "n_test": 50},
            {"labels": 20, "arm": "mae", "dice": 0.84, "low": 0.8, "high": 0.9, "seeds": [0, 1], "n_test": 50},
            {"labels": 5, "arm": "mae", "dice": 0.7, "low": None, "high": None, "seeds": [0]},
        ],
        "differences": [
            {"labels": 20, "arm": "other", "difference": 9.0, "low": 9.0, "high": 9.0},
            {"labels": 20, "arm": "mae", "difference": 0.04, "low": 0.01, "high": 0.07, "seeds": [0, 1]},
        ],
    }
    found = Leftovers(tmp_path, curves=[curve], results=[result("scratch", [0.1])])
    few, many = comparisons(found)
    assert (few.labels, few.scratch, few.difference) == ("5", Estimate(), Estimate())
    assert many.difference == Estimate(0.04, 0.01, 0.07) and many.network == "unetr"
    assert (many.seeds, many.n_test) == (2, 50)


def test_from_table__reads_both_shapes_and_leaves_others_alone() -> None:
    wide = [{"labels": 5, "scratch": 0.5, "scratch_interval": [0.4, 0.6], "pretrained": [0.7, 0.6, 0.8], "difference": 0.2}]
    (line,) = from_table(wide)
    assert line.scratch == Estimate(0.5, 0.4, 0.6) and line.pretrained == Estimate(0.7, 0.6, 0.8)
    assert line.difference == Estimate(0.2)
    long = [
        {"arm": "scratch", "labels": 5, "dice": 0.5, "low": 0.4, "high": 0.6},
        {"arm": "mae", "labels": 5, "dice": 0.7, "low": 0.6, "high": 0.8, "difference": 0.2, "difference_interval": [0.1, 0.3]},
    ]
    (line,) = from_table(long)
    assert line.difference == Estimate(0.2, 0.1, 0.3) and line.pretrained == Estimate(0.7, 0.6, 0.8)
    assert from_table([{"colour": "red"}]) == from_table("text") == from_table(None) == []


@pytest.mark.parametrize(
    ("difference", "start"),
    [
        (Estimate(0.05, 0.01, 0.09), "Pretraining helped: +5.0 Dice points at 5 labels"),
        (Estimate(-0.05, -0.09, -0.01), "Pretraining hurt: −5.0"),
        (Estimate(0.02, -0.01, 0.05), "No difference shown"),
        (Estimate(0.02), "+2.0 Dice points at 5 labels, without an interval: no conclusion"),
    ],
)
def test_verdict__says_no_more_than_the_interval(difference: Estimate, start: str) -> None:
    assert verdict(Comparison("n", "5", "mae", Estimate(), Estimate(), difference)).startswith(start)


def test_verdict__names_the_budget_that_all_runs_share(tmp_path: Path) -> None:
    found = Leftovers(tmp_path, results=[{"settings": {"steps": 1500}}, {"settings": {"steps": 1500}}])
    line = Comparison("n", "5", "mae", Estimate(), Estimate(), Estimate(0.05, 0.01, 0.09))
    assert verdict(line, budget(found)).startswith("Pretraining helped: +5.0 Dice points at 5 labels and 1,500 steps (95 %")
    found.results.append({"settings": {"steps": 7}})
    assert budget(found) is None and budget(Leftovers(tmp_path)) is None
