"""Benchmarks of the matcher and of Alice at toy size: what they compute against plain computation, and that they go on where they stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from benchmarks import alice_runs, match_accuracy, match_page, mining_share, pair_kinds
from medssl.domains.statistics import foreground, intensity_stats, rounded
from medssl.matching.base import MatchVolume
from medssl.phantoms import make_cohort
from medssl.recipe import recipe_folder
from medssl.sampling.pairs import PairSampler
from medssl.types import ImageMeta, Sample

FEW = ["train.steps=2", "train.batch=2", "train.checkpoint_every=1", "train.log_every=1", "train.monitor_items=0"]


@pytest.fixture(autouse=True)
def _threads_stay() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def volume(shape: tuple[int, int, int], spacing: tuple[float, float, float], origin: tuple[float, float, float]) -> MatchVolume:
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    image = np.full((1, *shape), 100, np.int16)
    meta = ImageMeta("a" * 32, "mri", "MR", "arbitrary", 2, rounded(intensity_stats(image[0], foreground(image[0]))))
    return MatchVolume.of_sample(Sample(image, spacing, affine, None, meta))


def test_phantom_archive__has_every_phantom_in_the_domain_that_the_recipes_name(tmp_path: Path) -> None:
    match_accuracy.phantom_archive(tmp_path, 6)  # NIfTI and DICOM
    assert json.loads((tmp_path / "archive" / "summary.json").read_text())["domains"] == {"mri": 6}


def test_pairs__are_distinct_ordered_and_of_two_patients() -> None:
    pairs = match_accuracy.draw_pairs(20, 6, 0)
    assert len(set(pairs)) == 20 and all(a != b for a, b in pairs)
    assert pairs == match_accuracy.draw_pairs(20, 6, 0) != match_accuracy.draw_pairs(20, 6, 1)
    assert len(match_accuracy.draw_pairs(999, 6, 0)) == 30


def test_centroids__are_those_of_the_label_in_world_mm(tmp_path: Path) -> None:
    labels = np.zeros((8, 9, 10), np.uint8)
    labels[2:5, 3, 4] = 1
    affine = np.array([[0, -2.0, 0, 5], [1.5, 0, 0, -7], [0, 0, 3.0, 1], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(labels, affine), tmp_path / "l.nii.gz")  # type: ignore[attr-defined, no-untyped-call]
    found = match_accuracy.centroids(tmp_path / "l.nii.gz", [1, 2])
    assert np.allclose(found[0], [-2 * 3 + 5, 1.5 * 3 - 7, 3 * 4 + 1])
    assert np.isnan(found[1]).all()


def test_from_the_middle__keeps_the_offset_and_world_keeps_the_place() -> None:
    a = match_accuracy.Patient("a", volume((10, 10, 10), (2, 2, 2), (0, 0, 0)), np.array([[11.0, 7, 9]]))
    b = match_accuracy.Patient("b", volume((20, 10, 8), (1, 1, 3), (50, 60, 70)), np.array([[0.0, 0, 0]]))
    middle = np.array([50 + 9.5, 60 + 4.5, 70 + 3.5 * 3])
    assert np.allclose(match_accuracy.same_from_middle(a, b).points_mm, middle + np.array([2, -2, 0]))
    assert np.allclose(match_accuracy.same_world(a, b).points_mm, [[11, 7, 9]])


def test_statistics__count_pairs_as_often_as_both_patients_were_drawn() -> None:
    weights = match_accuracy.weights_of([(0, 1), (1, 2), (2, 0)], 3, 500, 0)
    assert weights.shape == (500, 3) and weights.mean() == pytest.approx(2 / 3, abs=0.1)  # 3 * 2 / 3^2
    assert match_accuracy.weighted(np.array([1.0, 5.0, 9.0]), np.array([2, 1, 0])) == {"mean": 7 / 3, "median": 1.0}
    found = match_accuracy.statistics(np.array([[1.0, np.nan], [3.0, 3.0], [5.0, 3.0]]), weights)
    assert found["mean"] == 3 and found["median"] == 3
    low, high = found["mean_interval"]
    assert 1 <= low < 3 < high <= 5


def test_token_classes__against_a_plain_loop(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.repeat(np.repeat(rng.integers(0, 4, (5, 4, 4)), 4, 0), 4, 1), 4, 2).astype(np.uint8)
    space = volume((20, 16, 16), (3.0, 3.0, 4.0), (-5, 3, 9))
    nibabel.save(nibabel.Nifti1Image(labels, space.affine), tmp_path / "l.nii.gz")  # type: ignore[attr-defined, no-untyped-call]
    body = rng.random((20, 16, 16)) < 0.8
    grid, stride = (4, 3, 4), 4
    found = pair_kinds.token_classes(space, body, tmp_path / "l.nii.gz", grid, stride)
    cells: dict[tuple[int, ...], list[int]] = {}
    for place in np.ndindex(*labels.shape):
        mm = (np.asarray(place) + 0.5) * [3, 3, 4]
        token = tuple(round(float(v)) for v in (mm / pair_kinds.SPACING - 0.5) / stride)
        cells.setdefault(token, []).append(int(labels[place]) if body[place] else -1)
    for token in np.ndindex(*grid):
        seen = cells[token]
        most = max(set(seen), key=seen.count)
        expected = most if seen.count(most) * 2 >= len(seen) else -1
        if seen.count(most) * 2 != len(seen):
            assert found[token] == expected


def test_merits__are_balanced_over_the_classes_that_a_patient_has() -> None:
    cell = {"true": [0, 0, 0, 1, 2], "predicted": [0, 0, 0, 0, 2], "patient": ["a", "a", "a", "a", "b"]}
    values, names = pair_kinds.merits(cell)
    assert names == ["a", "b"] and values.tolist() == [0.5, 1.0]


@pytest.mark.slow
def test_match_accuracy__trains_matches_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [
        "phantoms",
        "--train",
        "--seeds",
        "0",
        "--phantoms",
        "8",
        "--pairs",
        "2",
        "--draws",
        "50",
        "--folder",
        str(tmp_path / "run"),
    ]
    asked += ["--overrides", *FEW, "--out", str(tmp_path)]
    content = match_accuracy.main(asked)
    names = ["same_world", "same_from_middle", "body_axis", "affine", "embedding_s0"]
    assert [row["matcher"] for row in content["rows"]] == names
    assert all(row["points"] == 12 for row in content["rows"])
    assert {row["minus"] for row in content["differences"]} == set(names[:-1])
    assert content["stronger_baseline"] in names[:2]
    assert content["runs"]["embedding_s0"]["seed"] == 0

    def never(*_: Any) -> None:
        raise AssertionError("what is there is not computed again")

    monkeypatch.setattr(match_accuracy.api, "pretrain", never)
    monkeypatch.setattr(match_accuracy, "AffineMatcher", never)
    again = match_accuracy.main(asked)
    assert again["rows"] == content["rows"]
    assert json.loads((tmp_path / "match_accuracy_phantoms.json").read_text()) == json.loads(json.dumps(again))

    run = tmp_path / "run" / "matcher" / "0"
    page = tmp_path / "page.html"
    shown = ["phantoms", "--phantoms", "8", "--folder", str(tmp_path / "run"), "--run", str(run), "--page", str(page)]
    match_page.main([*shown, "--pairs", "1", "--others", "1", "--grid", "40"])
    text = page.read_text()
    assert text.count("<img ") == 2 and "phantom_" not in text and str(tmp_path) not in text


@pytest.mark.slow
def test_pair_kinds__probes_every_arm_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["--folder", str(tmp_path / "run"), "--seeds", "0", "--phantoms", "16", "--matcher", "body_axis"]
    asked += ["--overrides", *FEW, "--out", str(tmp_path)]
    content = pair_kinds.main(asked)
    assert [row["arm"] for row in content["rows"]] == ["untrained", *pair_kinds.ARMS]
    assert all(0 <= row["balanced_accuracy"] <= 1 for row in content["rows"])
    assert len(content["differences"]) == 6 and content["stopped"] == {}
    monkeypatch.setattr(pair_kinds, "train", None)
    assert pair_kinds.main(asked)["rows"] == content["rows"]


@pytest.mark.slow
def test_alice_runs__all_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_cohort(tmp_path / "data", patients=8, size=(40, 40, 32), dicom_fraction=0.0)
    alice_runs.api.index(data / "images", tmp_path / "run" / "archive", splits=data / "split.csv", modality="MR")
    few = [*FEW, "data.card=null", "views.spacing_mm=8"]  # phantoms are as large as people
    asked = ["--folder", str(tmp_path / "run"), "--labels", "2", "--seeds", "0", "--out", str(tmp_path)]
    asked += ["--matcher-overrides", *few, "objective.ignore_mm=[20,60]", "--overrides", *few, "probes={}"]
    asked += ["--finetune-overrides", f"cohort={{path: {data}, domain: mri}}", "settings.steps=2", "settings.warmup_steps=1"]
    asked += ["settings.spacing_mm=[8, 8, 8]"]
    asked += ["settings.val_every=1", "settings.val_cases=1"]
    content = alice_runs.main(asked)
    assert content["cells"] == ["alice_n2_s0", "mae-cnn_n2_s0", "scratch_n2_s0"]
    assert {(row["arm"], row["against"]) for row in content["summary"]["differences"]} == {
        ("alice", "scratch"),
        ("mae-cnn", "scratch"),
        ("alice", "mae-cnn"),
    }
    assert set(content["pretraining"]) == {"matcher", "alice", "mae-cnn"}
    monkeypatch.setattr(alice_runs.api, "pretrain", None)
    assert alice_runs.main([*asked])["summary"] == content["summary"]


@pytest.mark.slow
def test_mining_share__counts_every_draw_of_the_steps(tmp_path: Path) -> None:
    archive = match_accuracy.phantom_archive(tmp_path, 6).parent / "archive"
    before = PairSampler.draw
    smoke = recipe_folder() / "smoke" / "alice_segresnet3d_mri_pairs.yaml"
    row = mining_share.measure(
        smoke, [f"data.index={archive}", "data.where=series_id is not null", "train.batch=2"], 4, tmp_path / "run"
    )
    assert PairSampler.draw is before and (row["steps"], row["batch"]) == (3, 2)
    assert row["share"] == pytest.approx(2 * row["draw_ms"] / row["step_ms"]) and row["draw_ms"] > 0
