"""Tiers on toy features: one part that cannot run costs no other, and numbers say what they are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from medssl import suite
from medssl.errors import ImageError, LeakageError, RequestError, TrainingStopped
from medssl.evaluation import self_configuring
from medssl.evaluation.calibration import expected_calibration_error, threshold_at_specificity
from medssl.evaluation.cohort import Case, Cohort
from medssl.evaluation.label_curve import Cell, plan
from medssl.evaluation.suite_rows import BASELINE, CONTROLS, WEIGHTS, skip, tables
from medssl.evaluation.survival import SurvivalCases
from medssl.evaluation.target_cases import Cases
from medssl.finetune_cells import fill
from medssl.recipe import Component, CurveSection, SourceSection, SuiteRecipe, SuiteTask
from medssl.recipe_checks import suite_faults
from medssl.suite_tiers import Bench, Found, curve_rows, curves, groups, robustness
from medssl.suite_tiers.probes import probe_tables
from medssl.types import Stack
from tests.evaluation.tiny_cohort import TINY_ENCODER, write_cohort


def toy_bench(
    patients: Sequence[str],
    split: Sequence[str],
    targets: Sequence[float],
    *,
    sex: Sequence[str] = (),
    task: str = "classification",
    **settings: Any,
) -> Bench:
    """A bench of one task "t" whose features are the target plus noise."""
    n = len(patients)
    series = [f"s{k:03d}" for k in range(n)]
    sexes = sex or ["F"] * n
    rows = [
        SimpleNamespace(
            series_id=series[k], patient_id=patients[k], study_id=series[k], sex=sexes[k], site=None, vendor=None, quality_flags=()
        )
        for k in range(n)
    ]
    given = {"draws": 20, "k": [1], "shots": [1], "shot_seeds": 2, "left_out": [], "subgroups": [], "leakage": [], **settings}
    recipe = SuiteRecipe(
        source=SourceSection(index="x", domain="mri", views={}),
        table="none.csv",
        tasks={"t": {"column": "t", "task": task}},
        **given,
    )
    classes = [f"class_{k + 1}" for k in range(len(set(targets)))] if task == "classification" else []
    cases = Cases(np.arange(n), np.array(targets, dtype=float), list(patients), np.array(split), classes)
    manifest = {"weights_hash": "w", "encoder": {"name": "toy"}}
    shelf: Any = SimpleNamespace(rows=rows)
    bench = Bench(recipe, Path("w"), manifest, recipe.source, shelf, {"t": cases}, series, {"t": (list("ab"), classes)})
    rng = np.random.default_rng(0)
    noise = {model: rng.normal(size=(n, 4)) for model in (WEIGHTS, *CONTROLS)}
    vars(bench)["features"] = {m: x + (np.array(targets)[:, None] if m == WEIGHTS else 0) for m, x in noise.items()}
    return bench


def thirds(n: int = 36, **settings: Any) -> Bench:
    """Two classes, one patient per case, a third of the cases in each split."""
    return toy_bench(
        [f"p{k}" for k in range(n)], [("train", "val", "test")[k // 2 % 3] for k in range(n)], [k % 2 for k in range(n)], **settings
    )


def test_one_test_case__leaves_no_r2_and_does_not_end_the_suite(tmp_path: Path) -> None:
    bench = toy_bench(
        [f"p{k}" for k in range(9)], ["train"] * 6 + ["val"] * 2 + ["test"], np.arange(9.0).tolist(), task="regression"
    )
    found = suite.run_tier("regression", bench, tmp_path)
    assert [row["value"] for row in found["p_values"]] == [None] * 3
    result = suite._verdicts(found["p_values"])
    assert {row["verdict"] for row in result} == {"no difference shown"}


def test_one_unseen_patient__costs_what_needs_two_and_nothing_else(tmp_path: Path) -> None:
    patients = [f"p{k}" for k in range(8)] + ["q"] * 6
    bench = toy_bench(patients, ["train"] * 8 + ["val"] * 2 + ["test"] * 4, [0, 1] * 7, leakage=["sex"])
    frozen = suite.run_tier("frozen", bench, tmp_path)
    assert "1 patient(s)" in {s["what"]: s["why"] for s in frozen["skipped"]}["neighbours"]
    assert {row["setting"] for row in frozen["rows"]} == {"logistic", "1 per class"}
    (entry,) = [s for s in suite.run_tier("retrieval", bench, tmp_path)["skipped"] if s["what"] == "retrieval"]
    assert "1 patient(s)" in entry["why"]
    assert "0 value of sex has 5 or more patients" in suite.run_tier("fairness", bench, tmp_path)["skipped"][0]["why"]


def test_one_training_patient_without_val__skips_the_probe(tmp_path: Path) -> None:
    bench = toy_bench(["p"] * 6 + [f"q{k}" for k in range(6)], ["train"] * 6 + ["test"] * 6, [0, 1] * 6)
    frozen = suite.run_tier("frozen", bench, tmp_path)
    assert "logistic probe" in {s["what"] for s in frozen["skipped"]} and {r["setting"] for r in frozen["rows"]} == {
        "1 nearest",
        "1 per class",
    }


def test_leakage__counts_patients_not_series() -> None:
    patients, sexes = [f"p{k // 5}" for k in range(50)], ["FM"[k // 5 % 2] for k in range(50)]
    enough = toy_bench(patients, ["test"] * 50, [0, 1] * 25, sex=sexes)
    assert {row["model"] for row in groups._leakage(enough, "sex").rows} == {WEIGHTS, *CONTROLS}
    few = toy_bench(["f"] * 10 + ["m"] * 10, ["test"] * 20, [0, 1] * 10, sex=["F"] * 10 + ["M"] * 10)
    found = groups._leakage(few, "sex")
    assert not found.rows and "0 value of sex has 5 or more patients" in found.skipped[0]["why"]


@pytest.mark.parametrize(
    ("error", "finished"),
    [(LeakageError("a folder that is not mounted"), False), (ImageError("not_hu", "no HU"), False), (TrainingStopped("NaN"), True)],
)
def test_curve_that_fails__is_skipped_and_tried_again_where_that_can_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, finished: bool
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(curves, "run_curve", fails)
    bench = thirds(classification={"counts": [4], "seeds": [0]})
    first = suite.run_tier("classification", bench, tmp_path)
    assert str(error) in first["skipped"][0]["why"] and first["finished"] is finished
    assert {row["model"] for row in first["rows"]} == set(CONTROLS)
    monkeypatch.setattr(suite, "RUN", {"classification": lambda *_: Found(skipped=[{"task": "", "what": "again", "why": ""}])})
    assert (suite.run_tier("classification", bench, tmp_path)["skipped"][0]["what"] == "again") is not finished


def test_stopped_curve__keeps_its_finished_cells_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stops(recipe: Any, *_: Any, **__: Any) -> None:
        """As `finetune_cells.fill` stops: the first of four cells is done."""
        out = Path(recipe.out)
        cells = plan({"pretrained": None, "scratch": None}, [4], [0, 1])

        def compute(folder: Path, cell: Cell) -> dict[str, Any]:
            if cell.arm == "scratch":
                raise TrainingStopped("the loss is nan")
            content = {"arm": cell.arm, "labels": 4, "seed": 0, "cases": [{"patient_id": "a"}, {"patient_id": "b"}]}
            folder.mkdir(parents=True)
            (folder / "results.json").write_text(json.dumps(content))
            return content

        def summarise(results: Any, last: bool) -> dict[str, Any]:
            row = {"labels": 4, "arm": "pretrained", "seeds": [0], "n_test": 2, "metric": "auroc", "value": 0.7}
            row |= {"low": 0.6 if last else None, "high": 0.8 if last else None, "seed_means": [0.7], "scores": {}}
            return {"metric": "auroc", "rows": [row for _ in results], "differences": []}

        fill(out, cells, {}, compute, summarise, None)

    monkeypatch.setattr(curves, "run_curve", stops)
    found = suite.run_tier("classification", thirds(classification={"counts": [4], "seeds": [0, 1]}), tmp_path)
    (row,) = [row for row in found["rows"] if row["model"] == WEIGHTS]
    assert (row["value"], row["low"], row["patients"], row["seeds"]) == (0.7, 0.6, 2, 1)
    assert found["finished"] and "3 of 4 cells" in found["skipped"][0]["what"] and "loss is nan" in found["skipped"][0]["why"]


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_gap__is_signed_so_that_its_interval_can_hold_zero(task: str) -> None:
    """Twins of either sex with the same predictions, but for one."""
    n, rng = 240, np.random.default_rng(1)
    targets = np.repeat(rng.permutation(n // 2) % 2, 2).astype(float)
    guess = np.repeat(rng.uniform(size=n // 2), 2)
    guess[1] += 0.3
    table = np.stack([targets, guess] if task == "regression" else [targets, 1 - guess, guess], axis=1)
    sexes = ["FM"[k % 2] for k in range(n)]
    bench = toy_bench([f"p{k}" for k in range(n)], ["test"] * n, targets.tolist(), task=task, sex=sexes, draws=100)
    rows = groups._by_group(bench, "t", "sex", {WEIGHTS: table}).rows
    (gap,) = [row for row in rows if row["metric"] in ("gap of auroc", "gap of mae")]
    assert gap["low"] < 0 < gap["value"] < gap["high"] and "on these same data" in gap["subgroup"]


def test_equalised_odds__take_the_threshold_of_validation_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Men score higher than women by as much as the disease does: at a threshold for well men the ill women are missed."""
    n = 480
    targets, sexes = [float(k // 2 % 2) for k in range(n)], ["FM"[k % 2] for k in range(n)]
    split = [("train", "val", "test")[k // 4 % 3] for k in range(n)]
    bench = toy_bench([f"p{k}" for k in range(n)], split, targets, sex=sexes, subgroups=["sex"], draws=50)
    rng = np.random.default_rng(3)
    place = np.array(targets)[:, None] + np.array([sex == "M" for sex in sexes])[:, None]
    bench.features[WEIGHTS] = np.concatenate([place + 0.1 * rng.normal(size=(n, 1)), rng.normal(size=(n, 3))], axis=1)
    seen = []

    def threshold(scores: np.ndarray, *rest: Any) -> float:
        seen.append(len(scores))
        return threshold_at_specificity(scores, *rest)

    monkeypatch.setattr(groups, "threshold_at_specificity", threshold)
    found = suite.run_tier("fairness", bench, tmp_path)
    odds = {row["model"]: row for row in found["rows"] if row["metric"] == "equalised_odds_difference"}
    assert set(odds) == {WEIGHTS, *CONTROLS} and odds[WEIGHTS]["low"] > 0.7
    assert odds[WEIGHTS]["value"] == pytest.approx(
        0.9, abs=0.05
    )  # 5 % of the well, a tenth of the well men, a tenth of the ill women
    assert odds[WEIGHTS]["subgroup"].startswith("true_positive_rate, M against F") and odds["raw_pixels"]["value"] < 0.5
    assert seen == [160] * 4  # the validation cases, of every model
    by = {(row["metric"], row["subgroup"]): row["value"] for row in found["rows"] if row["model"] == WEIGHTS}
    better, worse = ("F", "M") if by["ece", "F"] < by["ece", "M"] else ("M", "F")
    gap = by["gap of ece", f"{better} against {worse}, {groups.CHOSEN}"]
    assert gap == pytest.approx(by["ece", worse] - by["ece", better])
    missed, caught = by["sensitivity at 95 % specificity", "F"], by["sensitivity at 95 % specificity", "M"]
    assert missed == pytest.approx(0.1, abs=0.05) and caught == pytest.approx(1.0)
    table = probe_tables(bench, "t")[WEIGHTS]
    women = np.array(sexes)[bench.tasks["t"].where("test")] == "F"
    assert by["ece", "F"] == pytest.approx(expected_calibration_error(table[women]))


@pytest.mark.parametrize("what", ["no val", "numbers"])
def test_equalised_odds__say_what_they_lack(tmp_path: Path, what: str) -> None:
    bench = (
        thirds(subgroups=["sex"])
        if what == "no val"
        else toy_bench(
            list("abcdefghi"), ["train", "val", "test"] * 3, np.arange(9.0).tolist(), task="regression", subgroups=["sex"]
        )
    )
    if what == "no val":
        bench.tasks["t"].split[bench.tasks["t"].split == "val"] = "none"
    why = {entry["what"]: entry["why"] for entry in suite.run_tier("fairness", bench, tmp_path)["skipped"]}
    assert (
        why["equalised odds, sensitivity at 95 % specificity"]
        == {
            "no val": "no validation case of the first class to fit a threshold on",
            "numbers": "it is of two classes, and these are numbers",
        }[what]
    )


def test_controls_of_curves__say_what_they_lack() -> None:
    bench = thirds()
    bench.tasks["t"].split[bench.tasks["t"].split == "val"] = "none"
    found = curves._control_curves(bench, "t", [4], [0])
    assert not found.rows and "no labelled case is marked val" in found.skipped[0]["why"]


def test_controls_of_curves__name_the_seeds_without_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = thirds()
    train = bench.tasks["t"].where("train")
    monkeypatch.setattr(curves, "few_label_order", lambda cases, seed: train[::2] if seed else train)
    found = curves._control_curves(bench, "t", [4], [0, 1])
    assert {row["seeds"] for row in found.rows} == {1} and "1 of 2 seeds lack a class" in found.skipped[0]["why"]


def test_relative_robustness__is_no_main_row(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = thirds(corruptions={"kinds": ["noise"], "levels": [1]})
    monkeypatch.setattr(Bench, "look", lambda self, places, change=None: {m: x[list(places)] for m, x in self.features.items()})
    rows = robustness._corrupted(bench, "t").rows
    assert {row["metric"] for row in rows} >= {"relative_robustness"} and not any(row["main"] for row in rows)


@pytest.mark.parametrize("kind", ["noise", "stain"])
def test_corruptions__reach_stacks(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    bench = thirds(corruptions={"kinds": [kind], "levels": [1]})
    section = {"views": {"normalize": "none"}, "domain": Component(name="wsi")}
    bench.section = bench.section.model_copy(update=section)
    bench.encoder = bench.device = None  # type: ignore[assignment]
    seen: list[Any] = []

    def batches(wanted: list[str], *_: Any) -> Any:
        n = len(wanted)
        yield Stack(torch.randn(n, 3, 1, 8, 8), torch.ones(n, 3, dtype=torch.bool), torch.zeros(n, 3)), list(range(n))

    def embedded(_: Any, found: Any) -> tuple[np.ndarray, list[Any]]:
        ((stack, ids),) = list(found)
        seen.append(stack)
        return stack.planes.flatten(1).numpy()[:, :4], ids

    monkeypatch.setattr("medssl.suite_tiers.bench.data_sources.evaluation_source", lambda *given: given[-1])
    monkeypatch.setattr("medssl.suite_tiers.bench.data_sources.images_and_ids", batches)
    monkeypatch.setattr("medssl.suite_tiers.bench.embed", embedded)
    monkeypatch.setattr(
        "medssl.suite_tiers.bench.control_features",
        lambda _, found, **__: dict.fromkeys(CONTROLS, embedded(None, found())[0]),
    )
    found = robustness._corrupted(bench, "t")
    if kind == "noise":
        assert {row["setting"] for row in found.rows} == {"noise, level 1", "all corruptions"}
        assert len(seen) == 2 and all(isinstance(stack, Stack) for stack in seen)
    else:
        assert found.skipped[0]["what"] == "corruption stain" and "stacks and clips are not stained" in found.skipped[0]["why"]


@pytest.mark.parametrize(("domain", "said"), [("mri", "images of domain mri are not stained"), ("wsi", "are grey")])
def test_stain__is_left_out_and_said_so_where_nothing_is_stained(monkeypatch: pytest.MonkeyPatch, domain: str, said: str) -> None:
    bench = thirds(corruptions={"kinds": ["noise", "stain"], "levels": [1]})
    section = {"views": {"normalize": "none"}, "domain": Component(name=domain)}
    bench.section = bench.section.model_copy(update=section)

    def look(self: Bench, places: Sequence[int], change: Any = None) -> dict[str, np.ndarray]:
        change(torch.randn(len(places), 1, 8, 8).expand(-1, 3, -1, -1), places)
        return {m: x[list(places)] for m, x in self.features.items()}

    monkeypatch.setattr(Bench, "look", look)
    found = robustness._corrupted(bench, "t")
    assert {row["setting"] for row in found.rows} == {"noise, level 1", "all corruptions"}
    (entry,) = found.skipped
    assert entry["what"] == "corruption stain" and said in entry["why"]


def test_controls__stand_in_the_tables_of_segmentation_and_detection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The curve of the networks is given; the controls are computed from the cohort."""
    folder = write_cohort(tmp_path / "cohort", train=3, val=1, test=2)
    row = {"labels": 2, "seeds": [0], "n_test": 2, "dice": 0.9, "low": 0.8, "high": 1.0}
    given = {"rows": [{**row, "arm": arm} for arm in ("pretrained", "scratch")]}
    monkeypatch.setattr(curves, "run_curve", lambda *_, **__: given)
    written = {
        "segmentation": f"task: segmentation\nnetwork: segresnet\nsettings: {{crop: [16, 16, 16]}}\ncohort: {{path: {folder}}}\n",
        "detection": f"task: detection\nviews: {{size: [16, 16, 16]}}\ncohort: {{path: {folder}}}\n",
    }
    sections = {}
    for name, text in written.items():
        (tmp_path / f"{name}.yaml").write_text("kind: finetune\n" + text)
        sections[name] = {"recipe": str(tmp_path / f"{name}.yaml"), "counts": [2], "seeds": [0]}
    bench = thirds(**sections)
    bench.manifest |= {"encoder": TINY_ENCODER, "intensity": {"normalize": "zscore"}}  # type: ignore[operator]
    for name in sections:
        found = suite.run_tier(name, bench, tmp_path)
        rows = {row["model"]: row for row in found["rows"] if row["main"]}
        assert set(rows) == {WEIGHTS, "scratch", "raw_pixels", "intensity_statistics"}, found["skipped"]
        more = {row["setting"] for row in found["rows"] if row["model"] == "raw_pixels"}
        assert {"segmentation": "2 labels, structure_1", "detection": "2 labels, 1 false positives"}[name] in more
        assert rows["raw_pixels"]["value"] is not None and rows["raw_pixels"]["main"] and rows["raw_pixels"]["n"] == 2
        assert {entry["what"] for entry in found["skipped"]} == {
            "random_init",
            *(["self-configuring"] if name == "segmentation" else []),
        }
        models = next(tier for tier in tables(found["rows"], {}) if tier["tier"] == name)["tables"][0]["lines"]
        assert models and {"raw_pixels", "intensity_statistics"} <= {model for line in models for model in line["cells"]}


def drawn(arm: str, seed: int, *, cases: int = 120, labels: int = 4) -> dict[str, Any]:
    """The result of a cell of segmentation: women have Dice 0.8, men 0.6, the spleen is nowhere; seeds are 0.1 apart."""
    found = []
    for k in range(cases):
        value = (0.8, 0.6)[k % 2] + 0.1 * seed
        case = {
            "id": f"case{k:04d}",
            "patient": f"p{k}",
            "dice": {"liver": value, "spleen": None},
            "hd95_mm": {"liver": 4.0 + seed, "spleen": None},
        }
        found.append({**case, "facts": {"sex": "FM"[k % 2], "site": ("Elsewhere", "Nowhere")[k % 2]}})
    return {"arm": arm, "labels": labels, "seed": seed, "fold": None, "structures": ["liver", "spleen"], "cases": found}


def test_segmentation__has_rows_of_structures_distances_and_groups() -> None:
    bench = thirds(subgroups=["sex", "site", "vendor"])
    cells = [drawn(arm, seed) for arm in ("pretrained", "scratch") for seed in (0, 1)]
    cells += [drawn("pretrained", 0, labels=2)]
    found = curve_rows.further(bench, "segmentation", "organs", cells)
    at = {(row["setting"], row["metric"]): row for row in found.rows if row["model"] == WEIGHTS and row["tier"] == "segmentation"}
    assert set(at) == {(f"{n} labels, liver", metric) for n in (2, 4) for metric in ("dice", "hd95_mm")}
    assert at["4 labels, liver", "hd95_mm"]["value"] == pytest.approx(4.5) and at["4 labels, liver", "dice"][
        "value"
    ] == pytest.approx(0.75)
    assert all(
        row["seeds"] == 2 and row["patients"] == 120 and row["low"] is not None for key, row in at.items() if key[0][0] == "4"
    )
    assert not any(row["main"] for row in found.rows)
    fair = {
        (row["setting"], row["metric"], row["subgroup"]): row
        for row in found.rows
        if row["tier"] == "fairness" and row["model"] == "scratch"
    }
    assert fair["4 labels, by sex", "dice", "F"]["value"] == pytest.approx(0.85)
    assert fair["4 labels, by sex", "gap of dice", f"F against M, {groups.CHOSEN}"]["value"] == pytest.approx(0.2)
    assert {key[2] for key in fair if key[1] == "dice" and "site" in key[0]} == {"group_1", "group_2"}
    assert found.private["groups"]["site"] == {"group_1": "Elsewhere", "group_2": "Nowhere"}
    assert [entry["what"] for entry in found.skipped] == ["Dice by vendor"]


def test_detection__has_sensitivity_at_false_positives() -> None:
    """Each seed finds the box of every image; the second also one wrong box in each, surer than the right one."""
    cells = []
    for seed in (0, 1):
        cases = []
        for k in range(8):
            found = [[[0.0, 0.0, 4.0, 4.0], 0, 0.5], [[10.0, 10.0, 14.0, 14.0], 0, 0.9]][: 1 + seed]
            real = [[[0.0, 0.0, 4.0, 4.0], 0, False, False]]
            cases.append({"case": f"case{k:04d}", "patient_id": f"p{k}", "real": real, "found": found})
        cells.append(
            {
                "arm": "pretrained",
                "labels": 4,
                "seed": seed,
                "fold": None,
                "task": "detection",
                "classes": ["lesion"],
                "rows": [],
                "cases": cases,
            }
        )
    rows = curve_rows.further(thirds(), "detection", "lesions", cells).rows
    at = {(row["setting"], row["metric"]): row["value"] for row in rows}
    assert at["4 labels, 0.125 false positives", "sensitivity"] == pytest.approx(0.5)
    assert at["4 labels, 1 false positives", "sensitivity"] == at["4 labels, 8 false positives", "sensitivity"] == 1
    assert at["4 labels", "froc"] == pytest.approx((3 * 0.5 + 4) / 7) and {row["seeds"] for row in rows} == {2}


def test_frozen_encoder__is_a_curve_beside_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_cohort(tmp_path / "cohort", train=3, val=1, test=2)
    (tmp_path / "organs.yaml").write_text(
        f"kind: finetune\ntask: segmentation\nnetwork: segresnet\nsettings: {{crop: [16, 16, 16]}}\ncohort: {{path: {folder}}}\n"
    )
    asked = []

    def run(recipe: Any, _weights: Any, *, twin: bool, **_: Any) -> dict[str, Any]:
        asked.append((Path(recipe.out).name, recipe.settings.get("encoder_lr_scale"), twin))
        row = {"labels": 2, "arm": "pretrained", "seeds": [0], "n_test": 2, "dice": 0.9, "low": 0.8, "high": 1.0}
        return {"rows": [row]}

    monkeypatch.setattr(curves, "run_curve", run)
    section = {"recipe": str(tmp_path / "organs.yaml"), "counts": [2], "seeds": [0]}
    bench = thirds(segmentation=section)
    bench.section = bench.section.model_copy(update={"domain": Component(name="ct")})  # the cohort has its own
    bench.manifest |= {"encoder": TINY_ENCODER, "intensity": {"normalize": "zscore"}}  # type: ignore[operator]
    rows = [row for row in suite.run_tier("segmentation", bench, tmp_path)["rows"] if row["model"] == WEIGHTS]
    assert asked == [("curve", None, True), ("curve_frozen", 0.0, False)] and {row["modality"] for row in rows} == {"mri"}
    assert [(row["setting"], row["main"]) for row in rows] == [("2 labels", True), ("2 labels, frozen encoder", False)]
    asked.clear()
    curves.segmentation(thirds(segmentation={**section, "frozen": False}), tmp_path)
    assert asked == [("curve", None, True)]


def with_organs(folder: Path, *, crop: str = "[16, 16, 16]", domain: str = "mri", **section: Any) -> Bench:
    """A bench whose segmentation is a cohort of three training cases."""
    cohort = write_cohort(folder / "cohort", train=3, val=1, test=2)
    (folder / "organs.yaml").write_text(
        "kind: finetune\ntask: segmentation\nnetwork: segresnet\n"
        f"settings: {{crop: {crop}, steps: 2, warmup_steps: 0, figures: 0}}\ncohort: {{path: {cohort}, domain: {domain}}}\n"
    )
    given = {
        "recipe": str(folder / "organs.yaml"),
        "counts": [2, 3],
        "seeds": [0],
        "frozen": False,
        "self_configuring": True,
        **section,
    }
    bench = thirds(segmentation=given)
    bench.manifest |= {"encoder": TINY_ENCODER, "intensity": {"normalize": "zscore"}}  # type: ignore[operator]
    return bench


def given_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    """The curves of weights and twin are given, that of the baseline is computed."""
    real, row = curves.run_curve, {"seeds": [0], "n_test": 2, "dice": 0.9, "low": 0.8, "high": 1.0}
    rows = [{**row, "arm": arm, "labels": labels} for labels in (2, 3) for arm in ("pretrained", "scratch")]

    def run(*args: Any, **kw: Any) -> dict[str, Any]:
        return real(*args, **kw) if kw.get("self_configuring") else {"rows": rows}

    monkeypatch.setattr(curves, "run_curve", run)
    monkeypatch.setattr(self_configuring, "FIRST_WIDTH", 8)  # quicker


def test_self_configuring__stands_beside_weights_twin_and_controls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = with_organs(tmp_path)
    given_curve(monkeypatch)
    out = tmp_path / "suite"
    tier = suite.run_tier("segmentation", bench, out)
    assert {entry["what"] for entry in tier["skipped"]} == {"random_init"} | {f"Dice by {c}" for c in bench.recipe.subgroups}
    rows = [row for row in tier["rows"] if row["model"] == BASELINE]
    assert {row["setting"] for row in rows if row["metric"] == "dice"} >= {"2 labels", "3 labels", "3 labels, structure_1"}
    assert all(row["n"] == 2 and row["modality"] == "mri" and not row["main"] for row in rows)
    assert {(plan["labels"], plan["cells"], plan["settings"]["network"]) for plan in tier["plans"]} == {
        (2, 1, "resenc_unet"),
        (3, 1, "resenc_unet"),
    }
    cell = json.loads(
        (out / "segmentation" / "curve_self_configuring" / "cells" / f"{BASELINE}_n2_s0" / "results.json").read_text()
    )
    assert (cell["settings"]["steps"], cell["labels"], cell["seed"], cell["loaded"]) == (2, 2, 0, None)
    shared = {"forced": [], "encoder": "toy", "leakage_check": "none", "tasks": {}, "seed": 0, "weights": "w"}
    result = suite.write_results(out, {"segmentation": tier}, shared)
    assert [plan["tier"] for plan in result["plans"]] == ["segmentation"] * 2
    assert BASELINE not in {row["model"] for row in result["aggregate"]}, "it moves no mean over models"
    table = (out / "table.md").read_text()
    assert "| score | weights | scratch | self-configuring | random_init |" in table
    sentence = "The self-configuring network chose from its 3 training cases: voxels of 1 x 1 x 2 mm, crop 16 x 16 x 16"
    assert f"- organs, 3 labels: {sentence}" in table and sentence in (out / "page.html").read_text()
    suite.draw_page(out, tmp_path / "again.html")
    assert sentence in (tmp_path / "again.html").read_text()


def test_what_several_curves_lack__is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lacks = [skip("organs", "Dice by sex", "sex is not known"), skip("organs", "Dice by site", "site is not known")]
    monkeypatch.setitem(suite.RUN, "segmentation", lambda bench, out: Found(skipped=[*lacks, *lacks, lacks[0]]))
    assert suite.run_tier("segmentation", thirds(), tmp_path)["skipped"] == lacks


def test_plans__are_counted_where_folds_differ() -> None:
    plan_ = {"tier": "segmentation", "task": "organs", "labels": 2, "cells": 2, "sentence": "One."}
    found = tables([], {}, [plan_, {**plan_, "cells": 1, "sentence": "Two."}, {**plan_, "labels": 3, "sentence": "Three."}])
    said = next(tier["plans"] for tier in found if tier["tier"] == "segmentation")
    assert said == [
        "organs, 2 labels, 2 of 3 trainings: One.",
        "organs, 2 labels, 1 of 3 trainings: Two.",
        "organs, 3 labels: Three.",
    ]


def test_self_configuring__says_how_it_is_switched_on_and_where_it_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def run(*_: Any, **kw: Any) -> dict[str, Any]:
        asked.append(bool(kw.get("self_configuring")))
        return {"rows": []}

    monkeypatch.setattr(curves, "run_curve", run)
    monkeypatch.setattr(curves, "_drawn_by_pixels", lambda *_: ({"rows": []}, []))
    bench = with_organs(tmp_path, self_configuring=False)
    why = {entry["what"]: entry["why"] for entry in suite.run_tier("segmentation", bench, tmp_path / "off")["skipped"]}
    assert "segmentation: {self_configuring: true} asks for it" in why[BASELINE] and asked == [False]
    pictures = with_organs(tmp_path, crop="[16, 16]", domain="xray")
    tier = suite.run_tier("segmentation", pictures, tmp_path / "pictures")
    why = {entry["what"]: entry["why"] for entry in tier["skipped"]}
    assert "crop [16, 16] is of pictures" in why[BASELINE] and tier["finished"] and asked == [False, False]


def with_survival(n: int = 90, events: float = 0.7, **settings: Any) -> Bench:
    """A bench whose weights see the hazard, of two sites; every patient has a time."""
    bench = thirds(n, **settings)
    rng = np.random.default_rng(0)
    hazard = rng.normal(size=n)
    times = rng.exponential(size=n) * np.exp(-1.5 * hazard)
    cases = Cases(np.arange(n), times, [f"p{k}" for k in range(n)], bench.tasks["t"].split)
    bench.recipe.tasks["death"], bench.names["death"] = SuiteTask(column="months", task="survival", event="died"), ([], [])
    bench.survival["death"] = SurvivalCases(cases, (rng.random(n) < events).astype(float))
    bench.features[WEIGHTS] = np.stack([hazard, *rng.normal(size=(3, n))], axis=1)
    for k, row in enumerate(bench.shelf.rows):
        row.site = "ab"[k // 7 % 2]  # type: ignore[misc]
    return bench


def test_survival__is_scored_on_given_splits_and_on_folds_of_unseen_patients(tmp_path: Path) -> None:
    bench = with_survival(180)
    found = suite.run_tier("regression", bench, tmp_path)
    index = {(row["setting"], row["model"]): row for row in found["rows"]}
    assert set(index) == {(s, m) for s in ("Cox", "Cox, 5 folds, sites spread") for m in (WEIGHTS, *CONTROLS)}
    assert all(row["metric"] == "concordance" and row["task"] == "death" for row in found["rows"])
    given, folded = index["Cox", WEIGHTS], index["Cox, 5 folds, sites spread", WEIGHTS]
    assert given["low"] > 0.6 and given["value"] > 0.7 and given["n"] == 60 and given["main"]
    assert folded["low"] > 0.6 and folded["value"] > 0.7 and folded["n"] == 120 and not folded["main"]
    assert index["Cox", "raw_pixels"]["low"] < 0.5 < index["Cox", "raw_pixels"]["high"]
    assert {row["against"] for row in found["p_values"]} == set(CONTROLS) and not found["skipped"]
    leaks = suite.run_tier("retrieval", bench, tmp_path)
    assert {row["task"] for row in leaks["rows"]} == {"t"}  # other tiers leave times alone


@pytest.mark.parametrize("what", ["no events", "few patients", "none"])
def test_survival__says_what_it_lacks(tmp_path: Path, what: str) -> None:
    bench = thirds() if what == "none" else with_survival(events=0.0) if what == "no events" else with_survival(18)
    if what == "few patients":
        own = bench.survival["death"].cases
        own.split[own.split == "val"], own.groups[:] = "none", ["p"] * 18  # type: ignore[index, call-overload]
    why = {entry["what"]: entry["why"] for entry in suite.run_tier("regression", bench, tmp_path)["skipped"]}
    wanted = {
        "no events": {
            "survival, given splits": "0 events among 30 training cases; it takes 5",
            "survival, 5 folds": "0 events among 78 fitted cases; it takes 5",
        },
        "few patients": {"survival, 5 folds": "1 validation and test patients; it takes 5"},
        "none": {"survival": "the recipe names no task of times and events (task: survival)"},
    }[what]
    assert wanted.items() <= why.items()


def test_events__are_read_beside_times_and_refused_where_they_are_no_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = thirds()
    recipe = bench.recipe.model_copy(update={"tasks": {"death": SuiteTask(column="months", task="survival", event="died")}})
    cases = Cases(np.arange(3), np.array([4.0, 2.0, 9.0]), list("abc"), np.array(["train", "val", "test"]))
    series = {0: "s0", 1: "s1", 2: "s2"}
    said = {"s0": "1", "s1": "0.0", "s2": "1.0"}
    monkeypatch.setattr(suite.label_tables, "read_targets", lambda *_: said)
    assert suite._events(recipe, "death", cases, series, bench.shelf).tolist() == [1, 0, 1]
    said["s2"] = "yes"
    with pytest.raises(RequestError, match="1 of 3 cases with a time have neither 0 nor 1 in column died"):
        suite._events(recipe, "death", cases, series, bench.shelf)
    cases.targets[1] = -2
    with pytest.raises(RequestError, match="1 of 3 times in column months are below 0"):
        suite._events(recipe, "death", cases, series, bench.shelf)
    for given in ({"task": "survival"}, {"task": "regression", "event": "died"}):
        with pytest.raises(ValueError, match="task survival takes event"):
            SuiteTask(column="months", **given)


def write_nested(path: Path, lr: float) -> None:
    path.write_text(
        f"kind: finetune\ntask: classification\nsource: {{index: x, domain: mri, views: {{}}}}\ntable: t.csv\ntarget: t\nsettings: {{lr: {lr}}}\n"
    )


@pytest.mark.parametrize("change", ["nested recipe", "a column", "a patient"])
def test_claim__knows_what_tiers_read(tmp_path: Path, change: str) -> None:
    nested = tmp_path / "nested.yaml"
    write_nested(nested, 0.01)
    bench = thirds(leakage=["sex"], detection={"recipe": str(nested)})
    suite.claim(tmp_path / "out", bench, "")
    suite.claim(tmp_path / "out", bench, "")
    if change == "nested recipe":
        write_nested(nested, 0.02)
    elif change == "a column":
        bench.shelf.rows[0].sex = "M"  # type: ignore[misc]
    else:
        bench.shelf.rows[0].patient_id = "p1"  # type: ignore[misc]
    with pytest.raises(RequestError, match="computed with other"):
        suite.claim(tmp_path / "out", bench, "")


@pytest.mark.parametrize("change", ["an event", "a site"])
def test_claim__knows_what_survival_reads(tmp_path: Path, change: str) -> None:
    bench = with_survival(18)
    suite.claim(tmp_path / "out", bench, "")
    suite.claim(tmp_path / "out", bench, "")
    if change == "an event":
        bench.survival["death"].events[0] = 1 - bench.survival["death"].events[0]
    else:
        bench.shelf.rows[0].site = "c"  # type: ignore[misc]
    with pytest.raises(RequestError, match="computed with other"):
        suite.claim(tmp_path / "out", bench, "")


def test_faults__name_numbers_that_no_tier_can_take() -> None:
    wrong = thirds(k=[0, 1], shots=[0], classification=CurveSection(fractions=[0.5, 1.5], counts=[-1]).model_dump()).recipe
    faults = suite_faults(wrong)
    for start in ("k: 0;", "shots: 0;", "classification.counts: -1;", "classification.fractions: 1.5;"):
        assert any(fault.startswith(start) for fault in faults), start


def test_results__are_of_all_tiers_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = thirds()
    monkeypatch.setattr(suite, "open_bench", lambda recipe, *_: replace_recipe(bench, recipe))
    monkeypatch.setattr(suite, "load_recipe", lambda recipe, *_, **__: recipe)
    monkeypatch.setattr(suite, "replace", lambda shelf, **_: shelf)
    monkeypatch.setattr(suite, "refuse_pretraining_patients", lambda *_: "none")

    def run(tier: str) -> dict[str, Any]:
        return suite.run_suite(bench.recipe.model_copy(update={"tiers": [tier], "out": str(tmp_path / "out")}), "w")

    run("frozen")
    done = run("retrieval")
    assert {row["tier"] for row in done["rows"]} == {"frozen", "retrieval"} and len(done["comparisons"]) == 3
    assert {row["tier"] for row in json.loads((tmp_path / "out" / "results.json").read_text())["rows"]} == {"frozen", "retrieval"}


def replace_recipe(bench: Bench, recipe: SuiteRecipe) -> Bench:
    bench.recipe = recipe
    return bench


def test_patients_of_folds__are_those_of_all_folds_of_a_seed(tmp_path: Path) -> None:
    for seed in (0, 1):
        for fold in range(3):
            cell = tmp_path / "cells" / f"pretrained_n4_s{seed}_f{fold}"
            cell.mkdir(parents=True)
            (cell / "results.json").write_text(json.dumps({"cases": [{"patient_id": f"p{fold}{k}"} for k in range(4)]}))
    assert curves._patients_of(tmp_path) == 12
    for cell in (tmp_path / "cells").iterdir():
        (cell / "results.json").write_text(json.dumps({"cases": [{"patient_id": None}]}))
    assert curves._patients_of(tmp_path) is None


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_fractions_of_folds__are_of_what_every_fold_trains_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    cases = [Case(f"case{k}", tmp_path, tmp_path, f"p{k}", "train" if k < 4 else "test") for k in range(11)]
    monkeypatch.setattr(Cohort, "load", lambda _, **__: Cohort("c", tuple(cases)))
    section = CurveSection(recipe="x.yaml", fractions=[0.5, 1.0], seeds=[0, 1])
    for folds, counts in ((None, [2, 4]), (5, [3, 6])):
        recipe = SimpleNamespace(cohort=SimpleNamespace(path="c"), folds=folds, task=task)
        assert curves._counts_of(section, recipe) == counts
