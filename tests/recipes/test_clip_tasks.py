"""`medssl evaluate` on clips: phase, segmentation and anomaly of rings that beat, from an index, a table and label files."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from medssl import api
from medssl.cli.main import app
from medssl.clip_tasks import labelled_steps, steps_of
from medssl.domains.label_files.frames import find_frame_labels, read_frame_labels
from medssl.errors import LeakageError, RecipeError, RequestError
from medssl.recipe import recipe_folder
from medssl.sampling.clips import PickedFrames, pick_frames

FRAMES, SIZE = 40, (96, 128)
FEATURES = {"encoder", "random_init", "raw_pixels"}


def period(number: int) -> int:
    """Frames per beat of ring `number` of the archive: it is widest a quarter of it after a start."""
    return 14 + 2 * number


def marks(number: int, share: float) -> list[int]:
    return [round(period(number) * (beat + share)) for beat in range(3) if round(period(number) * (beat + share)) < FRAMES]


def drawn(number: int) -> np.ndarray:
    """The disc inside ring `number` as 3, and a square beside it as 5, (T, H, W)."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    radius = 16 + (3 + number) * np.sin(2 * np.pi * np.arange(FRAMES) / period(number))
    labels = np.where(np.hypot(y - 44, x - 64)[None] < radius[:, None, None], 3, 0)
    labels[:, 60:70, 60:70] = 5
    return labels.astype(np.uint8)


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    with path.open("w", newline="") as stream:
        table = csv.DictWriter(stream, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return path


@pytest.fixture(scope="module")
def rings(cine_archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of one step, outside their run folder; a table; labels as arrays, NIfTI and pictures."""
    root = tmp_path_factory.mktemp("rings")
    recipe = recipe_folder() / "smoke" / "video_mae_video_vit_ultrasound.yaml"
    quiet = ["train.steps=1", "train.monitor_items=0", "train.tensorboard=false"]
    assert api.pretrain(recipe, [f"data.index={cine_archive}", *quiet, f"out={root / 'run'}"]).status == "finished"
    shutil.copytree(root / "run" / "weights" / "last", root / "weights")
    labels = root / "labels"
    labels.mkdir()
    rows = []
    for number in range(6):
        name = f"ring{number}"
        if number < 2:
            nibabel.save(nibabel.Nifti1Image(drawn(number).transpose(), np.eye(4)), labels / f"{name}.nii.gz")  # type: ignore[attr-defined, no-untyped-call]
        elif number < 4:
            np.savez_compressed(labels / f"{name}.npz", labels=drawn(number))
        else:
            (labels / name).mkdir()
            for frame in range(0, FRAMES, 2):
                Image.fromarray(drawn(number)[frame]).save(labels / name / f"ring_{frame:03d}.png")
        given = {"ed_frames": " ".join(map(str, marks(number, 0.25))), "es_frames": ", ".join(map(str, marks(number, 0.75)))}
        rows.append({"file": f"{number}.dcm", "label": name, "finding": "normal" if number < 4 else "wide", **given})
    write_table(root / "labels.csv", rows)
    return root


def evaluate(rings: Path, archive: Path, task: str, *changes: str, out: str = "evaluate") -> dict[str, Any]:
    given = [
        f"source.index={archive}",
        "source.where=series_id is not null",
        f"table={rings / 'labels.csv'}",
        f"out={rings / out}",
        *changes,
    ]
    return api.evaluate(recipe_folder() / "evaluate" / f"{task}_ultrasound.yaml", rings / "weights" / "encoder.safetensors", given)


def by_metric(done: Mapping[str, Any], name: str) -> dict[str, float]:
    return {row["metric"]: row["value"] for row in done["rows"] if row["name"] == name}


def test_phase__errors_in_frames_and_ms_beside_the_controls(rings: Path, cine_archive: Path) -> None:
    done = evaluate(rings, cine_archive, "phase", "source.views={kind: clip, frames: 24, fps: 25}", "folds=3")
    assert done == json.loads((rings / "evaluate" / "evaluate.json").read_text())
    assert {row["name"] for row in done["rows"]} == FEATURES and done["task"] == "phase"
    assert done["leakage_check"].startswith("not checked") and done["clips"] == {"marked": 6, "used": 6}
    assert done["step_ms"] == pytest.approx(80)
    found = by_metric(done, "raw_pixels")
    assert found["es_ms"] == pytest.approx(80 * found["es_frames"]) and found["es_frames"] < found["es_frames_chance"]
    assert {row["n_patients"] for row in done["rows"]} == {6}


def test_phase__marks_in_ms_are_those_in_frames(rings: Path, cine_archive: Path) -> None:
    with (rings / "labels.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        for column in ("ed_frames", "es_frames"):
            row[column] = " ".join(str(40 * int(n) + 9) for n in row[column].replace(",", "").split())
    table = write_table(rings / "ms.csv", rows)
    views = "source.views={kind: clip, frames: 24, fps: 25}"
    in_frames = evaluate(rings, cine_archive, "phase", views, "folds=3")
    in_ms = evaluate(rings, cine_archive, "phase", views, "folds=3", "unit=ms", f"table={table}")
    assert in_frames["rows"] == in_ms["rows"]


def test_segmentation__of_every_form_of_label_files(rings: Path, cine_archive: Path) -> None:
    given = [f"labels={rings / 'labels'}", "structures={disc: 3, square: 5}", "head={steps: 60, folds: 2}", "frames=3"]
    done = evaluate(rings, cine_archive, "segmentation", *given)
    assert {row["name"] for row in done["rows"]} == FEATURES and done["target"] == "disc, square"
    assert {row["metric"] for row in done["rows"]} == {"dice_disc", "dice_square"} and done["frames"] == 18
    assert by_metric(done, "raw_pixels")["dice_disc"] > 0.6
    once = evaluate(rings, cine_archive, "segmentation", *given, "frames=1", "structures={disc: 3}")
    assert once["frames"] == 6 and {row["metric"] for row in once["rows"]} == {"dice_disc"}


def test_anomaly__by_distance_to_normal_clips(rings: Path, cine_archive: Path) -> None:
    done = evaluate(rings, cine_archive, "anomaly", "target=finding", "k=[1, 2]")
    assert {row["probe"] for row in done["rows"]} == {"anomaly_knn1", "anomaly_knn2"}
    assert {row["name"] for row in done["rows"]} == FEATURES | {"intensity_statistics"}
    assert {row["metric"] for row in done["rows"]} == {"auroc"} and done["clips"] == {"normal": 4, "other": 2}


@pytest.mark.parametrize(
    ("task", "changes", "text"),
    [
        ("phase", ["ed=finding"], "6 of 6 cells hold no frame numbers from 0"),
        ("phase", ["ed=nothing"], "has no column nothing"),
        ("phase", ["unit=ms", "es=file"], "no times in ms from the first frame .*set unit: frames"),
        ("phase", ["ed=late"], "1 of 6 cells hold frame numbers from 0 that the cine does not have"),
        ("phase", ["ed=late", "unit=ms", "es=late"], "none shows one of each"),
        ("segmentation", ["labels={root}/nowhere"], "labels: no such folder"),
        ("segmentation", ["labels={root}/labels", "target=file"], "6 of 6 label files cannot be used. 6 clips: no such file"),
        ("segmentation", ["labels={root}/labels", "target=up"], "6 clips: no such file"),
        ("segmentation", ["labels={root}/labels", "target=bad"], "5 clips: damaged, or not what its ending says"),
        ("segmentation", ["labels={root}/labels", "structures={wall: 9}"], r"wall is in none of 6 label files, which hold .0, 3, 5."),
        ("anomaly", ["target=finding", "normal=[fine]"], "no labelled clip has the value fine in column finding"),
        ("anomaly", ["target=finding", "normal=[normal, wide]"], "all 6 labelled clips are normal"),
        ("anomaly", ["target=finding", "k=[0]"], "k is 0; accepted: 1 or more"),
        ("phase", ["table={root}/nowhere.csv"], "no such table"),
        ("phase", ["source.views={kind: image}"], "asked of clips, and the weights are of encoder video_vit, shown images"),
    ],
)  # fmt: skip
def test_bad_input__is_refused_before_anything_is_written(
    rings: Path, cine_archive: Path, task: str, changes: list[str], text: str
) -> None:
    with (rings / "labels.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    np.savez(rings / "labels" / "small.npz", labels=np.zeros((FRAMES, 5, 5), np.uint8))
    (rings / "labels" / "broken.nii.gz").write_bytes(b"no gzip")
    for number, row in enumerate(rows):
        row |= {"late": "99" if number == 5 else "0", "up": "../labels.csv", "bad": "broken" if number else "small"}
    table = write_table(rings / "bad.csv", rows)
    given = [f"table={table}", *(change.replace("{root}", str(rings)) for change in changes)]
    given += ["target=finding"] * (task == "anomaly" and not any(c.startswith("target") for c in changes))
    if task == "segmentation" and not any(c.startswith("structures") for c in changes):
        given.append("structures={disc: 3}")
    with pytest.raises(RequestError, match=text):
        evaluate(rings, cine_archive, task, *given, out="refused")
    assert not (rings / "refused").exists()


def test_recipes__say_what_is_wrong(rings: Path, cine_archive: Path) -> None:
    with pytest.raises(RecipeError, match=r"task: .*further tasks: phase, segmentation, anomaly"):
        evaluate(rings, cine_archive, "phase", "task=phse", "target=ef")
    given = [f"labels={rings / 'labels'}", "head={stesp: 3}", "structures={a: 1, b: 1, c: 0}"]
    with pytest.raises(RecipeError, match=r"head.stesp: unknown key .did you mean") as caught:
        evaluate(rings, cine_archive, "segmentation", *given)
    assert "structures.c: 0; accepted: 1 or more" in str(caught.value) and "two names share a value" in str(caught.value)
    with pytest.raises(RecipeError, match="structurs: unknown key"):
        evaluate(rings, cine_archive, "segmentation", *given[:1], "structurs={a: 1}")


def test_patients_of_the_pretraining__are_refused(rings: Path, cine_archive: Path) -> None:
    recipe = recipe_folder() / "evaluate" / "anomaly_ultrasound.yaml"
    given = [
        f"source.index={cine_archive}",
        "source.where=series_id is not null",
        f"table={rings / 'labels.csv'}",
        "target=finding",
    ]
    with pytest.raises(LeakageError, match="6 of 6 selected series belong to patients"):
        api.evaluate(recipe, rings / "run", [*given, f"out={rings / 'refused'}"])
    assert not (rings / "refused").exists()


def test_command__prints_the_table(rings: Path, cine_archive: Path) -> None:
    recipe = recipe_folder() / "evaluate" / "anomaly_ultrasound.yaml"
    given = [
        f"source.index={cine_archive}",
        "source.where=series_id is not null",
        f"table={rings / 'labels.csv'}",
        "target=finding",
    ]
    weights = ["--weights", str(rings / "weights" / "encoder.safetensors")]
    result = CliRunner().invoke(app, ["evaluate", str(recipe), *weights, *given, "k=[1]", f"out={rings / 'printed'}"])
    assert result.exit_code == 0 and "auroc" in result.stdout and "random_init" in result.stdout


def test_steps_of__nearest_shown_frame_and_nothing_beyond() -> None:
    times = np.arange(40) * 40.0
    picked = pick_frames(times, 12.5, 8, start_ms=400)
    assert picked.frames.tolist() == [10, 12, 14, 16, 18, 20, 22, 24]
    assert steps_of([9, 13, 18, 19, 24, 26], picked, times, 2) == [0, 2, 3]
    assert steps_of([8, 26], picked, times, 2) == []
    assert steps_of([18], picked, times, 1) == [4]


def test_labelled_steps__first_labelled_frame_of_whole_steps() -> None:
    frames = np.array([10, 12, 14, 16, 18, 16, 14, 12])
    picked = PickedFrames(frames, np.array([True] * 5 + [False] * 3), np.arange(8) / 10)
    assert labelled_steps(np.array([12, 14, 16, 18]), picked, 2) == [(0, 1), (1, 2)]
    assert labelled_steps(np.array([11]), picked, 2) == []
    assert labelled_steps(np.array([18]), picked, 1) == [(4, 4)]


def test_frame_labels__forms_agree(tmp_path: Path) -> None:
    labels = drawn(2)[:6]
    labels[3] = 0
    shape = labels.shape
    nibabel.save(nibabel.Nifti1Image(labels.transpose(2, 1, 0)[:, :, None], np.eye(4)), tmp_path / "a.nii.gz")  # type: ignore[attr-defined, no-untyped-call]
    np.savez(tmp_path / "b.npz", labels=labels[[4, 1]], frames=np.array([4, 1]))
    (tmp_path / "c").mkdir()
    for frame in (1, 4):
        Image.fromarray(labels[frame]).save(tmp_path / "c" / f"v2_{frame}.png")
    whole = read_frame_labels(tmp_path / "a.nii.gz", shape)
    assert whole.frames.tolist() == list(range(6)) and np.array_equal(whole.read(), labels) and whole.values == {0, 3, 5}
    only = read_frame_labels(tmp_path / "a.nii.gz", shape, drawn=True)
    assert only.frames.tolist() == [0, 1, 2, 4, 5] and np.array_equal(only.read(), labels[[0, 1, 2, 4, 5]])
    for name in ("b.npz", "c"):
        some = read_frame_labels(tmp_path / name, shape)
        assert some.frames.tolist() == [1, 4] and np.array_equal(some.read(), labels[[1, 4]])
    assert find_frame_labels(tmp_path, "b") == tmp_path / "b.npz" and find_frame_labels(tmp_path, ".") is None
    assert find_frame_labels(tmp_path / "c", "../b.npz") is None


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"labels": np.zeros((5, 4, 4))}, "labels of 5 frames, the cine has 6"),
        ({"labels": np.zeros((2, 4, 4)), "frames": np.array([1, 6])}, "does not have"),
        ({"labels": np.zeros((2, 4, 4)), "frames": np.array([1, 1])}, "come twice"),
        ({"labels": np.zeros((2, 4, 4)), "frames": np.array([1])}, "2 labels and 1 frame numbers"),
        ({"labels": np.zeros((4, 4))}, "an array of 2 axes"),
        ({"labels": np.full((6, 4, 4), 0.5)}, "no whole numbers"),
        ({"masks": np.zeros((6, 4, 4))}, "damaged, or not what its ending says"),
        ({"labels": np.array([None])}, "damaged"),
    ],
)
def test_frame_labels__faults(tmp_path: Path, arrays: dict[str, np.ndarray], text: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=text):
        read_frame_labels(tmp_path / "a.npz", (6, 4, 4))


def test_frame_labels__of_unknown_form(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("1")
    (tmp_path / "b").mkdir()
    for name, text in (("a.txt", "of unknown form"), ("b", "no picture whose name")):
        with pytest.raises(RequestError, match=text):
            read_frame_labels(tmp_path / name, (6, 4, 4))
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "b" / "1.png")
    with pytest.raises(RequestError, match="pictures of mode RGB"):
        read_frame_labels(tmp_path / "b", (6, 4, 4))
