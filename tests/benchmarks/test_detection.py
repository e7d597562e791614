"""Benchmarks of detection at toy size: phantoms with the boxes they say, and runs that go on where they stopped and are collected."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import bccd_detection, detection_runs, phantom_lesions
from medssl.evaluation.volume_boxes import parts_of

BCCD = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "bccd"


def test_lesion_phantoms__have_the_boxes_they_say_and_distractors() -> None:
    counts = []
    for seed in range(12):
        image, label, boxes = phantom_lesions.lesion_phantom(seed)
        found = parts_of(label.astype(np.int16), [1])
        assert sorted(found.boxes.tolist()) == sorted(boxes.tolist())
        assert (boxes[:, 3:] - boxes[:, :3] >= 4).all() and (boxes[:, 3:] - boxes[:, :3] <= 10).all()
        assert (image[label == 0] > 130).sum() > 50  # what is bright and no lesion
        counts.append(len(boxes))
        again = phantom_lesions.lesion_phantom(seed)
        assert (again[0] == image).all()
    assert counts[::3] == [0] * 4 and max(counts) > 1


def test_lesion_volumes__are_those_of_the_folder_or_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    phantom_lesions.write_volumes(folder, unlabelled=2, train=2, test=1)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    phantom_lesions.write_volumes(folder, unlabelled=2, train=2, test=1)
    for other in ("3 2 1", "2 1 1", "2 2 2"):
        with pytest.raises(
            SystemExit, match=rf"holds 2 2 1 volumes .*--volumes asks for {other};.*give --volumes 2 2 1, or another"
        ):
            phantom_lesions.main(["--folder", str(folder), "--volumes", *other.split()])
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_phantom_lesions__go_on_and_are_collected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    few = [
        "--folder",
        str(folder),
        "--volumes",
        "4",
        "6",
        "4",
        "--labels",
        "4",
        "--seeds",
        "0",
        "--pretrain-steps",
        "2",
        "--steps",
        "2",
    ]
    small = ["--pretrain", "train.batch=2", "--detection", "settings.batch=1"]
    phantom_lesions.main([*few, *small])
    assert "| 4 | pretrained - scratch" in capsys.readouterr().out
    phantom_lesions.main([*few, *small])
    phantom_lesions.main(["--folder", str(folder), "--collect", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "phantom_lesions.json").read_text())
    assert {cell["arm"] for cell in content["cells"]} == {"pretrained", "scratch"} and "cases" not in content["cells"][0]
    assert {row["metric"] for row in content["cells"][0]["rows"]} >= {"map_10_50", "froc"}
    detection_runs.main([str(folder / "detection"), "--run", str(folder / "pretrain"), "--name", "again", "--out", str(tmp_path)])
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["summary"] == content["summary"] and again["pretraining"] == content["pretraining"]


@pytest.mark.slow
@pytest.mark.skipif(not BCCD.is_dir(), reason="shared data are not here")
def test_bccd_detection__goes_on_and_is_collected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    few = [
        "--data",
        str(BCCD),
        "--folder",
        str(folder),
        "--labels",
        "10",
        "--seeds",
        "0",
        "--pretrain-steps",
        "2",
        "--pretrain-batch",
        "4",
    ]
    small = ["--detection", "settings.steps=2", "settings.warmup_steps=1", "settings.batch=2", "source.views.size=[96, 128]"]
    bccd_detection.main([*few, *small])
    assert "| 10 | pretrained - scratch" in capsys.readouterr().out
    bccd_detection.main(["--folder", str(folder), "--collect", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "bccd_detection.json").read_text())
    assert len(content["cells"]) == 2 and content["summary"]["rows"][0]["n_test"] == 60
    assert content["summary"]["shared"]["boxes"]["dropped_empty"] == 1
