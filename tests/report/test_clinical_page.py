"""The clinical page: what comes first, that nothing on it is a name, and that it stands alone."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medssl.errors import RequestError
from medssl.evaluation.box_cases import WholeCase
from medssl.evaluation.clinical import clinical_facts
from medssl.evaluation.clinical_boxes import counted, worst_first
from medssl.evaluation.worst import WorstCases, slices
from medssl.evaluation.worst_boxes import worst_npz
from medssl.report import box_figures
from medssl.report.clinical_page import clinical_page, headline, read_worst
from tests.cli.test_bad_input import medssl
from tests.report.clinical_results import SECRET, classification, detection, folds, regression, segmentation
from tests.report.test_page import Outline, write_json


def outline_of(page: str) -> Outline:
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    return outline


def words(page: str) -> str:
    return "".join(outline_of(page).words)


def test_headline__says_the_width_before_the_patients() -> None:
    row = {"value": 0.8412, "low": 0.8011, "high": 0.8712, "n_patients": 50, "n_cases": 52}
    assert headline(row, "Dice") == "Dice 0.84, interval 0.80 to 0.87 (width 0.07), 50 patients"
    assert headline({**row, "low": None, "n_patients": 1}, "AUC") == "AUC 0.84, no interval, 1 patient"
    assert "52 cases (not all patients known)" in headline({**row, "n_patients": None}, "Dice")


def test_segmentation__every_question_has_its_section() -> None:
    facts = clinical_facts([segmentation(), segmentation("scratch", shift=-0.1)], draws=50)
    page = clinical_page(facts)
    assert "label maps" not in page and "2 cases have &lt;unknown" in clinical_page(
        {**facts, "label_facts": ["2 cases have <unknown"]}
    )
    outline = outline_of(page)
    assert outline.titles == [
        "At a glance",
        "Structures",
        "Volumes",
        "The ten worst cases",
        "Failures by subgroup",
        "Cases outside the training range",
        "Before you use this",
    ]
    said = words(page)
    assert "case0004" in said and "insufficient" in said and "1 of 60 test cases are flagged" in said
    assert "voxel size 5 mm along axis 3, in training 1 to 2 mm" in said and "by bootstrap over patients." in said
    nobody = segmentation()
    nobody["cases"] = [{**case, "patient": None} for case in nobody["cases"]]
    said = words(clinical_page(clinical_facts([nobody], draws=50)))
    assert "60 cases (not all patients known)" in said and "by bootstrap over cases, as not all patients are known." in said
    assert "Research only" in said and "Bland-Altman" in said
    few = {
        **nobody,
        "cases": [{**case, "patient": "patient0001" if k < 4 else None} for k, case in enumerate(nobody["cases"][:12])],
    }
    said = words(clinical_page(clinical_facts([few], draws=50)))
    assert "Only 12 test cases: every number" in said and "test patients: every" not in said
    assert SECRET not in page
    stripped = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.search(r"https?:|//[a-z]|<script|@import|url\(", stripped) and "default-src 'none'" in page


def test_classification__says_on_what_the_threshold_was_fitted() -> None:
    said = words(clinical_page(clinical_facts([classification()], draws=50)))
    assert "fitted on validation cases only" in said and "specificity of 95 %" in said and "The finding is class 2" in said
    assert "Reliability" in said and "Structures" not in said
    assert "15 bins of as equal numbers of cases as can be" in said and "no more than bins" not in said
    few = words(clinical_page(clinical_facts([classification(n=12)], draws=50)))
    assert "with 12 cases, no more than bins" in few


def test_folds__are_said_to_be_several_networks() -> None:
    said = words(clinical_page(clinical_facts([*folds(), *folds("scratch")], draws=50)))
    assert "test cases of 2 folds are taken together" in said and "Each fold has a threshold of its own" in said
    assert (
        "temperature: pretrained by fold 1.1 2.1" in said
        and "training cases of its own fold" in said
        and "of None cases" not in said
    )


def test_chance_of_a_flag__is_told_by_patients() -> None:
    result = segmentation(n=6)
    assert "1 in 21 test cases lies above" in words(
        clinical_page(clinical_facts([result], draws=20))
    )  # an earlier result: cases alone
    result["training_range"] |= {"n": 20, "n_patients": 4}
    said = words(clinical_page(clinical_facts([result], draws=20)))
    assert "1 in 5 test patients lies above" in said and "Training range of 20 cases of 4 patients" in said


def test_structures_that_are_nowhere__are_left_out_of_agreement_and_counted() -> None:
    result = segmentation(n=8)
    result["cases"][7]["reference_ml"]["spleen"] = result["cases"][7]["volume_ml"]["spleen"] = 0.0
    said = words(clinical_page(clinical_facts([result], draws=20)))
    assert "in neither label nor prediction are left out: spleen 1." in said and "predicted where none is" in said


def test_small_groups__are_not_counted_out() -> None:
    result = segmentation(n=60)
    for case in result["cases"]:
        case["facts"] = {"sex": "M" if case["id"] == "case0010" else "F"}
    page = clinical_page(clinical_facts([result], draws=20))
    row = next(row for row in page.split("<tr>") if ">M<" in row)
    assert row.count("fewer than 10") == 2 and not re.search(r">1<", row)
    assert "can be shared" not in page and "rows of single patients" in words(page)


def test_what_is_missing__is_said() -> None:
    said = words(clinical_page(clinical_facts([regression()], draws=50)))
    assert "earlier medssl" in said and "nothing is known of the patients and scanners" in said


def test_detection__every_question_has_its_section() -> None:
    page = clinical_page(clinical_facts([detection(), detection("scratch", miss=2)], draws=50))
    assert outline_of(page).titles == [
        "At a glance",
        "Sensitivity at fixed false positives",
        "The ten worst cases",
        "Failures by subgroup",
        "Cases outside the training range",
        "Before you use this",
    ]
    said = words(page)
    assert re.search(r"mAP 0\.\d\d, interval 0\.\d\d to 0\.\d\d \(width 0\.\d\d\), 30 patients", said)
    assert "at most 0.125" in said and "false positives per image" in said and "fitted on validation cases alone" in said
    row = next(row for row in page.split("<tr>") if ">at most 1<" in row)
    assert row.count("<small>(") == 2  # both arms have an interval at every rate
    assert "1 of 60 test cases are flagged" in said and "vendor ge, in training siemens" in said and "insufficient" in said
    assert "F1 below 0.5" in said and SECRET not in page and "images. --with-images adds them" in said


def test_detection_without_validation_cases__says_where_its_threshold_is_from() -> None:
    said = words(clinical_page(clinical_facts([detection(fitted=None)], draws=20)))
    assert "No threshold was fitted" in said and "as there were no validation cases" in said


def test_detections_of_an_earlier_medssl__are_told_from_those_without_validation_cases() -> None:
    said = words(clinical_page(clinical_facts([{**detection(), "fitted": {}}], draws=5)))
    assert said.count("these results are of an earlier medssl, which fitted none") == 2 and "no validation cases" not in said


def test_missed_objects__come_before_what_is_found_where_there_is_none() -> None:
    result = detection(fitted=0.2)  # now every picture has one box for nothing, also each tenth, which has no object
    facts = clinical_facts([result], draws=5)
    rows = facts["worst"]["rows"]
    assert [row["missed"] > 0 for row in rows] == [True] * 9 + [False] and rows[9]["f1"] == 0.0 == rows[0]["f1"]
    assert [row["case"] for row in rows] == [case["series_id"][:8] for case in worst_first(counted(result)["cases"])[:10]]
    group = next(row for row in facts["subgroups"]["tables"]["vendor"] if row["group"] == "ge")
    assert (group["failed"], group["alarms"]) == (1, 6)
    assert "without an object, something found" in words(clinical_page(facts))


def test_detection_without_an_error__has_no_worst_case() -> None:
    result = detection(n=1)
    assert "None of 1 test cases has an error" in words(clinical_page(clinical_facts([result], draws=20)))


@pytest.mark.parametrize("dims", [2, 3])
def test_worst_detections__are_kept_as_pictures_with_boxes_and_read_again(tmp_path: Path, dims: int) -> None:
    """A view of 20 pixels along each axis shows a case of 40; the box of the second case is missed."""
    low, high, away = [8.0] * dims, [16.0] * dims, [30.0] * dims
    boxes = [[*low, *high]]
    cases = [
        {"case": f"case000{k}", "patient_id": "p", "real": [[boxes[0], 0, False, False]], "found": [[found, 0, 0.9]]}
        for k, found in enumerate((boxes[0], [*away, *[33.0] * dims]))
    ]
    result = {"classes": ["lesion"], "cases": cases, "fitted": {"threshold": 0.5}}
    asked: list[str] = []

    def whole(name: str) -> WholeCase:
        asked.append(name)
        image = torch.linspace(0, 1, 20**dims).reshape(1, 1, *[20] * dims)
        return WholeCase(image, np.full(dims, 2.0), np.zeros(dims), np.array(boxes), np.zeros(1, int), np.zeros(1, bool))

    (tmp_path / "worst.npz").write_bytes(worst_npz(result, whole, 5))
    assert set(asked) == {"case0001"}  # the other has no error, and is not shown
    pictures = box_figures.read_worst(tmp_path / "worst.npz")
    assert list(pictures) == ["case0001"] and len(pictures["case0001"]) == (1 if dims == 2 else 3)
    cut = next(iter(pictures["case0001"].values()))
    assert cut.real.tolist() == [[4, 4, 8, 8]] and cut.real_kind.tolist() == [0] and cut.spacing.tolist() == [2, 2]
    assert len(cut.found) == (1 if dims == 2 else 0)  # the slices go through what was missed
    assert box_figures.boxes_png(pictures["case0001"])[:4] == b"\x89PNG"
    assert box_figures.read_worst(tmp_path / "none.npz") == {}


def test_boxes_of_slices__turn_with_the_picture() -> None:
    image = np.zeros((6, 4))
    image[1:3, 0:1] = 1
    cut = box_figures.BoxCut(
        image, np.ones(2), np.array([[1.0, 0, 3, 1]]), *(np.zeros(0) for _ in range(1)), np.zeros((0, 4)), *[np.zeros(0)] * 2
    )
    turned = box_figures._upright(cut)
    (top, left, bottom, right) = turned.real[0].astype(int)
    assert turned.image[top:bottom, left:right].all() and turned.image.sum() == 2 and turned.image.shape == (4, 6)


def test_worst_cases__are_kept_as_slices_and_read_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    label = np.zeros((20, 18, 16), np.int16)
    label[5:9, 5:9, 5:9] = 2
    kept = WorstCases(count=2)
    for place, score in enumerate((0.9, 0.2, float("nan"), 0.5, 0.7)):
        found = np.roll(label, place, axis=0)
        kept.show(f"case{place:04d}", score, rng.normal(size=label.shape), label, found, (1.0, 1.0, 2.0))
    assert [case for _, case, _ in kept.kept] == ["case0001", "case0003"]
    (tmp_path / "worst.npz").write_bytes(kept.to_npz({2: "liver"}))
    pictures, structures = read_worst(tmp_path / "worst.npz")
    assert list(pictures) == ["case0001", "case0003"] and structures == ["liver"]
    cut = pictures["case0001"]["axial"]
    assert cut.image.shape == (20, 18) and cut.maps["label"].max() == 1 and cut.spacing_mm == (1.0, 1.0)
    assert read_worst(tmp_path / "none.npz") == ({}, [])


def test_slice__is_where_prediction_and_label_differ_most() -> None:
    label, found = np.zeros((12, 10, 8), np.int16), np.zeros((12, 10, 8), np.int16)
    label[2:10, 2:8, 2:6] = 1
    found[:] = label
    found[:, :, 4] = 0
    found[2, 2, 2] = 0
    parts = slices(np.zeros(label.shape), label, found, (1, 1, 1))
    assert parts["axial_prediction"].sum() == 0 and parts["axial_label"].sum() == 48


def test_command__draws_the_clinical_page_of_a_fine_tuning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "finetune"
    for result in (segmentation(n=6), segmentation("scratch", n=6)):
        write_json(folder / "cells" / f"{result['arm']}_n20_s0" / "results.json", result)
    write_json(folder / "label_curve.json", {})
    status, stdout, stderr = medssl(capsys, "report", folder, "--json")
    assert status == 0, stderr
    page = Path(json.loads(stdout)["report"])
    assert page == folder / "report.html" and stat.S_IMODE(page.stat().st_mode) == 0o600
    assert "Segmentation: what to expect of this network" in page.read_text()
    assert medssl(capsys, "report", folder, "--with-images", "--out", tmp_path / "private.html")[0] == 0
    assert stat.S_IMODE((tmp_path / "private.html").stat().st_mode) == 0o600
    write_json(tmp_path / "empty" / "label_curve.json", {})
    status, _, stderr = medssl(capsys, "report", tmp_path / "empty")
    assert status == 2 and "no cell is done yet" in stderr


def test_facts__of_no_results_are_refused() -> None:
    with pytest.raises(RequestError, match="it takes the folder of one fine-tuning"):
        clinical_facts([])


def test_command__keeps_the_structures_of_folds_without_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for fold in (0, 1):
        write_json(tmp_path / "cells" / f"pretrained_n20_s0_f{fold}" / "results.json", segmentation())
    write_json(tmp_path / "target_curve.json", {})
    kept = iter([({}, ["liver"]), ({}, [])])
    asked: list[Any] = []
    monkeypatch.setattr("medssl.report.clinical_page.read_worst", lambda _: next(kept))
    monkeypatch.setattr(
        "medssl.evaluation.clinical.clinical_facts", lambda _: {"arm": "pretrained", "labels": 20, "seed": 0, "task": ""}
    )
    monkeypatch.setattr("medssl.report.clinical_page.clinical_page", lambda _, **given: asked.append(given["structures"]) or "")
    status, _, stderr = medssl(capsys, "report", tmp_path, "--with-images")
    assert status == 0, stderr
    assert asked == [["liver"]]


def test_command__gathers_the_pictures_of_all_folds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = detection(n=8)
    folder = tmp_path / "finetune"
    for fold in (0, 1):
        cell = folder / "cells" / f"pretrained_n9_s0_f{fold}"
        result = {**whole, "fold": fold, "of_folds": 2, "cases": whole["cases"][4 * fold : 4 * fold + 4]}
        write_json(cell / "results.json", result)
        view = WholeCase(torch.rand(1, 1, 80, 80), np.ones(2), np.zeros(2), np.zeros((0, 4)), np.zeros(0), np.zeros(0))
        (cell / "figures").mkdir()
        (cell / "figures" / "worst.npz").write_bytes(worst_npz(result, lambda _, view=view: view, 10))
    write_json(folder / "target_curve.json", {})
    for images, count in (([], 0), (["--with-images"], 2)):
        status, _, stderr = medssl(capsys, "report", folder, *images)
        assert status == 0, stderr
        page = (folder / "report.html").read_text()
        assert page.count("Boxes that are there and boxes found in") == count and ("Private: shows images" in page) is bool(images)
        assert "test cases of 2 folds are taken together" in words(page)
