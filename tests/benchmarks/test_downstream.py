"""The benchmarks of fine-tuning and of exports, at toy size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import export_loading, finetune_step, network_rows
from medssl.archive.index import index
from medssl.export.write import EXPORTS
from medssl.recipe import Recipe
from tests.benchmarks.test_benchmarks import play
from tests.evaluation.tiny_cohort import write_cohort


def test_finetune_step__same_labels_from_both_loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"name": "segresnet3d", "args": {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]}}
    monkeypatch.setitem(finetune_step.NETWORKS, "segresnet", ("segresnet", tiny, {}))
    sizes = ["--networks", "segresnet", "--crop", "16", "--size", "28", "30", "32", "--threads", "1"]
    found = play(finetune_step.main, sizes, tmp_path)
    assert [row["what"] for row in found["rows"]] == ["step", "step", "inference", "inference"]
    (same,) = [check for check in found["checks"] if "same label" in check["what"]]
    assert same["value"] >= 0.999  # both loops segment alike, so their speeds are comparable


@pytest.mark.slow
def test_export_loading__times_the_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(export_loading.ENCODERS) == set(EXPORTS)
    toys: dict[str, dict[str, Any]] = {
        "timm": {"name": "image2d", "args": {"model": "resnet18"}},
        "unetr": {"name": "vit3d", "args": {"image_size": [32, 32, 32], "hidden_size": 48, "num_heads": 4}},
    }
    for form, description in toys.items():
        monkeypatch.setitem(export_loading.ENCODERS, form, description)
    found = play(export_loading.main, ["--forms", *toys], tmp_path)
    assert [row["form"] for row in found["rows"]] == list(toys) and all(row["load_s"] > 0 for row in found["rows"])
    assert all(check["met"] for check in found["checks"])


def test_network_rows__keep_what_the_folder_lacks_and_name_recipes_that_parse(tmp_path: Path) -> None:
    before = tmp_path / "network_rows.json"
    before.write_text(json.dumps({"networks": {"swin_unetr": {"when": "then"}, "unknown": {}}}))
    assert network_rows.collect(tmp_path / "none", before)["networks"] == {"swin_unetr": {"when": "then"}}
    for name in network_rows.NETWORKS:
        recipe = Recipe.parse(network_rows.pretraining(name, Path("archive"), Path("matcher"), Path("out"), 3))
        assert (recipe.sources["main"].views.get("kind") == "pair") == (name == "swin_unetr_alice")


@pytest.mark.slow
def test_network_rows__go_on_where_they_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_cohort(tmp_path / "cohort", train=3, val=1, test=2)
    index([folder / "images"], tmp_path / "archive", modality="MR", splits=folder / "split.csv")
    tiny = {"name": "segresnet3d", "init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]}
    monkeypatch.setitem(network_rows.NETWORKS, "pyramid", {"network": "pyramid", "encoder": tiny, "lr": 1e-3, "args": {"width": 8}})
    monkeypatch.setattr(network_rows, "CROP", [16, 16, 16])
    asked = [
        "--archive",
        str(tmp_path / "archive"),
        "--cohort",
        str(folder),
        "--folder",
        str(tmp_path / "rows"),
        "--out",
        str(tmp_path),
    ]
    asked += [
        "--networks",
        "pyramid",
        "--labels",
        "2",
        "--steps",
        "2",
        "--pretrain-steps",
        "2",
        "--pretrain",
        "train.checkpoint_every=1",
    ]
    asked += [
        "train.monitor_items=0",
        "data.card=null",
        "--finetune",
        "cohort.card=null",
        "settings.val_every=0",
    ]
    network_rows.main(asked)
    summary = json.loads((tmp_path / "network_rows.json").read_text())["networks"]["pyramid"]
    assert [row["arm"] for row in summary["rows"]] == ["pretrained", "scratch"] and summary["cells"]["done"] == 2
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").rglob("results.json")}
    network_rows.main(asked)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").rglob("results.json")}
