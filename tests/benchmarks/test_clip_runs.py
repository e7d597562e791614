"""The runs on echo phantoms and on lung ultrasound, at toy size; their tables against plain computation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import echo_runs, echo_trials, lung_runs
from medssl import api
from medssl.evaluation.clips import HeadSettings
from medssl.evaluation.scores import roc_auc

SMALL = [
    "views.size=32",
    "encoder.hidden_size=48",
    "encoder.num_layers=1",
    "encoder.num_heads=2",
    "train.steps=2",
    "train.batch=2",
    "train.monitor_items=0",
    "optim.schedule.warmup_steps=1",
]


def echo_cell(arm: str, seed: int, error: float, dice: float) -> dict[str, Any]:
    """A cell of twelve clips of six patients, whose errors differ from clip to clip."""
    rng = np.random.default_rng([seed, len(arm)])
    ef = np.linspace(25, 70, 12)
    off = error + rng.normal(0, 0.5, 12)
    predicted = {"pooled": (ef + off).tolist(), "motion": (ef - 0.5 * off).tolist()}
    return {
        "arm": arm,
        "seed": seed,
        "file": [f"{n}.dcm" for n in range(12)],
        "patient": [f"p{n // 2}" for n in range(12)],
        "ef": ef.tolist(),
        "predicted": predicted if arm != "raw" else {"pooled": predicted["pooled"]},
        "mean_of_training": 45.0,
        "dice": (dice + rng.normal(0, 0.01, 12)).tolist(),
        "seconds": {"train": 10.0 * seed},
    }


def test_echo_table__means_of_seeds_and_paired_differences() -> None:
    cells = [echo_cell(arm, seed, *of) for arm, of in (("discovr", (6, 0.8)), ("random", (9, 0.7))) for seed in (0, 1, 2)]
    cells.append(echo_cell("raw", 0, 11, 0.5))
    found = echo_runs.summarise(cells, draws=200)
    rows = {(row["arm"], row["metric"]): row for row in found["rows"]}
    errors = [np.abs(np.subtract(cell["predicted"]["pooled"], cell["ef"])).mean() for cell in cells[:3]]
    assert rows["discovr", "ef_mae_pooled"]["seeds"] == pytest.approx(errors)
    assert rows["discovr", "ef_mae_pooled"]["value"] == pytest.approx(np.mean(errors))
    assert rows["discovr", "dice"]["clips"] == 12 and rows["discovr", "dice"]["patients"] == 6
    assert rows["discovr", "dice"]["train_s"] == 10 and ("raw", "ef_mae_motion") not in rows
    apart = {(row["discovr minus"], row["metric"]): row for row in found["differences"]}
    expected = rows["discovr", "ef_mae_motion"]["value"] - rows["raw", "ef_mae_pooled"]["value"]
    assert apart["raw", "ef_mae_motion"]["difference"] == pytest.approx(expected)
    low, high = apart["random", "ef_mae_pooled"]["interval"]
    assert low < apart["random", "ef_mae_pooled"]["difference"] < high < 0
    assert found["ef_mae_of_the_mean"] == pytest.approx(np.abs(np.linspace(25, 70, 12) - 45).mean())


def test_echo_table__time_of_training_is_of_cells_that_trained() -> None:
    cells = [echo_cell("discovr", seed, 6, 0.8) for seed in (1, 2)]
    cells[0]["seconds"]["train"] = None  # its run was there
    assert echo_runs.seconds_of_training(cells) == 20 and echo_runs.seconds_of_training(cells[:1]) is None


def test_echo_table__of_different_clips_is_refused() -> None:
    cells = [echo_cell("discovr", seed, 6, 0.8) for seed in (0, 1)]
    cells[1]["file"] = cells[1]["file"][::-1]
    with pytest.raises(SystemExit, match="different clips"):
        echo_runs.summarise(cells, draws=10)


def test_echo_trials__rows_hold_scores_and_how_training_ended(tmp_path: Path) -> None:
    cell = {**echo_cell("discovr", 0, 6, 0.8), "overrides": ["optim.lr=3e-4"]}
    lines = [{"step": step, "loss": float(step), "video_spread": 0.5} for step in (50, 95, 100)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    row = echo_trials.result_of("slow", cell, tmp_path)
    assert row["loss"] == 97.5 and row["steps"] == 100 and row["overrides"] == "optim.lr=3e-4"
    assert row["ef_mae_pooled"] == pytest.approx(np.abs(np.subtract(cell["ef"], cell["predicted"]["pooled"])).mean())
    assert "loss" not in echo_trials.result_of("random", cell, tmp_path / "none")


def test_echo_trials__of_the_repository_fit_their_recipes() -> None:
    trials = echo_trials.read_trials(echo_trials.TRIALS)
    assert {trial["arm"] for trial in trials.values()} == set(echo_runs.ARMS)
    for trial in trials.values():
        if trial["arm"] in echo_runs.TRAINED:
            api.load_recipe(echo_runs.TRAINED[trial["arm"]], ["data.index=none", "out=none", *trial.get("overrides", [])])
    assert all(
        api.load_recipe(path, ["data.index=none", "out=none", *echo_runs.chosen(arm)]) for arm, path in echo_runs.TRAINED.items()
    )
    for arm, path in lung_runs.TRAINED.items():
        lung, echo = (api.load_recipe(one, ["data.index=none", "out=none"]) for one in (path, echo_runs.TRAINED[arm]))
        assert (lung.objective, lung.encoders, lung.optim, lung.train) == (echo.objective, echo.encoders, echo.optim, echo.train)


@pytest.mark.slow
def test_echo_runs__every_arm_and_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(echo_runs, "COHORT", {"patients": 12, "clips": 1, "seed": 0, "size": (64, 64), "seconds": 0.8})
    monkeypatch.setattr(echo_runs, "HEAD", HeadSettings(steps=5))
    given = ["--folder", str(tmp_path / "runs"), "--out", str(tmp_path), "--seeds", "0", "--overrides", *SMALL]
    content = echo_runs.main([*given, "--split", "val"])
    assert json.loads((tmp_path / "echo_runs_val.json").read_text()) == json.loads(json.dumps(content))
    rows = {(row["arm"], row["metric"]): row["value"] for row in content["rows"]}
    assert {arm for arm, _ in rows} == set(echo_runs.ARMS) and ("raw", "ef_mae_motion") not in rows
    assert all(np.isfinite(value) for value in rows.values()) and len(content["differences"]) == 4 * 5
    cells = sorted((tmp_path / "runs" / "cells").iterdir())
    times = [cell.stat().st_mtime_ns for cell in cells]
    held = json.loads(cells[0].read_text())
    assert held["split"] == "val" and len(held["patient"]) == 2
    echo_runs.main([*given, "--split", "val"])
    assert [cell.stat().st_mtime_ns for cell in cells] == times
    content = echo_runs.main([*given, "--split", "test"])
    trained = [path for path in (tmp_path / "runs").iterdir() if (path / "run.json").exists()]
    assert len(trained) == 3 and {row["clips"] for row in content["rows"]} == {3}
    again = echo_runs.main([*given, "--split", "test", "--collect"])
    assert again["rows"] == content["rows"]
    with pytest.raises(SystemExit, match="computed with overrides"):
        echo_runs.main([*given[:6], "--split", "test"])


def test_lung_folds__hold_patients_of_both_classes() -> None:
    patients = {str(n): 0 for n in range(1, 6)} | {str(n): 1 for n in range(100, 110)}
    dealt = lung_runs.deal(patients)
    for fold in range(5):
        kinds = [kind for name, kind in patients.items() if dealt[name] == fold]
        assert sorted(kinds) == [0, 1, 1]


class ToyClips:
    """Thirty clips whose first feature tells the class."""

    patients = [f"p{n // 2}" for n in range(30)]  # noqa: RUF012
    irregular = np.arange(30) // 2 % 2 == 1
    fold = np.arange(30) // 8


def test_lung_scores__follow_the_training_folds_alone() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(30, 5)) * 0.1
    features[:, 0] += np.where(ToyClips.irregular, 1, -1)
    found = lung_runs.scores(features, ToyClips(), fold=1, seed=0)  # type: ignore[arg-type]
    held = ToyClips.irregular[8:16]
    for probe in lung_runs.PROBES:
        assert ((np.array(found[probe]) > 0.5) == held).all()
    other = ToyClips()
    other.irregular = ToyClips.irregular.copy()
    other.irregular[8:16] = ~held  # labels of the fold itself count for nothing
    assert lung_runs.scores(features, other, fold=1, seed=0) == found  # type: ignore[arg-type]


def lung_cell(arm: str, fold: int, lift: float) -> dict[str, Any]:
    rng = np.random.default_rng(fold)
    irregular = [0, 0, 1, 1]
    score = [float(np.clip(0.5 + lift * (2 * kind - 1) + rng.normal(0, 0.1), 0, 1)) for kind in irregular]
    found = {"arm": arm, "fold": fold, "patient": [f"{fold}a", f"{fold}a", f"{fold}b", f"{fold}c"], "irregular": irregular}
    return {**found, "score": {"linear": score, "knn": score[::-1]}}


def test_lung_table__over_the_clips_of_all_folds() -> None:
    cells = [lung_cell(arm, fold, lift) for arm, lift in (("discovr", 0.3), ("random", 0.0)) for fold in range(5)]
    found = lung_runs.summarise(cells, draws=200)
    rows = {(row["arm"], row["probe"], row["metric"]): row for row in found["rows"]}
    table = [[kind, score] for cell in cells[5:] for kind, score in zip(cell["irregular"], cell["score"]["linear"])]
    assert rows["random", "linear", "auroc"]["value"] == pytest.approx(roc_auc(np.array(table)))
    assert rows["discovr", "linear", "auroc"]["clips"] == 20 and rows["discovr", "linear", "auroc"]["patients"] == 15
    assert rows["discovr", "linear", "balanced_accuracy"]["value"] > 0.9
    apart = {(row["discovr minus"], row["probe"], row["metric"]): row for row in found["differences"]}
    expected = rows["discovr", "linear", "auroc"]["value"] - rows["random", "linear", "auroc"]["value"]
    assert apart["random", "linear", "auroc"]["difference"] == pytest.approx(expected)
    with pytest.raises(SystemExit, match="different folds"):
        lung_runs.summarise(cells[:-1], draws=10)


@pytest.mark.slow
@pytest.mark.data
def test_lung_runs__two_folds_at_toy_size(shared_data: Path, tmp_path: Path) -> None:
    given = [
        str(shared_data),
        "--folder",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path),
        "--folds",
        "0",
        "3",
        "--overrides",
        *SMALL,
    ]
    content = lung_runs.main(given)
    assert {row["arm"] for row in content["rows"]} == set(lung_runs.ARMS) and content["seed"] == 0
    cells = sorted((tmp_path / "runs" / "cells").iterdir())
    assert len(cells) == 8
    held = json.loads(cells[0].read_text())
    assert {0, 1} == set(held["irregular"])
    facts = json.loads((tmp_path / "runs" / "discovr_fold0_seed0" / "run.json").read_text())
    assert facts["items"]["used"] == 28 - len(held["clip"]) and facts["items"]["patients"] == 15 - len(set(held["patient"]))
    times = [cell.stat().st_mtime_ns for cell in cells]
    lung_runs.main(given)
    assert [cell.stat().st_mtime_ns for cell in cells] == times
