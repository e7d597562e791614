"""The road of bags: from a folder of features and a table to results in which nobody is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from medssl import api
from medssl.errors import MedsslError
from medssl.evaluation.target_summary import summarise
from medssl.recipe import FinetuneBagsRecipe, Recipe, recipe_folder
from medssl.weights import load_part
from tests.cli.test_bad_input import medssl
from tests.evaluation.test_bags import write_slides

pytest.importorskip("h5py", reason="extra wsi")
SHORT = ("settings.steps=3", "settings.batch=4", "settings.warmup_steps=1", "settings.val_every=2", "settings.patience=null")


def load(root: Path, *changes: str) -> Any:
    given = [f"bags.folder={root / 'features'}", f"table={root / 'slides.csv'}", "target=tumour", f"out={root / 'out'}", *SHORT]
    return Recipe.load(recipe_folder() / "finetune" / "classification_slides.yaml", [*given, *changes])


def test_slides__are_learnt_from_and_nobody_is_named(tmp_path: Path) -> None:
    root = write_slides(tmp_path, 16)
    recipe = load(root)
    assert isinstance(recipe, FinetuneBagsRecipe)
    summary = api.label_curve(recipe, None, counts=[8], seeds=[0, 1])
    (row,) = summary["rows"]
    assert row["arm"] == "features" and row["n_test"] == 4 and row["metric"] == "auroc" and summary["differences"] == []
    shared = summary["shared"]
    assert shared["encoder"] == {"name": "means", "width": 16} and shared["without_features"] == 0
    assert shared["leakage_check"].startswith("not possible") and shared["classes"] == ["class_1", "class_2"]
    cell = root / "out" / "cells" / "features_n8_s0"
    state, manifest = load_part(cell / "network.safetensors")
    assert manifest["made_by"] == "means" and all(key.startswith("head.") for key in state)
    assert json.loads((cell / "results.json").read_text())["cases"][0]["series_id"].startswith("slide")
    kept = {path.name: path for path in (root / "out" / "private").iterdir()}
    assert set(kept) == {"classes.csv", "slides.csv", "cohort.key"} and "Quillfeather_00.h5" in kept["slides.csv"].read_text()
    public = [path for path in (root / "out").rglob("*") if path.is_file() and path.parent.name != "private"]
    assert public and not [path for path in public if b"Quillfeather" in path.read_bytes() or b"MRN" in path.read_bytes()]


@pytest.mark.parametrize(
    ("change", "weights", "message"),
    [
        ("settings.augment={noise_std: 0.1}", None, "settings.augment: bags hold features"),
        ("classes=[no, yes]", None, "put class names in quotes"),
        ("target=nothing", None, "has no column nothing"),
        ("bags.folder=nowhere", None, "none of the 16 rows of slides.csv has a feature file"),
        ("labels=9", None, "9 labels are asked for, and 8 training cases have one"),
        ("labels=8", "runs/somewhere", "bags hold features that an encoder made before; leave --weights out"),
    ],
)
def test_bad_requests__are_refused_before_anything_is_written(
    tmp_path: Path, change: str, weights: str | None, message: str
) -> None:
    root = write_slides(tmp_path, 16)
    with pytest.raises(MedsslError, match=message):
        api.finetune(load(root, change), weights)
    assert not (root / "out").exists()


def test_folds__test_every_patient_once_a_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_slides(tmp_path, 16)
    summary = api.label_curve(load(root, "folds=4"), None, counts=None, seeds=[0, 1])
    (row,) = summary["rows"]
    assert row["n_test"] == 16 and row["seeds"] == [0, 1] and summary["cells"] == {"planned": 8, "done": 8} and row["labels"] == 8
    tested: dict[int, list[str]] = {0: [], 1: []}
    for path in sorted((root / "out" / "cells").glob("*/results.json")):
        content = json.loads(path.read_text())
        names = [case["series_id"] for case in content["cases"]]
        assert len(names) == 4 and len({case["patient_id"] for case in content["cases"]}) == 2
        tested[content["seed"]] += names
    assert all(len(names) == len(set(names)) == 16 for names in tested.values())
    status, _, stderr = medssl(capsys, "report", root / "out")
    page = (root / "out" / "report.html").read_text() if status == 0 else stderr
    assert "test cases of 4 folds are taken together" in page and "slide00" in page
    with pytest.raises(MedsslError, match="folds: 12, and the labelled cases are of 8 patients"):
        api.finetune(load(root, "folds=12", f"out={root / 'none'}"), None)
    with pytest.raises(MedsslError, match="cells computed with other folds"):
        api.finetune(load(root), None)


def test_unfinished_folds__are_in_no_table() -> None:
    def cell(arm: str, fold: int, target: float) -> dict[str, Any]:
        cases = [
            {"series_id": f"{fold}{k}", "patient_id": f"p{fold}{k}", "target": k, "probability": [1 - target * k, target * k]}
            for k in (0, 1)
        ]
        facts = {"arm": arm, "labels": 4, "seed": 0, "fold": fold, "of_folds": 3, "task": "classification"}
        return {**facts, "cases": cases, "rows": [{"metric": "auroc", "value": target}], "seconds": {"train": 1.0}}

    both = [cell(arm, fold, target) for arm, target in (("pretrained", 0.9), ("scratch", 0.8)) for fold in (0, 1, 2)]
    summary = summarise(both)
    assert [row["n_test"] for row in summary["rows"]] == [6, 6] and summary["differences"][0]["difference"] == 0
    assert summary["rows"][1]["scores"] == {"auroc": pytest.approx(0.8)}
    assert summary["rows"][1]["seed_means"] == [summary["rows"][1]["value"]]
    assert [row["arm"] for row in summarise(both[:-1])["rows"]] == ["pretrained"]
    assert summarise([both[0], both[3]]) == {"metric": "", "rows": [], "differences": []}


def test_another_table__leaves_what_is_there_as_it_is(tmp_path: Path) -> None:
    root = write_slides(tmp_path, 16)
    api.finetune(load(root), None)
    kept = {path: path.read_bytes() for path in (root / "out" / "private").iterdir()}
    lines = (root / "slides.csv").read_text().splitlines()
    (root / "slides.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    with pytest.raises(MedsslError, match="cells computed with other cases"):
        api.finetune(load(root), None)
    (root / "slides.csv").write_text("\n".join(lines) + "\n")
    write_slides(root / "other", 16, seed=1)
    with pytest.raises(MedsslError, match="cells computed with other cases"):
        api.finetune(load(root, f"bags.folder={root / 'other' / 'features'}"), None)
    assert {path: path.read_bytes() for path in (root / "out" / "private").iterdir()} == kept


def test_dropout__is_drawn_alike_in_every_run(tmp_path: Path) -> None:
    root = write_slides(tmp_path, 16)
    dropped = "settings.head_args={dropout: 0.5}"
    rows = []
    for name in ("one", "two"):
        torch.manual_seed(len(rows))
        api.finetune(load(root, dropped, f"out={root / name}"), None)
        (path,) = (root / name / "cells").glob("*/results.json")
        rows.append([case["probability"] for case in json.loads(path.read_text())["cases"]])
    assert rows[0] == rows[1]
