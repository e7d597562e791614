"""What the clinical page says, from made-up results of which the answers are known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from medssl.errors import RequestError
from medssl.evaluation.clinical import clinical_facts, code_of, numbered
from medssl.evaluation.scores import mean_auc
from tests.report.clinical_results import SECRET, classification, detection, folds, regression, segmentation


def test_segmentation__headline_is_the_mean_over_patients_and_seeds() -> None:
    runs = [segmentation(seed=s, shift=0.01 * s) for s in (0, 1)]
    facts = clinical_facts([*runs, segmentation("scratch", shift=-0.1), segmentation(labels=5, shift=-0.2)], draws=100)
    assert (facts["task"], facts["arm"], facts["labels"], facts["seed"]) == ("segmentation", "pretrained", 20, 0)
    main = facts["headlines"][0]
    wanted = np.mean([np.mean(list(case["dice"].values())) for run in runs for case in run["cases"]])
    assert main["value"] == pytest.approx(wanted) and main["low"] < wanted < main["high"]
    assert (main["seeds"], main["n_patients"]) == (2, 60)
    assert [(row["labels"], row["arm"]) for row in facts["headlines"]] == [(20, "pretrained"), (20, "scratch"), (5, "pretrained")]


def test_segmentation__structures_misses_and_volumes() -> None:
    facts = clinical_facts([segmentation()], draws=100)
    rows = {row["structure"]: row for row in facts["structures"]["rows"]}
    assert rows["spleen"]["not_found"] == 1 and rows["liver"]["not_found"] == 0 and rows["liver"]["dice"]["n"] == 60
    liver = next(row for row in facts["agreement"]["rows"] if row["what"] == "liver")
    away = np.array(liver["measured"]) - np.array(liver["reference"])
    assert liver["bias"][0] == pytest.approx(away.mean()) and liver["bias"][1] < away.mean() < liver["bias"][2]
    assert liver["upper"][0] == pytest.approx(away.mean() + 1.96 * away.std(ddof=1), rel=1e-3)


def test_missed_wholly__counts_no_structure_that_is_not_there() -> None:
    result = segmentation()
    for k, (reference, found, dice) in {8: (0.0, 0.1, 0.0), 9: (0.0, 0.0, None), 10: (50.0, 40.0, 0.0)}.items():
        case = result["cases"][k]
        case["reference_ml"]["spleen"], case["volume_ml"]["spleen"], case["dice"]["spleen"] = reference, found, dice
        case["hd95_mm"]["spleen"] = None if dice is None else 300.0
    facts = clinical_facts([result], draws=50)
    spleen = next(row for row in facts["structures"]["rows"] if row["structure"] == "spleen")
    assert (spleen["not_found"], spleen["invented"]) == (2, 1)  # 5 and, of which no voxel was met, 10
    volumes = next(row for row in facts["agreement"]["rows"] if row["what"] == "spleen")
    assert (volumes["n"], volumes["neither"]) == (59, 1) and (0.0, 0.0) not in zip(volumes["reference"], volumes["measured"])
    for case in result["cases"]:
        case["reference_ml"], case["volume_ml"] = {}, {}
    assert clinical_facts([result], draws=20)["structures"]["rows"][1]["not_found"] is None


def test_worst_cases__are_by_code_and_worst_first() -> None:
    facts = clinical_facts([segmentation()], draws=100)
    rows = facts["worst"]["rows"]
    assert [row["case"] for row in rows[:2]] == ["case0004", "case0006"] and len(rows) == 10
    assert rows[0]["outside"] == ["voxel size 5 mm along axis 3, in training 1 to 2 mm"]
    assert code_of({"series_id": "slide0012"}, 6) == "slide0012" and code_of({"series_id": "slide_DOE"}, 6) == "test case 7"
    assert code_of({"id": "DOE_JANE_7"}, 6) == "test case 7" and code_of({"series_id": "0f" * 16}, 0) == "0f0f0f0f"


def test_subgroups__small_ones_have_no_number_and_sites_no_name() -> None:
    facts = clinical_facts([segmentation(n=80)], draws=100)
    tables = facts["subgroups"]["tables"]
    sexes = {row["group"]: row for row in tables["sex"]}
    assert sexes["F"]["sufficient"] and sexes["F"]["failed"] == 1 and sexes["F"]["value"] is not None
    assert (
        not sexes["M"]["sufficient"]
        and sexes["M"]["failed"] is None
        and sexes["M"]["value"] is None
        and sexes["M"]["n_images"] == 27
    )
    assert "age_band" not in tables  # nothing is known there
    assert [row["group"] for row in tables["site"]] == ["group_1"]
    assert SECRET not in json.dumps(facts)
    assert numbered(["b", "unknown", "a"]) == ["group_2", "unknown", "group_1"]


def test_classification__operating_point_and_calibration_are_those_of_the_cells() -> None:
    first = classification()
    facts = clinical_facts([first, classification(seed=1), classification("scratch", noise=4.0)], draws=100)
    rows = {(row["arm"], row["metric"]): row["value"] for row in facts["sensitivity"]["rows"]}
    assert rows["pretrained", "sensitivity"] == next(row["value"] for row in first["rows"] if row["metric"] == "sensitivity")
    assert {(row["arm"], row["metric"]) for row in facts["calibration"]["rows"]} >= {("pretrained", "ece"), ("scratch", "brier")}
    assert facts["headlines"][0]["value"] > facts["headlines"][1]["value"]  # scratch is noisier
    assert facts["calibration"]["temperature"] == {"pretrained": 1.3, "scratch": 1.3}
    assert [len(facts["calibration"]["bins"][arm]) for arm in ("pretrained", "scratch")] == [15, 15]
    older = {**first, "reliability": [{"low": 0.6, "high": 2 / 3, "n": 80, "confidence": 0.6, "accuracy": 0.5}]}  # of equal width
    assert clinical_facts([older], draws=20)["calibration"]["bins"]["pretrained"] == facts["calibration"]["bins"]["pretrained"]
    worst = facts["worst"]["rows"][0]
    assert worst["target"] != worst["called"] and len(worst["case"]) == 8
    groups = {row["group"]: row["sufficient"] for row in facts["subgroups"]["tables"]["sex"]}
    assert groups == {"F": True, "M": False}


def test_folds__are_one_test_set_and_each_case_goes_by_its_own_threshold() -> None:
    cells = [cell for arm in ("pretrained", "scratch") for seed in (0, 1) for cell in folds(arm, seed)]
    facts = clinical_facts(cells[::-1], draws=100)
    whole = clinical_facts([classification(), classification(seed=1)], draws=100)
    assert facts["folds"] == 2 and whole["folds"] is None
    main = facts["headlines"][0]
    of_folds = [
        mean_auc(
            np.array([[case["target"], *case["probability"]] for case in classification(seed=seed)["cases"][40 * k : 40 * k + 40]])
        )
        for seed in (0, 1)
        for k in (0, 1)
    ]
    assert main["value"] == pytest.approx(np.mean(of_folds)) and (main["seeds"], main["n_cases"]) == (2, 80)
    halves = [(case, 0.3 if k < 40 else 0.7) for k, case in enumerate(classification()["cases"])]
    right = [case["probability"][1] >= limit for case, limit in halves if case["target"] == 1]
    found = {(row["arm"], row["metric"]): row for row in facts["sensitivity"]["rows"]}
    assert found["pretrained", "sensitivity"]["value"] == pytest.approx(np.mean(right))
    assert found["pretrained", "sensitivity"]["low"] is not None and found["pretrained", "specificity"]["n"] == 40
    ours = {row["metric"]: row["value"] for row in facts["calibration"]["rows"] if row["arm"] == "pretrained"}
    assert ours == pytest.approx({row["metric"]: row["value"] for row in whole["calibration"]["rows"]})
    assert facts["calibration"]["bins"]["pretrained"] == whole["calibration"]["bins"]["pretrained"]
    assert facts["calibration"]["temperature"]["scratch"] == [1.1, 2.1] and facts["outside"]["range"] == {}
    assert facts["choice"].startswith("by fold: step 1") and facts["worst"]["n"] == 80
    cells[0]["fitted"] = {}
    assert "not every fold" in clinical_facts(cells[:2], draws=20)["sensitivity"]["why"]


def test_folds__that_are_not_finished_are_left_out() -> None:
    facts = clinical_facts([*folds(), folds("scratch")[0]], draws=20)
    assert [row["arm"] for row in facts["headlines"]] == ["pretrained"]


def test_regression__bias_is_seen_and_what_is_missing_says_why() -> None:
    facts = clinical_facts([regression()], draws=100)
    assert facts["agreement"]["rows"][0]["bias"][0] == pytest.approx(10, abs=1)
    assert "earlier medssl" in facts["outside"]["why"] and "nothing is known" in facts["subgroups"]["why"]
    assert "why" in facts["sensitivity"] and "why" in facts["calibration"]


def test_results_of_several_tasks__are_refused() -> None:
    with pytest.raises(RequestError, match="results of the tasks regression, segmentation"):
        clinical_facts([regression(), segmentation()], draws=100)
    with pytest.raises(RequestError, match="tasks none"):
        clinical_facts([], draws=100)


def test_detection__cases_are_counted_at_the_fitted_threshold_and_the_worst_come_first() -> None:
    facts = clinical_facts([detection(), detection("scratch", miss=2)], draws=50)
    rows = facts["worst"]["rows"]
    assert facts["unit"] == "image" and facts["worst"]["n"] == 60 and len(rows) == 9  # cases 1, 8, 15 ..., and the fourth
    assert {key: rows[0][key] for key in ("f1", "objects", "right", "missed", "wrong")} == {
        "f1": 0.0, "objects": 2, "right": 0, "missed": 2, "wrong": 3,
    }  # fmt: skip
    assert rows[0]["outside"] == ["vendor ge, in training siemens"] and rows[1]["f1"] == pytest.approx(2 / 3)
    point = {row["metric"]: row for row in facts["sensitivity"]["rows"] if row["arm"] == "pretrained"}
    assert point["sensitivity"]["value"] == pytest.approx(
        (108 - 2 - 8) / 108
    )  # of these 2 in the fourth, 1 in each of eight others
    assert point["false_positives"]["value"] == pytest.approx(3 / 60) and point["false_positives"]["low"] is not None
    froc = {row["arm"]: row for row in facts["sensitivity"]["froc"]}["pretrained"]
    assert froc["at"]["1"]["value"] == pytest.approx(98 / 108) and froc["at"]["1"]["low"] < 98 / 108 <= froc["at"]["1"]["high"]
    assert (froc["n"], froc["n_boxes"]) == (60, 108)
    groups = {row["group"]: row for row in facts["subgroups"]["tables"]["sex"]}
    assert groups["F"]["sufficient"] and groups["F"]["failed"] == 1 and not groups["M"]["sufficient"]
    assert facts["outside"]["n"] == 60 and facts["outside"]["counts"] == {"vendor": 1} and SECRET not in json.dumps(facts)


def test_detection__without_validation_cases_is_counted_at_frocs_own_point() -> None:
    facts = clinical_facts([detection(fitted=None)], draws=20)
    assert facts["sensitivity"]["rows"] == [] and not facts["worst"]["rows"][0]["fitted"]
    assert facts["sensitivity"]["threshold"]["pretrained"] == [pytest.approx(0.3)]  # 3 wrong boxes above, 59 more there
    assert facts["sensitivity"]["threshold"]["pretrained"][0] > 0.3


def test_detection__folds_are_one_test_set_and_seeds_a_mean() -> None:
    whole = [detection(seed=seed) for seed in (0, 1)]
    cells = [
        {**run, "fold": fold, "of_folds": 2, "cases": run["cases"][30 * (1 - fold) : 30 * (2 - fold)]}
        for run in whole
        for fold in (0, 1)
    ]
    facts, given = clinical_facts(cells, draws=50), clinical_facts(whole[:1], draws=50)
    main = facts["headlines"][0]
    assert facts["folds"] == 2 and (main["seeds"], main["n_cases"], main["n_patients"]) == (2, 60, 30)
    assert main["value"] == pytest.approx(given["headlines"][0]["value"]) and main["low"] < main["value"]
    at, wanted = (one["sensitivity"]["froc"][0]["at"] for one in (facts, given))
    assert {rate: row["value"] for rate, row in at.items()} == pytest.approx({rate: row["value"] for rate, row in wanted.items()})
    assert [row["case"] for row in facts["worst"]["rows"]] == [row["case"] for row in given["worst"]["rows"]]
