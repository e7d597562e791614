"""Runs on clips as `medssl pretrain` makes them: what does not fit, and a run that is killed within an epoch."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from medssl import api
from medssl.archive.index import index
from medssl.errors import RecipeError, RequestError
from medssl.evaluation.scores import r2
from medssl.phantoms.echo import make_echo_cohort
from medssl.probe_tasks import evaluation_section
from medssl.recipe import Recipe, recipe_folder
from medssl.report.clip_figures import read_clips, read_regression
from medssl.report.collect import collect

QUIET = ["train.monitor_items=0", "train.tensorboard=false"]
NAMES = ("cluster_distillation", *(pytest.param(name, marks=pytest.mark.slow) for name in ("video_mae", "relative_speed")))


def recipe(name: str) -> Path:
    return recipe_folder() / "smoke" / f"{name}_video_vit_ultrasound.yaml"


def lines(out: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("data_wait", "seconds_per_step", "time")} for line in found]


@pytest.mark.parametrize("name", NAMES)
def test_killed_within_an_epoch__resumes_to_the_same_bits(name: str, cine_archive: Path, tmp_path: Path) -> None:
    """Six items and batches of 4; the checkpoint that is resumed is that of step 2."""
    changes = [f"data.index={cine_archive}", *QUIET, "train.steps=4", "train.checkpoint_every=2"]

    def die(done: int, _total: int, _metrics: Any) -> None:
        if done == 3:
            raise KeyboardInterrupt

    api.pretrain(recipe(name), [*changes, f"out={tmp_path / 'whole'}"])
    with pytest.raises(KeyboardInterrupt):
        api.pretrain(recipe(name), [*changes, f"out={tmp_path / 'killed'}"], on_step=die)
    assert api.pretrain(tmp_path / "killed", resume=True).status == "finished"
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    folder = tmp_path / "whole" / "weights" / "last"
    parts = sorted(path.stem for path in folder.glob("*.safetensors"))
    expected = {"cluster_distillation": ["encoder", "image_teacher", "video_student"]}
    assert parts == expected.get(name, ["encoder"])
    for part in parts:
        whole, resumed = (load_file(tmp_path / run / "weights" / "last" / f"{part}.safetensors") for run in ("whole", "killed"))
        assert whole.keys() == resumed.keys() and all(torch.equal(value, resumed[key]) for key, value in whole.items())
    manifest = json.loads((folder / "encoder.json").read_text())
    assert manifest["clip"]["frames"] == 8 and manifest["clip"]["fps"] in (12.5, 20)


def test_what_does_not_fit__is_refused_before_anything_is_written(cine_archive: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    given = [f"data.index={cine_archive}", *QUIET, f"out={out}"]
    for changes, error, text in (
        (["views.frames=7"], RecipeError, r"patch \(2, 8, 8\) does not divide views.size \(7, 32, 32\)"),
        (
            ["views={kind: image, size: 32}"],
            RequestError,
            "cluster_distillation needs one kind of views that are clips; found none",
        ),
        (
            ["encoder={name: image2d}"],
            RecipeError,
            "cannot work on encoder image2d .it needs takes_clips.; encoders that fit: video_vit",
        ),
    ):
        with pytest.raises(error, match=text):
            api.pretrain(recipe("cluster_distillation"), [*given, *changes])
    with pytest.raises(RequestError, match=r"views bring 1; set views.count: 3 and sampler.speeds: .1, 2."):
        api.pretrain(recipe("relative_speed"), [*given, "views.count=1"])
    assert not out.exists()


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with echo phantoms of eight patients, their index, and a finished run on those of the training side."""
    root = tmp_path_factory.mktemp("echo")
    cohort = make_echo_cohort(root / "cohort", patients=8, size=(64, 64), seconds=0.4, dicom_fraction=1, seed=4)
    rows = rows_of(cohort / "split.csv")
    trained = {row["file"] for row in rows[:2]}
    with (root / "split.csv").open("w", newline="") as stream:
        table = csv.DictWriter(stream, fieldnames=["file", "split", "ef", "wall_motion"], extrasaction="ignore")
        table.writeheader()
        table.writerows({**row, "split": "train" if row["file"] in trained else "test"} for row in rows)
    (root / "id.key").write_text("phantoms have no patients to protect\n")
    (root / "id.key").chmod(0o600)
    done = index([cohort / "images"], root / "index", splits=root / "split.csv", key_file=root / "id.key")
    assert done.n_series == 8
    changes = [f"data.index={root / 'index'}", *QUIET, "train.steps=2", "views.mask={ratio: 0.7, patch: 8}", f"out={root / 'run'}"]
    assert api.pretrain(recipe("cluster_distillation"), changes).status == "finished"
    return root


def evaluate_recipe(echo: Path, *changes: str) -> Any:
    given = [f"source.index={echo / 'index'}", f"table={echo / 'split.csv'}", "target=ef", "k=[3]", f"out={echo / 'evaluate'}"]
    return Recipe.load(recipe_folder() / "evaluate" / "regression_ultrasound.yaml", [*given, *changes])


def test_evaluate__takes_kind_frames_and_rate_from_the_weights(echo: Path) -> None:
    manifest = json.loads((echo / "run" / "weights" / "last" / "encoder.json").read_text())

    def views(*changes: str) -> dict[str, Any]:
        return dict(evaluation_section(evaluate_recipe(echo, *changes), manifest).views)

    shown = {"kind": "clip", "size": [32, 32], "normalize": "zscore", "channels": "mean"}
    assert views() == {**shown, "frames": 8, "fps": 12.5}
    assert views("source.views={kind: clip, fps: 25}") == {**shown, "frames": 8, "fps": 25}
    assert views("source.views={kind: clip, frames: 4}") == {**shown, "frames": 4, "fps": 12.5}
    assert views("source.views={kind: clip, clip_seconds: 0.5}") == {**shown, "clip_seconds": 0.5, "fps": 12.5}
    assert views("source.views={kind: clip, clip_seconds: 0.5, frames: 4}") == {**shown, "clip_seconds": 0.5, "frames": 4}
    assert views("source.views={kind: image}") == {"kind": "image", "size": [32, 32], "normalize": "zscore"}
    colour = {**manifest, "encoder": {**manifest["encoder"], "args": {**manifest["encoder"]["args"], "in_channels": 3}}}
    assert evaluation_section(evaluate_recipe(echo), colour).views["channels"] == "keep"
    other = {**manifest, "encoder": {"name": "image2d", "args": {}}}
    with pytest.raises(RequestError, match="encoder image2d, which takes no clips; choose kind: image or stack"):
        evaluation_section(evaluate_recipe(echo, "source.views={kind: clip}"), other)


def test_evaluate__clips_of_other_patients_beside_the_controls(echo: Path) -> None:
    done = api.evaluate(evaluate_recipe(echo), echo / "run")
    assert done["readout"] == "motion"
    assert done["leakage_check"] == "no patient of this evaluation was pretrained on"
    assert {row["name"] for row in done["rows"]} == {"encoder", "random_init", "raw_pixels", "intensity_statistics"}
    assert {(row["n_images"], row["n_patients"], row["by"]) for row in done["rows"]} == {(6, 6, "by patient")}
    with np.load(echo / "evaluate" / "figures" / "regression.npz") as found:
        pairs = read_regression(found)
    assert not isinstance(pairs, str)
    truth = {float(row["ef"]) for row in rows_of(echo / "split.csv") if row["split"] == "test"}
    assert set(pairs[0].tolist()) == truth
    linear = next(r for r in done["rows"] if (r["name"], r["probe"], r["metric"]) == ("encoder", "linear", "r2"))
    assert r2(np.stack(pairs, axis=1)) == pytest.approx(linear["value"])
    pooled = api.evaluate(evaluate_recipe(echo, "readout=pooled", f"out={echo / 'pooled'}"), echo / "run")
    pairs_of_rows = [(a["name"], a["value"] == b["value"]) for a, b in zip(done["rows"], pooled["rows"], strict=True)]
    assert all(same == (name in ("raw_pixels", "intensity_statistics")) for name, same in pairs_of_rows)
    with pytest.raises(RequestError, match="readout: motion reads changes over time off clips"):
        api.evaluate(evaluate_recipe(echo, "source.views={kind: image}", f"out={echo / 'refused'}"), echo / "run")
    assert not (echo / "refused").exists()
    with pytest.raises(RequestError, match="patients that the weights were pretrained on"):
        api.evaluate(evaluate_recipe(echo, "source.where=split = 'train'"), echo / "run")


def test_run__leaves_clips_with_prototypes_for_the_report(echo: Path) -> None:
    with np.load(echo / "run" / "figures" / "clips.npz") as found:
        clips = read_clips(found)
    assert not isinstance(clips, str) and len(clips) == 3
    for clip in clips:
        assert clip.frames.shape == (8, 32, 32) and clip.hidden is not None and clip.hidden.shape == (4, 4) and clip.hidden.any()
        assert set(clip.prototypes) == {"video", "frame"} and (np.diff(clip.time_s) > 0).all()
        for found in clip.prototypes.values():
            assert found.shape == (8, 4, 4) and np.array_equal(found[0::2], found[1::2]) and (found >= 0).any()
            sector = clip.sector.reshape(4, 8, 4, 8).any(axis=(1, 3))
            assert (found[:, ~sector] == -1).all()
    left = collect(echo, with_images=True)
    assert len(left.clips) == 3 and not left.faults
