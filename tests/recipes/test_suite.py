"""The suite end to end on phantoms: all tiers, what is skipped, resuming, and names that must not be published."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from medssl import api, suite
from medssl.errors import LeakageError, RecipeError, RequestError
from medssl.evaluation.suite_rows import CONTROLS, TIERS
from medssl.recipe import Recipe, recipe_folder
from tests.cli.test_bad_input import medssl

WARDS = ("Elsewhere Ward", "Nowhere Ward")
SMOKE = "smoke/suite_mri.yaml"


@pytest.fixture(scope="module")
def house(phantom_archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table with both classes and two wards in every split, and weights of a short run on the training volumes."""
    root = tmp_path_factory.mktemp("suite")
    with (phantom_archive.parent / "cohort" / "split.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    seen: dict[str, int] = {}
    with (root / "labels.csv").open("w", newline="") as stream:
        table = csv.DictWriter(stream, fieldnames=["file", "liver_ml", "finding", "ward", "died"])
        table.writeheader()
        for row in rows:
            place = seen[row["split"]] = seen.get(row["split"], 0) + 1
            finding = ("rare disease", "present")[place % 2]
            table.writerow(
                {
                    "file": row["file"],
                    "liver_ml": row["liver_ml"],
                    "finding": finding,
                    "ward": WARDS[place // 2 % 2],
                    "died": place % 2,
                }
            )
    quiet = ["train.monitor_items=0", "train.tensorboard=false", "train.steps=2"]
    smoke = recipe_folder() / "smoke" / "mae_cnn_segresnet3d_mri.yaml"
    assert api.pretrain(smoke, [f"data.index={phantom_archive}", f"out={root / 'run'}", *quiet]).status == "finished"
    return root


def load(house: Path, archive: Path, *changes: str) -> Any:
    given = [f"source.index={archive}", f"table={house / 'labels.csv'}", f"out={house / 'out'}"]
    return Recipe.load(recipe_folder() / SMOKE, [*given, *changes])


QUICK = ("tiers=[frozen, segmentation, retrieval, fairness]", "k=[1]", "draws=20")


def test_tiers__are_kept_and_say_no_name_that_is_private(
    house: Path, phantom_archive: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load(house, phantom_archive, *QUICK)
    seen: list[str] = []
    done = suite.run_suite(recipe, house / "run", on_tier=lambda tier, k, n: seen.append(tier))
    out, rows = house / "out", done["rows"]
    assert seen == ["frozen", "segmentation", "retrieval", "fairness"] and {path.stem for path in (out / "tiers").iterdir()} == set(
        seen
    )
    assert {row["model"] for row in rows if row["tier"] == "frozen"} == {"weights", *CONTROLS}
    assert done["leakage_check"] == "no patient of this evaluation was pretrained on"
    groups = [row for row in rows if row["tier"] == "fairness" and row["setting"] == "by ward"]
    assert groups and all(row["value"] is None for row in groups)  # fewer than fifty
    assert {row["subgroup"] for row in groups} <= {"group_1", "group_2"}
    public = [path for path in (out / "results.json", out / "table.md", out / "page.html", *(out / "tiers").iterdir())]
    for path in public:
        text = path.read_text()
        assert not any(name in text for name in (*WARDS, "rare disease")), path.name
    private = json.loads((out / "private" / "classes.json").read_text())
    assert private == {"finding": {"class_1": "present", "class_2": "rare disease"}, "organ": {}}
    assert set(json.loads((out / "private" / "fairness.json").read_text())["groups"]["ward"].values()) == set(WARDS)
    monkeypatch.setattr(suite, "RUN", {})
    (out / "tiers" / "frozen.json").rename(out / "tiers" / "kept")
    with pytest.raises(KeyError):  # only what is missing runs again
        suite.run_suite(recipe, house / "run")
    (out / "tiers" / "kept").rename(out / "tiers" / "frozen.json")
    assert suite.run_suite(recipe, house / "run")["rows"] == rows
    status, stdout, stderr = medssl(
        capsys, "evaluate", recipe_folder() / SMOKE, "--suite", "--weights", house / "run", f"source.index={phantom_archive}",
        f"table={house / 'labels.csv'}", f"out={out}", *QUICK,
    )  # fmt: skip
    assert status == 0 and "mean z" in stdout and "skipped: segmentation: label curves of Dice" in stdout, stderr
    assert medssl(capsys, "report", out, "--out", house / "again.html")[0] == 0
    assert (house / "again.html").read_text() == (out / "page.html").read_text()
    status, _, stderr = medssl(capsys, "evaluate", recipe_folder() / SMOKE, "--weights", house / "run", "source.index=x", "table=y")
    assert status == 2 and "`medssl evaluate --suite` runs it" in stderr
    with pytest.raises(RequestError, match="tiers computed with other settings"):
        suite.run_suite(load(house, phantom_archive, *QUICK, "shots=[1]"), house / "run")


def test_other_views_than_those_of_the_weights__are_refused_unless_forced(
    house: Path, phantom_archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = house / "forced"
    asked = ["evaluate", recipe_folder() / SMOKE, "--suite", "--weights", house / "run", f"source.index={phantom_archive}"]
    asked += [f"table={house / 'labels.csv'}", f"out={out}", "tiers=[retrieval, classification]", "k=[1]", "draws=20"]
    asked.append("source.views={normalize: percentile}")
    status, _, stderr = medssl(capsys, *asked)
    assert status == 2 and "source.views: the weights were pretrained with normalize zscore" in stderr and not out.exists()
    status, stdout, stderr = medssl(capsys, *asked, "force=true")
    line = "Forced, images differ from those of the pretraining: the weights were pretrained with normalize zscore"
    assert status == 0 and stdout.count(line) == 1, stderr
    result = json.loads((out / "results.json").read_text())
    assert len(result["forced"]) == 1 and {"weights", "scratch"} <= {
        row["model"] for row in result["rows"] if row["tier"] == "classification"
    }
    assert (out / "table.md").read_text().count(line) == (out / "page.html").read_text().count(line) == 1


@pytest.mark.slow
def test_all_tiers__run_or_say_why(house: Path, phantom_archive: Path) -> None:
    recipe = load(house, phantom_archive, f"out={house / 'whole'}")
    seen: list[str] = []
    done = suite.run_suite(recipe, house / "run", on_tier=lambda tier, k, n: seen.append(tier))
    out = house / "whole"
    assert seen == list(TIERS) and {path.stem for path in (out / "tiers").iterdir()} == set(TIERS)
    rows = done["rows"]
    keys = {"task", "tier", "metric", "value", "low", "high", "n", "patients", "seeds", "subgroup", "model"}
    assert rows and all(keys <= set(row) for row in rows)
    models = {tier: {row["model"] for row in rows if row["tier"] == tier} for tier in TIERS}
    for tier in ("smoke", "frozen", "retrieval", "regression", "ood"):
        assert models[tier] >= {"weights", *CONTROLS}, tier
    assert models["classification"] == {"weights", "scratch", *CONTROLS}
    why = {(s["tier"], s["what"]): s["why"] for s in done["skipped"]}
    assert why["segmentation", "label curves of Dice"] == "the recipe names no fine-tuning (key segmentation)"
    assert "the rarest class has" in why["frozen", "25 per class"]
    assert "known value of site" in why["ood", "site held out"] and "value of site has" in why["fairness", "leakage of site"]
    assert why["fairness", "subgroups by sex"] == "sex is not known of any test case"
    assert done["leakage_check"] == "no patient of this evaluation was pretrained on"
    assert {row["model"] for row in done["aggregate"]} == {"weights", "scratch", *CONTROLS}
    twin = next(row for row in done["aggregate"] if row["model"] == "scratch")
    assert twin["missing"] > 0 and len(done["comparisons"]) == 6
    table = (out / "table.md").read_text()
    assert "| model | mean z |" in table and "for comparison, fine-tuned: 4 labels, auroc" in table and "- skipped: " in table


def test_survival__is_read_from_two_columns(house: Path, phantom_archive: Path, tmp_path: Path) -> None:
    death = "tasks={death: {column: liver_ml, task: survival, event: died}}"
    recipe = load(house, phantom_archive, death, "tiers=[regression]", f"out={tmp_path / 'out'}", *QUICK[1:])
    done = suite.run_suite(recipe, house / "run")
    assert done["tasks"]["death"]["task"] == "survival" and done["tasks"]["death"]["cases"]["train"] > 0
    said = {entry["what"]: entry["why"] for entry in done["skipped"]}
    assert done["rows"] or "it takes 5" in said["survival, given splits"]  # phantoms are few
    table = (house / "labels.csv").read_text().replace(",1\n", ",2\n", 1)
    (tmp_path / "wrong.csv").write_text(table)
    with pytest.raises(RequestError, match=r"1 of .* cases with a time have neither 0 nor 1 in column died"):
        suite.open_bench(load(house, phantom_archive, death, f"table={tmp_path / 'wrong.csv'}"), house / "run")
    with pytest.raises(RecipeError, match="task survival takes event"):
        load(house, phantom_archive, "tasks={death: {column: liver_ml, task: survival}}")


def test_faults__come_before_anything_is_written(house: Path, phantom_archive: Path, tmp_path: Path) -> None:
    out = f"out={tmp_path / 'out'}"
    with pytest.raises(RecipeError, match='tiers: "frozn" is unknown'):
        suite.run_suite(load(house, phantom_archive, "tiers=[frozn]", out), house / "run")
    with pytest.raises(RecipeError, match=r"segmentation\.recipe: required"):
        suite.run_suite(load(house, phantom_archive, "segmentation={seeds: [0]}", out), house / "run")
    with pytest.raises(RecipeError, match="No such file"):
        suite.run_suite(load(house, phantom_archive, f"segmentation.recipe={tmp_path / 'no.yaml'}", out), house / "run")
    with pytest.raises(RequestError, match="has no column"):
        suite.run_suite(load(house, phantom_archive, "tasks.finding.column=fnding", out), house / "run")
    text = (house / "labels.csv").read_text().splitlines()
    spoilt = [text[0], ",".join([text[1].split(",")[0], "nan", *text[1].split(",")[2:]]), *text[2:]]
    (tmp_path / "nan.csv").write_text("\n".join(spoilt))
    with pytest.raises(RequestError, match="not finite"):
        suite.run_suite(load(house, phantom_archive, f"table={tmp_path / 'nan.csv'}", out), house / "run")
    with pytest.raises(RequestError, match="`medssl evaluate --suite` needs one with kind: suite"):
        suite.run_suite(recipe_folder() / "demo" / "evaluate.yaml", house / "run", ["source.index=x", "table=y", "target=z"])
    assert not (tmp_path / "out").exists()


def test_patients_of_pretraining__are_not_scored(house: Path, phantom_archive: Path, tmp_path: Path) -> None:
    quiet = ["train.monitor_items=0", "train.tensorboard=false", "train.steps=1", "data.where=split is not null"]
    smoke = recipe_folder() / "smoke" / "mae_cnn_segresnet3d_mri.yaml"
    api.pretrain(smoke, [f"data.index={phantom_archive}", f"out={tmp_path / 'run'}", *quiet])
    with pytest.raises(LeakageError, match="belong to patients that the weights were pretrained on"):
        suite.run_suite(load(house, phantom_archive, f"out={tmp_path / 'out'}"), tmp_path / "run")
    assert not (tmp_path / "out").exists()
