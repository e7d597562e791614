from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medssl.cli.training import summary_table
from medssl.errors import ImageError, RequestError
from medssl.evaluation import label_curve as module
from medssl.evaluation import pretrained_views
from medssl.evaluation.bootstrap import bootstrap_interval, paired_bootstrap
from medssl.evaluation.clinical import clinical_facts
from medssl.evaluation.cohort import Cohort
from medssl.evaluation.label_curve import Cell, claim, label_curve, markdown, plan, score_table, summarise
from medssl.evaluation.segmentation_results import CaseScore, FinetuneResult
from medssl.evaluation.segmentation_settings import FinetuneSettings
from medssl.report.clinical_page import clinical_page
from tests.evaluation.test_finetune import pretrained
from tests.evaluation.tiny_cohort import TINY_ENCODER, tiny_volume, write_cohort, write_nifti

SETTINGS = FinetuneSettings(encoder=TINY_ENCODER, crop=(16, 16, 16), steps=2, warmup_steps=0, figures=0)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return Cohort.load(write_cohort(tmp_path_factory.mktemp("cohort")))


def result(arm: str, labels: int, seed: int, scores: list[list[float | None]]) -> FinetuneResult:
    cases = [CaseScore(str(i), f"p{i // 2}", {"a": a, "b": b}, {"a": 1.0, "b": 3.0}) for i, (a, b) in enumerate(scores)]
    seconds = {"train": 10.0, "per_step": 0.1}
    return FinetuneResult(
        arm, labels, seed, ["a", "b"], cases, [], None, "last state; validation labels chose nothing", seconds, {}
    )


def fake_finetune(calls: list[Cell]) -> Any:
    def run(cohort: Cohort, settings: FinetuneSettings, out: Path, **kw: Any) -> FinetuneResult:
        calls.append(Cell(kw["arm"], kw["labels"], kw["seed"]))
        base = 0.5 + 0.01 * kw["labels"] + (0.1 if kw["arm"] == "ours" else 0.0)
        made = result(kw["arm"], kw["labels"], kw["seed"], [[base, base], [base, base + 0.02]])
        out.mkdir(parents=True)
        (out / "results.json").write_text(json.dumps(made.to_json()))
        return made

    return run


def test_cells__are_computed_once_and_continue_after_a_kill(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Cell] = []
    arms = {"ours": pretrained(), "scratch": None}

    def dies_at_third(*args: Any, **kw: Any) -> FinetuneResult:
        if len(calls) == 2:
            folder = args[2]
            folder.mkdir(parents=True)
            (folder / "curve.jsonl").touch()  # a cell cut short: no results.json
            raise KeyboardInterrupt
        made: FinetuneResult = fake_finetune(calls)(*args, **kw)
        return made

    monkeypatch.setattr(module, "finetune", dies_at_third)
    with pytest.raises(KeyboardInterrupt):
        label_curve(cohort, SETTINGS, tmp_path, arms=arms, counts=[1, 2], seeds=[0, 1])
    kept = json.loads((tmp_path / "summary.json").read_text())
    assert kept["cells"] == {"planned": 8, "done": 2}
    assert [row["arm"] for row in kept["rows"]] == ["ours", "scratch"]  # the pair of the first seed came first

    def rest(*args: Any, **kw: Any) -> FinetuneResult:
        (args[2] / "curve.jsonl").unlink(missing_ok=True)
        if args[2].exists():
            args[2].rmdir()
        made: FinetuneResult = fake_finetune(calls)(*args, **kw)
        return made

    monkeypatch.setattr(module, "finetune", rest)
    seen = []
    summary = label_curve(
        cohort,
        SETTINGS,
        tmp_path,
        arms=arms,
        counts=[1, 2],
        seeds=[0, 1],
        on_cell=lambda number, total, cell, _: seen.append((number, total, cell.name)),
    )
    assert len(calls) == len(set(calls)) == 8
    assert seen[0] == (1, 8, "ours_n1_s0")
    assert summary["cells"] == {"planned": 8, "done": 8}
    assert [row["labels"] for row in summary["rows"]] == [1, 1, 2, 2]
    assert summary["differences"][0]["difference"] == pytest.approx(0.1)
    assert (tmp_path / "table.md").read_text().count("ours - scratch") == 2


def test_a_real_curve__runs_and_skips_finished_cells(cohort: Cohort, tmp_path: Path) -> None:
    arms = {"ours": pretrained(), "scratch": None}
    settings = replace(SETTINGS, encoder=None)  # the twin takes it from the weights
    first = label_curve(cohort, settings, tmp_path, arms=arms, counts=[1], seeds=[0])
    stamp = (tmp_path / "cells" / "ours_n1_s0" / "results.json").stat().st_mtime_ns
    again = label_curve(cohort, settings, tmp_path, arms=arms, counts=[1], seeds=[0])
    assert (tmp_path / "cells" / "ours_n1_s0" / "results.json").stat().st_mtime_ns == stamp
    assert first == again
    runs = [run for arm in arms if (run := module.read_cell(tmp_path / "cells" / f"{arm}_n1_s0"))]
    a, b = (score_table([run])[0][0] for run in runs)
    assert first["differences"][0]["difference"] == pytest.approx(float(a.mean() - b.mean()))


def test_unknown_patients__are_drawn_case_by_case_and_said(cohort: Cohort, tmp_path: Path) -> None:
    """An index that names no patient may give all cases one: a bootstrap over it would have no interval."""
    nobody = [replace(case, patient="x", patient_id="patient0001", patient_known=False) for case in cohort.cases]
    arms = {"ours": pretrained(), "scratch": None}
    summary = label_curve(replace(cohort, cases=tuple(nobody)), SETTINGS, tmp_path, arms=arms, counts=[2], seeds=[0])
    cells = {arm: cell for arm in arms if (cell := module.read_cell(tmp_path / "cells" / f"{arm}_n2_s0"))}
    tables = {arm: score_table([cell])[0][0] for arm, cell in cells.items()}
    for row in summary["rows"]:
        assert (row["n_test"], row["n_patients"], row["by"]) == (2, None, "by image")
        assert (row["dice"], row["low"], row["high"]) == bootstrap_interval(tables[row["arm"]], None)
    (difference,) = summary["differences"]
    expected = paired_bootstrap(tables["ours"], tables["scratch"], None)
    assert (difference["difference"], difference["low"], difference["high"]) == expected and np.isfinite(expected).all()
    assert "Intervals by case: not all patients are known" in (tmp_path / "table.md").read_text()
    assert [case.patient for case in cells["scratch"].cases] == [None, None]
    assert cells["scratch"].training_range["n_patients"] == 2
    facts = clinical_facts([cell.to_json() for cell in cells.values()], draws=50)
    assert facts["headlines"][0]["n_patients"] is None and facts["headlines"][0]["low"] is not None


def test_known_patients__are_drawn_together() -> None:
    runs = [result("scratch", 5, 0, [[0.5, 0.7], [0.9, 0.7], [0.2, 0.4], [0.6, 0.8]])]
    (row,) = summarise(runs)["rows"]
    assert (row["n_test"], row["n_patients"], row["by"]) == (4, 2, "by patient")
    assert "Intervals by case" not in markdown(summarise(runs))
    some = replace(runs[0], cases=[replace(runs[0].cases[0], patient=None), *runs[0].cases[1:]])
    assert score_table([some])[1] is None and summarise([some])["rows"][0]["by"] == "by image"


def test_summary__averages_structures_then_seeds_and_pairs_patients() -> None:
    ours = [
        result("ours", 5, 0, [[0.8, 0.6], [0.9, 0.7], [0.7, None]]),
        result("ours", 5, 1, [[0.9, 0.7], [0.9, 0.9], [0.5, None]]),
    ]
    twins = [
        result("scratch", 5, 1, [[0.5, 0.5], [0.6, 0.6], [0.7, None]]),
        result("scratch", 5, 2, [[0.1, 0.1], [0.1, 0.1], [0.1, None]]),
    ]
    summary = summarise([*ours, *twins])
    row = summary["rows"][0]
    by_case = np.array([[0.7, 0.8, 0.7], [0.8, 0.9, 0.5]])
    assert row["dice"] == pytest.approx(by_case.mean())
    assert row["seed_means"] == pytest.approx(list(by_case.mean(axis=1)))
    assert row["seed_spread"] == pytest.approx(abs(by_case[0].mean() - by_case[1].mean()))
    assert row["structures"]["b"] == pytest.approx((0.65 + 0.8) / 2)
    assert row["hd95_mm"] == {"a": 1.0, "b": 3.0}
    (difference,) = summary["differences"]
    assert difference["seeds"] == [1]  # only the seed that both have
    expected = paired_bootstrap(by_case[1], np.array([0.5, 0.6, 0.7]), ["p0", "p0", "p1"])
    assert (difference["difference"], difference["low"], difference["high"]) == pytest.approx(expected)


def test_table__says_when_validation_labels_chose_the_state() -> None:
    plain = result("scratch", 5, 0, [[0.7, 0.5], [0.8, 0.6]])
    assert "alidation" not in markdown(summarise([plain]))
    text = markdown(summarise([replace(plain, choice="step 20, the best of 8 validation cases")]))
    assert "Validation labels beyond the budget chose the state that is scored, for instance step 20, the best of 8" in text


def test_table__shows_points_and_signed_differences() -> None:
    text = markdown(
        summarise(
            [
                result("ours", 5, 0, [[0.8, 0.6], [0.9, 0.7], [0.8, 0.8], [0.9, 0.9]]),
                result("scratch", 5, 0, [[0.7, 0.5], [0.8, 0.6], [0.7, 0.7], [0.8, 0.8]]),
            ]
        )
    )
    assert "| 5 | ours | 80.0 (75.0 to 85.0) | 1 | 0.0 | a 85.0, b 75.0 | a 1.00, b 3.00 | 10 |" in text
    assert "| 5 | ours - scratch | +10.0 (+10.0 to +10.0) | +10.0 |" in text


def test_unequal_test_cases__are_refused() -> None:
    with pytest.raises(RequestError, match="scored on different test cases"):
        score_table([result("a", 1, 0, [[0.5, 0.5]]), result("a", 1, 1, [[0.5, 0.5], [0.5, 0.5]])])


def finished_cell(out: Path) -> None:
    """One finished cell: without one there is nothing to be mixed."""
    (out / "cells" / "scratch_n1_s0").mkdir(parents=True)
    (out / "cells" / "scratch_n1_s0" / "results.json").write_text("{}")


def test_folder__without_a_finished_cell_takes_a_corrected_recipe(cohort: Cohort, tmp_path: Path) -> None:
    arms = {"scratch": None}
    with pytest.raises(RequestError, match="2 numbers for 3 classes"):
        label_curve(cohort, replace(SETTINGS, class_weights=(1.0, 2.0)), tmp_path, arms=arms, counts=[1], seeds=[0])
    with pytest.raises(RequestError, match="unknown key warped"):
        label_curve(cohort, replace(SETTINGS, augment={"warped": 1}), tmp_path, arms=arms, counts=[1], seeds=[0])
    assert not list(tmp_path.rglob("curve.jsonl"))
    summary = label_curve(cohort, replace(SETTINGS, class_weights=(1.0, 2.0, 2.0)), tmp_path, arms=arms, counts=[1], seeds=[0])
    assert summary["cells"]["done"] == 1


def test_weights_of_other_voxels__are_refused_before_the_folder_is_claimed_unless_forced(
    cohort: Cohort, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arms = {"ours": pretrained(spacing_mm=[2.0, 2.0, 2.0], spacing_source="views"), "scratch": None}
    with pytest.raises(RequestError, match="pretrained at 2 x 2 x 2 mm"):
        label_curve(cohort, SETTINGS, tmp_path / "out", arms=arms, counts=[1], seeds=[0])
    assert not (tmp_path / "out").exists()
    pretrained_views._warn.cache_clear()
    label_curve(cohort, replace(SETTINGS, force=True), tmp_path / "out", arms=arms, counts=[1, 2], seeds=[0])
    assert sum("forced: " in record.getMessage() for record in caplog.records) == 1  # not again for each cell
    shared = json.loads((tmp_path / "out" / "label_curve.json").read_text())
    assert list(shared["forced"]) == ["ours"] and "pretrained at 2 x 2 x 2 mm" in shared["forced"]["ours"][0]
    line = "Forced, images differ from those of the pretraining: the weights were pretrained at 2 x 2 x 2 mm"
    assert (tmp_path / "out" / "table.md").read_text().count(line) == 1
    results = [json.loads(path.read_text()) for path in sorted(tmp_path.rglob("results.json"))]
    assert [result["forced"] == shared["forced"].get(result["arm"], []) for result in results] == [True] * 4
    assert clinical_page(clinical_facts(results)).count(line) == 1


def test_folder__never_mixes_settings_cohorts_or_weights(cohort: Cohort, tmp_path: Path) -> None:
    finished_cell(tmp_path)
    claim(tmp_path, cohort, SETTINGS, {"scratch": None})
    claim(tmp_path, cohort, replace(SETTINGS, device="cuda", figures=3), {"ours": pretrained()})  # changes no score
    known = claim(tmp_path, cohort, SETTINGS, {"scratch": None})
    assert known["weights"] == {"scratch": None, "ours": "hash5"}
    with pytest.raises(RequestError, match=r"steps 2 \(now 7\).*choose another folder"):
        claim(tmp_path, cohort, replace(SETTINGS, steps=7), {"scratch": None})
    with pytest.raises(RequestError, match="other weights for arm ours"):
        claim(tmp_path, cohort, SETTINGS, {"ours": pretrained(seed=6)})
    with pytest.raises(RequestError, match="another cohort or split"):
        claim(tmp_path, Cohort("x", cohort.cases[:2]), SETTINGS, {"scratch": None})
    key = tmp_path / "private" / "cohort.key"
    assert key.stat().st_mode & 0o777 == 0o600 and key.parent.stat().st_mode & 0o777 == 0o700 and len(key.read_bytes()) == 32
    key.unlink()
    for _ in range(2):  # no new key is made for digests that it does not fit
        with pytest.raises(RequestError, match="cells of an earlier medssl"):
            claim(tmp_path, cohort, SETTINGS, {"scratch": None})


def test_folder__begun_before_a_setting_existed_is_taken_to_have_had_its_default(cohort: Cohort, tmp_path: Path) -> None:
    finished_cell(tmp_path)
    claim(tmp_path, cohort, SETTINGS, {"scratch": None})
    path = tmp_path / "label_curve.json"
    content = json.loads(path.read_text())
    del content["settings"]["domain_args"]
    path.write_text(json.dumps(content))
    claim(tmp_path, cohort, SETTINGS, {"scratch": None})
    with pytest.raises(RequestError, match=r"domain_args \{\} \(now \{'n4': True\}\)"):
        claim(tmp_path, cohort, replace(SETTINGS, domain_args={"n4": True}), {"scratch": None})


def test_folder__of_scratch_cells_alone_takes_another_way_of_transfer(cohort: Cohort, tmp_path: Path) -> None:
    finished_cell(tmp_path)
    claim(tmp_path, cohort, replace(SETTINGS, transfer="encoder_decoder"), {"scratch": None})
    claim(tmp_path, cohort, replace(SETTINGS, transfer="encoder"), {"scratch": None, "ours": pretrained()})
    with pytest.raises(RequestError, match=r"transfer encoder \(now encoder_decoder\)"):
        claim(tmp_path, cohort, replace(SETTINGS, transfer="encoder_decoder"), {"scratch": None})


def test_weights_that_labels_chose__are_refused(cohort: Cohort, tmp_path: Path) -> None:
    weights = pretrained()
    chosen = {"metric": "probe/x/linear_r2", "value": 0.5, "labels": 7}
    best = replace(weights, manifest={**weights.manifest, "chosen_by": chosen})
    with pytest.raises(RequestError, match="arm ours has weights that 7 labelled items chose"):
        label_curve(cohort, SETTINGS, tmp_path / "new", arms={"scratch": None, "ours": best}, counts=[1], seeds=[0])
    assert not (tmp_path / "new").exists()


def test_plan__pairs_early_seeds_and_refuses_nonsense(cohort: Cohort, tmp_path: Path) -> None:
    cells = plan({"a": None, "b": None}, [5, 20], [0, 1])
    assert [cell.name for cell in cells[:4]] == ["a_n5_s0", "b_n5_s0", "a_n20_s0", "b_n20_s0"]
    with pytest.raises(RequestError, match="seeds: none; give at least one"):
        plan({"a": None}, [5], [])
    with pytest.raises(RequestError, match="counts: 5, 5; give at least one, none twice"):
        plan({"a": None}, [5, 5], [0])
    with pytest.raises(RequestError, match='arm "a/b"; letters'):
        plan({"a/b": None}, [5], [0])
    with pytest.raises(RequestError, match="9 labelled training cases asked for, it has 3"):
        label_curve(cohort, SETTINGS, tmp_path, arms={"scratch": None}, counts=[9], seeds=[0])
    assert list(tmp_path.iterdir()) == []


def test_too_few_labels_for_a_structure__are_refused_before_the_first_cell(tmp_path: Path) -> None:
    folder = write_cohort(tmp_path / "cohort")
    label = tiny_volume(2)[1]  # of the case of rank 1
    write_nifti(folder / "labels" / "v2.nii.gz", np.where(label > 1, 0, label).astype(np.uint8))
    cohort = Cohort.load(folder)
    with pytest.raises(RequestError, match="class structure_2 has no voxel in the 1 training cases; give more labels, correct"):
        label_curve(cohort, SETTINGS, tmp_path / "out", arms={"scratch": None}, counts=[2, 1], seeds=[0])
    assert not (tmp_path / "out").exists()
    with pytest.raises(RequestError, match="in the 1 training cases of a fold; give more labels, ask for fewer folds"):
        label_curve(cohort, SETTINGS, tmp_path / "out", arms={"scratch": None}, counts=[1], seeds=[0, 1, 2, 3], folds=3)
    assert not (tmp_path / "out").exists()


def test_a_table_without_patients__has_the_same_intervals_and_says_by_image(cohort: Cohort, tmp_path: Path) -> None:
    said = {}
    for name, known in (("none", False), ("column", True)):
        cases = tuple(replace(case, patient_known=known) for case in cohort.cases)
        assert known or cases == cohort.cases
        summary = label_curve(
            replace(cohort, cases=cases), SETTINGS, tmp_path / name, arms={"scratch": None}, counts=[2], seeds=[0]
        )
        said[name] = summary["rows"][0]
    assert (said["none"]["by"], said["none"]["n_patients"]) == ("by image", None)
    assert (said["column"]["by"], said["column"]["n_patients"]) == ("by patient", 2)
    assert [said["none"][key] for key in ("dice", "low", "high")] == [said["column"][key] for key in ("dice", "low", "high")]


def test_labels__that_were_unknown_are_said_in_table_and_command(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Cell] = []

    def run(*args: Any, **kw: Any) -> FinetuneResult:
        made: FinetuneResult = fake_finetune(calls)(*args, **kw)
        rows = {
            "case0001": {"counts": {"rater_ties": 3}, "flags": [], "labelled": [1]},
            "case0002": {"counts": {"rater_ties": 2}, "flags": ["frame_unverified"], "labelled": None},
        }
        (args[2] / "labels.json").write_text(json.dumps({"cases": rows}))
        return made

    monkeypatch.setattr(module, "finetune", run)
    summary = label_curve(cohort, SETTINGS, tmp_path, arms={"scratch": None}, counts=[1, 2], seeds=[0])
    partial, ties, frame = summary["label_facts"]
    assert partial.startswith("1 case has not every structure labelled") and frame.startswith("1 case has a label map whose frame")
    assert ties.startswith("2 cases have 5 voxels where no value leads")  # of all cells, each case once
    for text in (summary_table(summary), (tmp_path / "table.md").read_text()):
        assert all(f"labels: {sentence}" in text for sentence in summary["label_facts"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"class_weights": (1.0, 2.0)}, "class_weights: 2 numbers for 3 classes"),
        ({"normalize": {"kind": "nonsense"}}, "normalize: found .*accepted is zscore"),
        ({"augment": {"nonsense": 1}}, "augment: unknown key nonsense; accepted are"),
        ({"device": "nonsense"}, 'device "nonsense" is none of PyTorch; .*leave it out'),
        ({"device": "cuda:99"}, 'device "cuda:99" is not on this machine; .*leave it out'),
        ({"patience": 1, "val_every": 1}, "patience needs labelled validation cases"),
        ({"network_args": {"dropout_prop": 0.1}}, r"settings\.network_args\.dropout_prop: unknown key.*dropout_prob"),
        ({"network_args": {"out_channels": 9}}, r"settings\.network_args\.out_channels: unknown key"),
        ({"dicom_seg": True}, "DICOM"),
        ({"domain": "xray"}, "crop"),
        ({"encoder": None}, "no encoder is named"),
        ({}, "no labelled test cases"),
    ],
)
def test_bad_input__is_refused_before_anything_is_written(
    cohort: Cohort, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    lacking = {"patience": "val"} if "patience" in change else {} if change else {"": "test"}
    kept = tuple(case for case in cohort.cases if case.split not in lacking.values())
    out = tmp_path / "out"
    with pytest.raises(RequestError, match=said):
        label_curve(replace(cohort, cases=kept), replace(SETTINGS, **change), out, arms={"scratch": None}, counts=[2], seeds=[0])
    assert not out.exists()


def test_faulty_test_case__is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = write_cohort(tmp_path / "cohort")
    write_nifti(folder / "labels" / "v5.nii.gz", np.zeros((4, 4, 4), np.uint8))
    with pytest.raises(ImageError):
        label_curve(Cohort.load(folder), SETTINGS, tmp_path / "out", arms={"scratch": None}, counts=[2], seeds=[0])
    assert not (tmp_path / "out").exists()
