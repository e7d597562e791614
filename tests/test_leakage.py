"""Test images of a cohort against what weights were pretrained on: by content, and by patient where one index has both."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from medssl.archive.index import index
from medssl.archive.table import Archive
from medssl.errors import LeakageError
from medssl.leakage import refuse_pretraining_images
from medssl.sampling import items
from tests.synthetic import write_nifti

PATIENTS = {"a_first": "a", "a_second": "a", "b_first": "b", "c_first": "c"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder of weights that saw one series of patient a, and b's."""
    folder, archive, run = tmp_path / "images", tmp_path / "archive", tmp_path / "run"
    folder.mkdir()
    for number, name in enumerate(PATIENTS):
        write_nifti(
            folder / f"{name}.nii.gz", np.random.default_rng(number).normal(100, 20, (12, 12, 12)).astype(np.float32), np.eye(4)
        )
    table = tmp_path / "splits.csv"
    table.write_text("file,split,patient\n" + "".join(f"{name}.nii.gz,train,{who}\n" for name, who in PATIENTS.items()))
    index([folder], archive, modality="MR", splits=table)
    rows = {
        Path(opened.files(row.series_id)[0]).name.split(".")[0]: row
        for opened in [Archive.open(archive)]
        for row in opened.select()
    }
    assert len({row.patient_id for row in rows.values()}) == 3
    used = [rows["a_first"], rows["b_first"]]
    (run / "weights").mkdir(parents=True)
    items.write(items.freeze([("main", "card", row.series_id, row.patient_id, row.split) for row in used]), run / "items.parquet")
    recipe: dict[str, Any] = {
        "kind": "pretrain",
        "data": {"index": str(archive), "where": "true", "domain": "mri"},
        "views": {"size": [8, 8, 8], "normalize": "zscore", "mask": {"ratio": 0.5, "cell": 4}},
        "encoder": {"name": "segresnet3d", "init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]},
        "objective": {"name": "mae_cnn"},
        "train": {"steps": 1, "batch": 1},
        "out": str(run),
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return run


def cohort_of(run: Path, *names: str) -> Any:
    images = run.parent / "images"
    return SimpleNamespace(cases=[SimpleNamespace(split="test", label=None, image_files=[images / f"{n}.nii.gz"]) for n in names])


@pytest.fixture(autouse=True)
def in_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medssl.leakage.run_of", Path)


def test_test_image__used_for_pretraining_is_refused(run: Path) -> None:
    with pytest.raises(LeakageError, match="1 of 2 test images were used for pretraining"):
        refuse_pretraining_images(run, cohort_of(run, "b_first", "c_first"))


def test_other_image_of_a_pretraining_patient__is_refused(run: Path) -> None:
    with pytest.raises(LeakageError, match="1 of 2 test images are of patients that the weights were pretrained on"):
        refuse_pretraining_images(run, cohort_of(run, "a_second", "c_first"))


def test_others__pass_and_the_result_says_what_was_checked(run: Path) -> None:
    assert refuse_pretraining_images(run, cohort_of(run, "c_first")).startswith("no test image was pretrained on")


def test_index_or_run_away__is_said(run: Path, tmp_path: Path) -> None:
    (tmp_path / "archive").rename(tmp_path / "elsewhere")
    assert refuse_pretraining_images(run, cohort_of(run, "a_first")).startswith("not checked for 1 of the sources")
    assert refuse_pretraining_images(tmp_path / "exported", cohort_of(run, "a_first")).startswith(
        "not checked: the weights lie outside"
    )
