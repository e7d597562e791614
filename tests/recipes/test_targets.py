"""Fine-tuning for classes and numbers from an index and a table: cells that are kept, leakage, views that do not fit."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from medssl import api, target_tasks
from medssl.archive.operations.labels import attach
from medssl.archive.table import Archive
from medssl.cli.training import summary_table
from medssl.errors import LeakageError, MedsslError, RequestError
from medssl.finetune_cells import claim
from medssl.recipe import Recipe, recipe_folder
from medssl.target_tasks import TargetRoad
from tests.cli.test_bad_input import medssl

SHORT = [
    "settings.steps=2",
    "settings.batch=2",
    "settings.warmup_steps=1",
    "settings.val_every=2",
    "settings.augment={noise_std: 0.1}",
]


@pytest.fixture(scope="module")
def house(phantom_archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table with both classes in every split, and weights of a short run on the training volumes."""
    root = tmp_path_factory.mktemp("targets")
    with (phantom_archive.parent / "cohort" / "split.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    seen: dict[str, int] = {}
    with (root / "labels.csv").open("w", newline="") as stream:
        table = csv.DictWriter(stream, fieldnames=["file", "liver_ml", "finding"])
        table.writeheader()
        for row in rows:
            place = seen[row["split"]] = seen.get(row["split"], 0) + 1
            table.writerow({"file": row["file"], "liver_ml": row["liver_ml"], "finding": ("absent", "present")[place % 2]})
    quiet = ["train.monitor_items=0", "train.tensorboard=false", "train.steps=2"]
    smoke = recipe_folder() / "smoke" / "mae_cnn_segresnet3d_mri.yaml"
    assert api.pretrain(smoke, [f"data.index={phantom_archive}", f"out={root / 'run'}", *quiet]).status == "finished"
    return root


def load(house: Path, archive: Path, *changes: str) -> Any:
    given = [f"source.index={archive}", f"table={house / 'labels.csv'}", "target=finding", f"out={house / 'out'}", *SHORT]
    return Recipe.load(recipe_folder() / "finetune" / "classification_mri.yaml", [*given, *changes])


def test_classes__pretrained_beside_scratch_and_finished_cells_are_kept(
    house: Path, phantom_archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load(house, phantom_archive)
    summary = api.label_curve(recipe, house / "run", counts=[4], seeds=[0, 1])
    assert [(row["labels"], row["arm"]) for row in summary["rows"]] == [(4, "pretrained"), (4, "scratch")]
    assert all(row["metric"] == "auroc" and len(row["seeds"]) == 2 and 0 <= row["value"] <= 1 for row in summary["rows"])
    assert [(row["labels"], row["arm"]) for row in summary["differences"]] == [(4, "pretrained")]
    assert summary["shared"]["leakage_check"] == "no patient of this evaluation was pretrained on"
    assert summary["shared"]["views"]["size"] == [32, 32, 16] and summary["shared"]["forced"] == []
    table = (house / "out" / "table.md").read_text()
    assert "| 4 | pretrained | " in table and "| 4 | pretrained - scratch " in table
    cells = house / "out" / "cells"
    content = json.loads((cells / "pretrained_n4_s0" / "results.json").read_text())
    assert {"sex", "vendor", "site"} <= set(content["cases"][0]["facts"]) and content["training_range"]["n"] == 4
    assert content["classes"] == ["class_1", "class_2"] and len(content["cases"]) == summary["rows"][0]["n_test"]
    kept = house / "out" / "private" / "classes.csv"
    assert kept.read_text().split() == ["class,value", "class_1,absent", "class_2,present"] and kept.stat().st_mode & 0o777 == 0o600
    public = [path for path in (house / "out").rglob("*") if path.is_file() and path != kept]
    assert not [path for path in public if b"absent" in path.read_bytes() or b'present"' in path.read_bytes()]
    weights = load_file(cells / "pretrained_n4_s0" / "network.safetensors")
    assert {key.split(".")[0] for key in weights} == {"encoder", "head"}
    trained = load_file(house / "run" / "weights" / "last" / "encoder.safetensors")
    own = {key.removeprefix("encoder.net."): value for key, value in weights.items()}
    moved = [key for key in trained if key in own and not torch.equal(own[key], trained[key])]
    assert moved
    monkeypatch.setattr(target_tasks, "finetune_targets", None)
    assert api.label_curve(recipe, house / "run", counts=[4], seeds=[0, 1])["rows"] == summary["rows"]
    with pytest.raises(RequestError, match="cells computed with other settings; cells of one folder share"):
        api.label_curve(load(house, phantom_archive, "settings.lr=0.1"), house / "run", counts=[4], seeds=[0])


def test_attached_labels__are_learnt_from(house: Path, phantom_archive: Path) -> None:
    archive = Archive.open(phantom_archive)
    attach(archive, house / "labels.csv", house / "attached.csv", by="path", columns=["finding"])
    given = [f"table={house / 'attached.csv'}", "file_column=series_id", f"out={house / 'attached'}"]
    roads = [
        TargetRoad(recipe, recipe.source, None) for recipe in (load(house, phantom_archive), load(house, phantom_archive, *given))
    ]
    assert roads[0].series == roads[1].series and (roads[0].cases.targets == roads[1].cases.targets).all()


def finish_a_cell(out: Path) -> None:
    (out / "cells" / "scratch_n1_s0").mkdir(parents=True)
    (out / "cells" / "scratch_n1_s0" / "results.json").write_text("{}")


def test_folder_without_a_finished_cell__takes_corrected_settings(house: Path, phantom_archive: Path) -> None:
    out = f"out={house / 'corrected'}"
    with pytest.raises(RequestError, match="class_weights: 3 numbers for 2 classes; give one per class"):
        api.finetune(load(house, phantom_archive, "settings.class_weights=[1, 2, 3]", out), house / "run")
    assert not (house / "corrected").exists()
    road = TargetRoad(recipe := load(house, phantom_archive, out), recipe.source, None)
    claim(house / "corrected", {"weights": {"scratch": None}, **road.facts(), "settings": {"lr": 1}})
    (house / "corrected" / "cells" / "scratch_n1_s0").mkdir(parents=True)  # cut short
    claim(house / "corrected", {"weights": {"pretrained": "b"}, **road.facts()})
    kept = json.loads((house / "corrected" / "target_curve.json").read_text())
    assert kept["settings"] == road.facts()["settings"] and kept["weights"] == {"pretrained": "b"}


def test_another_sampler__is_another_folder(house: Path, phantom_archive: Path) -> None:
    samplers = [f"source.sampler={name}" for name in ("crops", "pairs")]
    recipes = [load(house, phantom_archive, f"out={house / 'sampled'}", sampler) for sampler in samplers]
    road = [TargetRoad(recipe, recipe.source, None) for recipe in recipes]
    claim(house / "sampled", {"weights": {}, **road[0].facts()})
    finish_a_cell(house / "sampled")
    with pytest.raises(RequestError, match="cells computed with other sampler; cells of one folder share"):
        claim(house / "sampled", {"weights": {}, **road[1].facts()})
    record = house / "sampled" / "target_curve.json"
    old = {key: value for key, value in json.loads(record.read_text()).items() if key != "sampler"}
    record.write_text(json.dumps(old))  # of an earlier medssl, which did not say: the first that goes on says so
    claim(house / "sampled", {"weights": {}, **road[1].facts()})
    assert json.loads(record.read_text())["sampler"]["name"] == "pairs"
    with pytest.raises(RequestError, match="other sampler"):
        claim(house / "sampled", {"weights": {}, **road[0].facts()})


def test_classes_of_the_recipe__are_named_in_its_order(house: Path, phantom_archive: Path) -> None:
    out = house / "named"
    recipe = load(house, phantom_archive, "classes=[present, absent]", f"out={out}")
    shared = api.finetune(recipe, house / "run")["shared"]
    assert shared["classes"] == ["present", "absent"] and not (out / "private").exists()
    (cell,) = (out / "cells").iterdir()
    manifest = json.loads((cell / "network.json").read_text())
    assert manifest["head"]["classes"] == ["present", "absent"]
    first = json.loads((cell / "results.json").read_text())["cases"]
    turned = api.finetune(load(house, phantom_archive, "classes=[absent, present]", f"out={house / 'turned'}"), house / "run")
    assert turned["shared"]["classes"] == ["absent", "present"]
    (cell,) = (house / "turned" / "cells").iterdir()
    second = json.loads((cell / "results.json").read_text())["cases"]
    assert [1 - case["target"] for case in first] == [case["target"] for case in second]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("classes=[present, other]", r"column finding: \d+ of \d+ labelled cases have a value that classes does not list; list it"),
        ("classes=[no, yes]", "YAML reads yes, no, on and off as true and false; put class names in quotes"),
    ],
)
def test_classes_that_do_not_fit__are_refused(house: Path, phantom_archive: Path, given: str, message: str) -> None:
    with pytest.raises(MedsslError, match=message):
        api.finetune(load(house, phantom_archive, given, f"out={house / 'none'}"), house / "run")
    assert not (house / "none").exists()


def test_numbers__from_scratch_with_the_encoder_of_the_recipe(house: Path, phantom_archive: Path) -> None:
    encoder = "encoder={name: segresnet3d, init_filters: 8, blocks_down: [1, 1, 1], blocks_up: [1, 1]}"
    views = "source.views={size: [32, 32, 16], spacing_mm: 4.0, normalize: zscore}"
    out = f"out={house / 'numbers'}"
    recipe = load(house, phantom_archive, "task=regression", "target=liver_ml", encoder, views, out, "settings.class_weights=none")
    summary = api.finetune(recipe, None)
    (row,) = summary["rows"]
    assert row["metric"] == "mae" and row["arm"] == "scratch" and np.isfinite(row["value"]) and summary["differences"] == []
    with pytest.raises(RequestError, match="the recipe must name an encoder"):
        api.finetune(load(house, phantom_archive, views, f"out={house / 'none'}"), None)
    with pytest.raises(RequestError, match=r"from scratch the recipe must say what the encoder sees: source\.views\.size"):
        api.finetune(load(house, phantom_archive, f"out={house / 'none'}"), None)


def test_other_views_than_those_of_the_weights__are_refused_unless_forced(
    house: Path, phantom_archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ("source.views={spacing_mm: 6.0, normalize: percentile}", f"out={house / 'forced'}")
    with pytest.raises(
        RequestError, match=r"^source\.views: .* zscore, the settings say percentile.* 4 x 4 x 4 mm, .* 6 x 6 x 6 mm"
    ):
        api.finetune(load(house, phantom_archive, *other), house / "run")
    assert not (house / "forced").exists()
    summary = api.finetune(load(house, phantom_archive, *other, "force=true"), house / "run", twin=True)
    forced = summary["shared"]["forced"]
    assert len(forced) == 2 and forced[0].startswith("the weights were pretrained with normalize zscore")
    cells = house / "forced" / "cells"
    said = {cell.name[:4]: json.loads((cell / "results.json").read_text())["forced"] for cell in cells.iterdir()}
    assert said == {"pret": forced, "scra": []}
    assert medssl(capsys, "report", house / "forced")[0] == 0
    texts = [(house / "forced" / name).read_text() for name in ("table.md", "report.html")]
    for text in (*texts, summary_table(summary)):
        assert text.count("Forced, images differ from those of the pretraining: ") == 2
    claim(house / "forced", {**summary["shared"], "weights": {"scratch": None}, "forced": []})  # the twin alone, later
    assert json.loads((house / "forced" / "target_curve.json").read_text())["forced"] == forced


def test_evaluation_of_other_views__is_refused_unless_forced(
    house: Path, phantom_archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = house / "evaluated"
    asked: list[Any] = ["evaluate", recipe_folder() / "evaluate" / "regression_mri.yaml", "--weights", house / "run"]
    asked += [f"source.index={phantom_archive}", f"table={house / 'labels.csv'}", "target=liver_ml", "k=[1]", f"out={out}"]
    status, _, stderr = medssl(capsys, *asked, "source.views={normalize: percentile, spacing_mm: 6}")
    assert status == 2 and "source.views: the weights were pretrained with normalize zscore" in stderr and "force: true" in stderr
    assert "pretrained at 4 x 4 x 4 mm, the settings ask for 6 x 6 x 6 mm" in stderr and not out.exists()
    status, _, stderr = medssl(capsys, *asked, "source.views={size: [32, 32, 15]}")
    assert status == 2 and "source.views.size: the patch" in stderr and not out.exists()
    other = house / "other_axes"
    shutil.copytree(house / "run" / "weights" / "last", other)
    manifest = json.loads((other / "encoder.json").read_text())
    (other / "encoder.json").write_text(json.dumps({**manifest, "axis_order": "ZYX-SAR"}))
    asked[3] = other / "encoder.safetensors"
    status, _, stderr = medssl(capsys, *asked)
    assert status == 2 and "axis order ZYX-SAR" in stderr and not out.exists()
    status, stdout, stderr = medssl(capsys, *asked, "force=true")
    line = "Forced, images differ from those of the pretraining: the weights are for images in axis order ZYX-SAR"
    assert status == 0 and line in stdout, stderr
    (said,) = json.loads((out / "evaluate.json").read_text())["forced"]
    assert "axis order ZYX-SAR" in said
    assert medssl(capsys, "report", out)[0] == 0 and (out / "report.html").read_text().count(line) == 1
    asked[3] = house / "run"
    assert medssl(capsys, *asked, "source.views={normalize: zscore, spacing_mm: [4, 4, 4]}")[0] == 0  # what they say themselves
    assert json.loads((out / "evaluate.json").read_text())["forced"] == []


def test_patients_of_pretraining__may_train_and_not_be_scored(house: Path, phantom_archive: Path, tmp_path: Path) -> None:
    quiet = [
        "train.monitor_items=0",
        "train.tensorboard=false",
        "train.steps=1",
        "data.where=split is not null",
        f"out={tmp_path / 'run'}",
    ]
    api.pretrain(recipe_folder() / "smoke" / "mae_cnn_segresnet3d_mri.yaml", [f"data.index={phantom_archive}", *quiet])
    with pytest.raises(LeakageError, match="belong to patients that the weights were pretrained on"):
        api.finetune(load(house, phantom_archive, f"out={tmp_path / 'out'}"), tmp_path / "run")
    assert not (tmp_path / "out").exists()


def test_column_missing__is_said_before_the_store_is_filled(
    house: Path, phantom_archive: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def filled(*_args: Any, **_words: Any) -> None:
        raise AssertionError("the store was filled first")

    monkeypatch.setattr("medssl.data_sources.fill_shelf", filled)
    asked = [f"table={house / 'labels.csv'}", "target=fnding", f"out={tmp_path / 'out'}"]
    probe = f"probes={{one: {{table: {house / 'labels.csv'}, target: fnding}}}}"
    smoke, evaluation = (recipe_folder() / name for name in ("smoke/mae_cnn_segresnet3d_mri.yaml", "demo/evaluate.yaml"))
    with pytest.raises(RequestError, match=r"labels\.csv has no column fnding; it has file, liver_ml, finding"):
        api.evaluate(evaluation, house / "run", [f"source.index={phantom_archive}", *asked])
    with pytest.raises(RequestError, match="has no column fnding"):
        api.pretrain(smoke, [f"data.index={phantom_archive}", probe, f"out={tmp_path / 'out'}"])
    with pytest.raises(RequestError, match="has no column fnding"):
        api.label_curve(load(house, phantom_archive, *asked), house / "run", counts=[4], seeds=[0])
    with pytest.raises(RequestError, match=r"no such table: nowhere\.csv; give a CSV with the columns file, finding"):
        api.label_curve(load(house, phantom_archive, "table=nowhere.csv"), house / "run", counts=[4], seeds=[0])
    assert not (tmp_path / "out").exists()
