"""The whole road through the command line at toy size, on NIfTI and DICOM phantoms, and what it must never leave behind."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from medssl.cli import main as cli
from medssl.phantoms.cohort import make_cohort
from medssl.recipe import recipe_folder

SMOKE = recipe_folder() / "smoke"


def medssl(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        cli.main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return int(left.value.code or 0), captured.out, captured.err


@pytest.mark.slow
def test_road__from_files_to_a_monai_network_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cohort = make_cohort(tmp_path / "cohort", patients=16, seed=1, size=(40, 36, 32))
    archive, run = tmp_path / "archive", tmp_path / "run"
    said = ""

    def step(*args: object) -> str:
        nonlocal said
        status, out, err = medssl(capsys, *args)
        assert status == 0, err
        said += out + err
        return out

    out = step("index", cohort / "images", "--splits", cohort / "split.csv", "--modality", "MR", "--out", archive, "--json")
    assert json.loads(out)["n_series"] == 16
    step("cache", SMOKE / "mae_cnn_segresnet3d_mri.yaml", f"data.index={archive}")
    probe = [
        f"probes.liver.table={cohort / 'split.csv'}",
        "probes.liver.target=liver_ml",
        "probes.liver.where=split in ('val', 'test')",
    ]
    changes = [f"data.index={archive}", f"out={run}", "train.steps=12", "probes.liver.every=6", "views.size=[32, 32, 32]", *probe]
    step("pretrain", SMOKE / "mae_cnn_segresnet3d_mri.yaml", *changes)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = {key for line in lines for key in line}
    assert {"loss", "grad_norm", "data_wait", "monitor/feature_std", "monitor/effective_rank", "monitor/alignment"} <= logged
    assert {"probe/liver/linear_r2", "probe/liver/knn5_r2"} <= logged
    evaluate = recipe_folder() / "evaluate" / "regression_mri.yaml"
    request = [
        f"source.index={archive}",
        f"table={cohort / 'split.csv'}",
        "target=liver_ml",
        "k=[3]",
        f"out={tmp_path / 'evaluate'}",
    ]
    out = step("evaluate", evaluate, *request, "--weights", run, "--json")
    assert json.loads(out)["leakage_check"] == "no patient of this evaluation was pretrained on"
    assert {row["name"] for row in json.loads(out)["rows"]} == {"encoder", "random_init", "raw_pixels", "intensity_statistics"}
    status, _, err = medssl(capsys, "evaluate", evaluate, *request, "source.where=split = 'train'", "--weights", run)
    assert status == 2
    assert "patients that the weights were pretrained on" in err
    tune = recipe_folder() / "demo" / "finetune.yaml"
    settings = [
        "settings.steps=6",
        "settings.warmup_steps=2",
        "settings.val_every=0",
        "settings.crop=[32, 32, 32]",
        "settings.spacing_mm=[4, 4, 4]",
    ]
    out = step(
        "finetune",
        tune,
        f"cohort.path={cohort}",
        f"out={tmp_path / 'finetune'}",
        *settings,
        "labels=2",
        "--weights",
        run,
        "--twin",
        "--json",
    )
    assert {row["arm"] for row in json.loads(out)["rows"]} == {"pretrained", "scratch"}
    assert len(json.loads(out)["differences"]) == 1
    shared = json.loads((tmp_path / "finetune" / "label_curve.json").read_text())
    assert shared["leakage_check"].startswith("no test image was pretrained on")
    for name in ("segresnet", "monai-bundle"):
        out = step("export", run, "--to", name, "--out", tmp_path / "export" / name, "--json")
        assert json.loads(out)["unexpected"] == []
    for folder in ("run", "evaluate", "finetune", "archive"):
        assert oct((tmp_path / folder).stat().st_mode)[-3:] == "700", folder
    page = Path(step("report", tmp_path, "--with-images", "--out", tmp_path / "report.html").strip().splitlines()[-1])
    html = page.read_text()
    assert html.count("<img") + html.count("<source") >= 4
    assert not re.search(r"""(?:src|href)=["']https?:""", html)
    assert_nobody_is_named(cohort, tmp_path, said, html)


def assert_nobody_is_named(cohort: Path, root: Path, said: str, html: str) -> None:
    """No patient id, file name or source path outside private/, in anything printed, or in the page."""
    with open(cohort / "split.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    names = [word for row in rows for word in (row["patient"], row["file"].split(".")[0])]
    assert len(names) == 32
    for name in names:
        assert name not in said
        assert name not in html
    searched = 0
    for path in root.rglob("*"):
        if path.is_file() and "cohort" not in path.parts and "private" not in path.parts:
            content = path.read_bytes()
            searched += 1
            for name in names:
                assert name.encode() not in content, path
    assert searched > 50


def test_leakage__a_test_image_in_pretraining_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cohort = make_cohort(tmp_path / "cohort", patients=6, seed=2, size=(32, 32, 32), dicom_fraction=0.4)
    archive, run = tmp_path / "archive", tmp_path / "run"
    assert medssl(capsys, "index", cohort / "images", "--modality", "MR", "--out", archive)[0] == 0  # no splits: everything is used
    recipe = SMOKE / "mae_cnn_segresnet3d_mri.yaml"
    assert medssl(capsys, "pretrain", recipe, f"data.index={archive}", f"out={run}", "train.steps=1")[0] == 0
    tune = recipe_folder() / "demo" / "finetune.yaml"
    status, _, err = medssl(
        capsys, "finetune", tune, f"cohort.path={cohort}", f"out={tmp_path / 'finetune'}", "labels=2", "--weights", run
    )
    assert status == 2
    assert "2 of 2 test images were used for pretraining" in err
    assert not (tmp_path / "finetune").exists()
