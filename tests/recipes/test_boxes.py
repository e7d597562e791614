"""Fine-tuning for boxes as `medssl finetune` does it: pictures of an index, volumes of a cohort, kept cells, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from medssl import api, box_tasks, build, recipe_checks
from medssl.archive.index import index
from medssl.box_pictures import PictureBatches, in_view, listed_pictures, picture_source
from medssl.box_volumes import VolumeBatches, volume_source
from medssl.errors import RecipeError, RequestError
from medssl.evaluation import cell_summary
from medssl.evaluation.bootstrap import bootstrap_interval
from medssl.evaluation.boxes import read_boxes
from medssl.evaluation.cohort import Cohort
from medssl.evaluation.detection import box_iou
from medssl.evaluation.finetune_boxes import BoxSettings
from medssl.finetune_cells import section_of
from medssl.networks.detection import DetectorSettings, build_detector
from medssl.recipe import Recipe, recipe_folder
from medssl.weights import load_part, save_part
from tests.cli.test_bad_input import medssl
from tests.evaluation.tiny_cohort import tiny_volume, write_nifti

QUICK = ["settings.steps=2", "settings.batch=2", "settings.warmup_steps=1", "settings.detector={strides: [8, 16], width: 8}"]
HALF_MM = {"spacing_mm": [0.5, 0.5], "spacing_source": "views"}
CELLS = {"index": "", "where": "split is not null", "domain": "microscopy"}


@pytest.fixture(scope="module")
def smears(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve colour pictures of 60 x 80 with a red square each, a blue one in every second, none in the last, and their boxes."""
    from PIL import Image

    root = tmp_path_factory.mktemp("smears")
    (root / "images").mkdir()
    lines, splits = ["image,class,xmin,ymin,xmax,ymax"], ["file,split,patient"]
    for number in range(12):
        rng = np.random.default_rng(number)
        picture = rng.integers(150, 170, (60, 80, 3)).astype(np.uint8)
        top, left = int(rng.integers(0, 40)), int(rng.integers(0, 20))
        if number < 11:
            picture[top : top + 20, left : left + 16, 1:] = 20
            lines.append(f"cell_{number}.png,red,{left},{top},{left + 16},{top + 20}")
        else:
            lines.append(f"cell_{number}.png,,,,,")
        if number % 2 == 0:
            picture[5:17, 50:70, :2] = 20
            lines.append(f"cell_{number}.png,blue,50,5,70,17")
        Image.fromarray(picture).save(root / "images" / f"cell_{number}.png")
        splits.append(f"cell_{number}.png,{('train', 'train', 'test', 'val')[number % 4]},P{number}")
    (root / "boxes.csv").write_text("\n".join(lines) + "\n")
    (root / "split.csv").write_text("\n".join(splits) + "\n")
    assert index([root / "images"], root / "index", splits=root / "split.csv", modality="GM").n_series == 12
    return root


def pictures(root: Path, out: str, *changes: str) -> Any:
    given = [
        f"source={{index: {root / 'index'}, where: split is not null, domain: microscopy}}",
        "source.views={kind: image, size: [32, 64], normalize: {window: [0, 255]}, channels: keep}",
        f"boxes={{path: {root / 'boxes.csv'}}}",
        "encoder={name: image2d, model: resnet10t, in_channels: 3}",
        f"out={root / out}",
        *QUICK,
    ]
    return Recipe.load(recipe_folder() / "finetune" / "detection_bccd.yaml", [*given, *changes])


def encoder_weights(folder: Path, name: str, args: dict[str, Any], **facts: Any) -> Path:
    encoder = build.build_encoder({"name": name, "args": args})
    part = encoder.part("encoder")
    state = {k: v for k, v in encoder.net.state_dict().items() if k.startswith(part.keys)}
    return save_part(folder, "encoder", state, {**part.manifest, **facts})


def test_pictures__pretrained_beside_scratch_and_finished_cells_are_kept(smears: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"image_size": [32, 32], "intensity": {"normalize": {"window": [0, 255]}}}
    weights = encoder_weights(smears / "weights", "image2d", {"model": "resnet10t", "in_channels": 3}, **facts)
    recipe = pictures(smears, "out", "encoder={}")
    drawn: list[int] = []

    def drawing(*given: Any, **how: Any) -> Any:
        drawn.append(1)
        return bootstrap_interval(*given, **how)

    monkeypatch.setattr(cell_summary, "bootstrap_interval", drawing)
    between: list[Any] = []
    seen = smears / "out" / "summary.json"

    def look(number: int, *_: Any) -> None:
        between.extend([json.loads(seen.read_text())["rows"][0]] if number == 3 else [])

    summary = api.label_curve(recipe, weights, counts=[4], seeds=[0, 1], on_cell=look)
    assert len(drawn) == 3  # two rows and a difference, once
    assert between[0]["value"] is not None and between[0]["low"] is None and summary["rows"][0]["low"] is not None
    assert [(row["labels"], row["arm"], row["metric"]) for row in summary["rows"]] == [
        (4, "pretrained", "map_10_50"),
        (4, "scratch", "map_10_50"),
    ]
    assert [(row["labels"], row["arm"], row["seeds"]) for row in summary["differences"]] == [(4, "pretrained", [0, 1])]
    assert summary["shared"]["classes"] == ["class_1", "class_2"] and summary["shared"]["views"]["size"] == [32, 64]
    assert summary["shared"]["boxes"] == {
        "dropped_empty": 0,
        "pictures": 12,
        "boxes": 17,
        "clipped": 0,
        "ignored": 0,
        "unmatched": 0,
    }
    assert "| 4 | pretrained - scratch " in (smears / "out" / "table.md").read_text()
    cell = smears / "out" / "cells" / "pretrained_n4_s0"
    content = json.loads((cell / "results.json").read_text())
    assert len(content["cases"]) == 3 and {"series_id", "patient_id", "real", "found", "outside", "facts"} == set(
        content["cases"][0]
    )
    assert {key.split(".")[0] for key in load_file(cell / "network.safetensors")} == {
        "feature_extractor",
        "classification_head",
        "regression_head",
    }
    part, manifest = load_part(cell / "network.safetensors")
    rebuilt = build_detector(
        build.build_encoder(manifest["encoder"]),
        len(manifest["classes"]),
        manifest["image_size"],
        DetectorSettings(**manifest["detector"]),
    )
    rebuilt.network.load_state_dict(part)
    assert (smears / "out" / "private" / "classes.csv").read_text().split() == ["class,value", "class_1,blue", "class_2,red"]
    assert "cell_" not in "".join(path.read_text() for path in (smears / "out").rglob("*.json"))
    monkeypatch.setattr(box_tasks, "finetune_boxes", None)
    assert api.label_curve(recipe, weights, counts=[4], seeds=[0, 1])["rows"] == summary["rows"]
    with pytest.raises(RequestError, match="cells computed with other settings"):
        api.label_curve(pictures(smears, "out", "encoder={}", "settings.lr=0.1"), weights, counts=[4], seeds=[0])
    grey = pictures(smears, "grey", "encoder={}", "source.views.channels=mean")
    with pytest.raises(RequestError, match="have 1 channels, the encoder takes 3"):
        api.label_curve(grey, weights, counts=[4], seeds=[0])
    other = pictures(smears, "other", "encoder={}", "source.views.normalize=zscore")
    with pytest.raises(
        RequestError, match=r"source\.views: the weights were pretrained with normalize .*window.*, the settings say zscore"
    ):
        api.finetune(other, weights)
    assert not (smears / "grey").exists() and not (smears / "other").exists()


def test_weights_of_pictures_with_a_spacing__are_fine_tuned_on_pictures(smears: Path) -> None:
    facts = {"image_size": [32, 32], "intensity": {"normalize": {"window": [0.0, 255.0]}}, **HALF_MM}
    weights = encoder_weights(smears / "spaced", "image2d", {"model": "resnet10t", "in_channels": 3}, **facts)
    summary = api.finetune(pictures(smears, "spaced_out", "encoder={}", "labels=4"), weights)
    assert summary["shared"]["forced"] == [] and "spacing_mm" not in summary["shared"]["views"]


def test_folds__test_every_picture_once_and_leave_a_page(smears: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = "source.where=split is not null or true"
    summary = api.finetune(pictures(smears, "folds", "folds=3", where, "settings.figures=2"), None)
    (row,) = summary["rows"]
    assert (row["n_test"], row["seeds"], summary["cells"]["done"], summary["shared"]["folds"]) == (12, [0], 3, 3)
    cells = sorted((smears / "folds" / "cells").iterdir())
    assert [cell.name[-2:] for cell in cells] == ["f0", "f1", "f2"]
    results = [json.loads((cell / "results.json").read_text()) for cell in cells]
    assert len({case["series_id"] for result in results for case in result["cases"]}) == 12
    assert all(result["fitted"]["threshold"] is not None and result["of_folds"] == 3 for result in results)
    status, _, stderr = medssl(capsys, "report", smears / "folds", "--with-images")
    assert status == 0, stderr
    page = (smears / "folds" / "report.html").read_text()
    assert "test cases of 3 folds are taken together" in page and "Boxes that are there and boxes found in" in page
    assert "cell_" not in page
    with pytest.raises(RequestError, match="folds: 13, and the labelled cases are of 12 patients; ask for fewer folds"):
        api.finetune(pictures(smears, "many", "folds=13"), None)
    with pytest.raises(RequestError, match="cells computed with other folds"):
        api.finetune(pictures(smears, "folds"), None)
    assert not (smears / "many").exists()


def test_boxes_named_with_folders__are_joined_to_their_pictures(smears: Path) -> None:
    lines = (smears / "boxes.csv").read_text().splitlines()
    (smears / "by_path.csv").write_text("\n".join([lines[0], *(f"images/{line}" for line in lines[1:])]))
    found = picture_source(pictures(smears, "no", f"boxes.path={smears / 'by_path.csv'}"), *given_to_source(smears))
    plain = picture_source(pictures(smears, "no"), *given_to_source(smears))
    assert found.counts == plain.counts and found.counts["unmatched"] == 0 and found.digest() == plain.digest()


def given_to_source(smears: Path) -> Any:
    return pictures(smears, "no").source, BoxSettings(), None


def batches(smears: Path, **augment: Any) -> PictureBatches:
    recipe = pictures(smears, "none")
    return picture_source(recipe, recipe.source, BoxSettings(augment=augment), None).batches  # type: ignore[return-value]


def coloured(image: np.ndarray, dark: int) -> np.ndarray:
    """The box of the pixels that are dark in a channel and bright in another."""
    from medssl.evaluation.volume_boxes import extent

    bright = 0 if dark == 1 else 2
    return extent((image[dark] < 0.3) & (image[bright] > 0.45))


@pytest.mark.parametrize("augment", [{}, {"flip": (0.5, 0.5)}, {"area": (0.7, 1.0), "aspect": (0.8, 1.25), "flip": (0.5, 0.5)}])
def test_boxes__follow_the_views(smears: Path, augment: dict[str, Any]) -> None:
    """What the view shows in colour is where its box is, mirrored, cut and stretched."""
    source = batches(smears, **augment)
    seen = 0
    for step in range(6):
        images, targets = source.training(list(range(11)), step, 0, 4)
        for image, target in zip(images.numpy(), targets):
            for box, label in zip(target["boxes"].numpy(), target["labels"].tolist()):
                found = coloured(image, 1 if label == 1 else 0)
                assert box_iou(box[None], found[None])[0, 0] > 0.65
                seen += 1
    assert seen > 20


def test_whole_pictures__lead_back_to_the_boxes(smears: Path) -> None:
    source = batches(smears)
    red = [
        number for number, own in source.boxes.items() if 1 in own.labels
    ]  # which picture has none is drawn with the key of the index
    for number in red[:3]:
        case = source.whole(number)
        found = coloured(case.image[0].numpy(), 1) * np.tile(case.scale, 2) + np.tile(case.offset, 2)
        real = case.boxes[case.labels == 1]
        assert box_iou(found[None], real).max() > 0.8


def test_domain_and_sampler__are_part_of_what_cells_share(smears: Path) -> None:
    recipe = pictures(smears, "none")
    facts = picture_source(recipe, recipe.source, BoxSettings(), None).facts
    assert facts["domain"]["name"] == "microscopy" and facts["sampler"]["name"] == "planes"


def test_turned_views__hold_the_whole_box() -> None:
    """A quarter turn: rows become columns."""
    shown = np.array([[0.5, 0.0, 0.5], [0.0, -0.5, 0.5]])  # row from x, column from -y
    turned = in_view(np.array([[10.0, 20, 30, 60]]), shown, (100, 200), (50, 50))
    assert turned[0] == pytest.approx([50 - 60 / 4, 10 / 2, 50 - 20 / 4, 30 / 2])


def test_boxes_that_cannot_be_used__are_refused_before_anything_is_written(smears: Path) -> None:
    lines = (smears / "boxes.csv").read_text().splitlines()
    (smears / "empty_box.csv").write_text("\n".join([*lines, "cell_3.png,red,4,4,4,9"]))
    with pytest.raises(RequestError, match=f"line {len(lines) + 1}: a box without an area"):
        api.finetune(pictures(smears, "no", f"boxes.path={smears / 'empty_box.csv'}"), None)
    with pytest.raises(RequestError, match=r"a class that boxes\.classes does not list"):
        api.finetune(pictures(smears, "no", "boxes.classes=[red]"), None)
    with pytest.raises(RequestError, match="class green has no box among the 6 training cases"):
        api.finetune(pictures(smears, "no", "boxes.classes=[red, blue, green]"), None)
    (smears / "others.csv").write_text("image,class,xmin,ymin,xmax,ymax\nelsewhere.png,red,1,1,5,5\n")
    with pytest.raises(RequestError, match=r"none of the 12 selected pictures is listed in others\.csv"):
        api.finetune(pictures(smears, "no", f"boxes.path={smears / 'others.csv'}"), None)
    with pytest.raises(RequestError, match="7 labels are asked for, and 6 training cases have boxes"):
        api.finetune(pictures(smears, "no", "labels=7"), None)
    assert not (smears / "no").exists()


def test_detector_that_does_not_fit__is_refused_before_anything_is_written(smears: Path) -> None:
    with pytest.raises(RequestError, match="strides"):
        api.finetune(pictures(smears, "unfit", "settings.detector={strides: [1], width: 8}"), None)
    where = "source.where=split in ('train', 'test')"
    with pytest.raises(RequestError, match="patience needs validation cases"):
        api.finetune(pictures(smears, "unfit", where, "settings.val_every=1", "settings.patience=1"), None)
    assert not (smears / "unfit").exists()


def test_pictures_of_one_name__are_refused_and_those_without_a_series_counted(smears: Path) -> None:
    root = smears / "twice"
    for folder in ("P1", "P2"):
        (root / folder).mkdir(parents=True)
        number = 1 if folder == "P1" else 4
        shutil.copy(smears / "images" / f"cell_{number}.png", root / folder / "Quill.png")
    (root / "boxes.csv").write_text("image,class,xmin,ymin,xmax,ymax\nQuill.png,red,1,1,5,5\nQuill2.png,red,1,1,5,5\n")
    assert index([root], root / "index", modality="GM").n_series == 2
    given = (f"source.index={root / 'index'}", f"boxes.path={root / 'boxes.csv'}", "source.where=kind = 'image'")
    with pytest.raises(RequestError, match=r"2 of the 2 selected pictures that boxes\.csv lists share a file name") as caught:
        api.finetune(pictures(smears, "no", *given), None)
    assert "Quill" not in str(caught.value)
    (smears / "more.csv").write_text((smears / "boxes.csv").read_text() + "elsewhere.png,red,1,1,5,5\n")
    recipe = pictures(smears, "no", f"boxes.path={smears / 'more.csv'}")
    assert picture_source(recipe, recipe.source, BoxSettings(), None).counts["unmatched"] == 1


def test_cines_and_volumes_in_a_file_of_boxes__are_refused(tmp_path: Path) -> None:
    (tmp_path / "boxes.csv").write_text("image,class,xmin,ymin,xmax,ymax\na.dcm,red,1,1,5,5\n")
    table = read_boxes(tmp_path / "boxes.csv")
    for kind in ("image", "cine", "volume"):
        row: Any = SimpleNamespace(series_id="s", kind=kind)
        archive = SimpleNamespace(first_paths=lambda: {"s": Path("a.dcm")})
        shelf: Any = SimpleNamespace(rows=[row], archive=archive)
        if kind == "image":
            assert listed_pictures(shelf, table) == [(row, "a.dcm")]
            continue
        with pytest.raises(RequestError, match=rf"series that are no pictures \(1 {kind}\)"):
            listed_pictures(shelf, table)


def test_narrower_selection__does_not_move_boxes_to_another_folder(tmp_path: Path) -> None:
    rows = [SimpleNamespace(series_id=site, kind="image") for site in ("siteA", "siteB")]
    archive = SimpleNamespace(first_paths=lambda: {site: Path(f"/data/{site}/1.png") for site in ("siteA", "siteB")})
    (tmp_path / "boxes.csv").write_text("image,class,xmin,ymin,xmax,ymax\nsiteA/1.png,red,1,1,5,5\n")
    table = read_boxes(tmp_path / "boxes.csv")
    for chosen, expected in ((rows, ["siteA"]), (rows[:1], ["siteA"]), (rows[1:], [])):
        shelf: Any = SimpleNamespace(rows=chosen, archive=archive)
        assert [row.series_id for row, _ in listed_pictures(shelf, table)] == expected
    (tmp_path / "boxes.csv").write_text("image,class,xmin,ymin,xmax,ymax\nelsewhere/1.png,red,1,1,5,5\n")
    with pytest.raises(RequestError, match="boxes: 1 images are listed with a folder in which no image file lies"):
        listed_pictures(SimpleNamespace(rows=rows[1:], archive=archive), read_boxes(tmp_path / "boxes.csv"))  # type: ignore[arg-type]


def test_recipes_with_faults__say_which_key(smears: Path) -> None:
    for changes, message in (
        (["cohort={path: x}"], "source and boxes"),
        (["source.views.kind=stack", "source.views.slices=3"], r"source\.views\.kind: detection in an index is for pictures"),
        (["settings.augment={flipp: 1}"], r'settings\.augment\.flipp: unknown key \(did you mean "flip"\?\)'),
        (["settings.stepps=1"], r'settings: .*unknown key stepps \(did you mean "steps"\?\)'),
        (["boxes.drop=true"], r"boxes\.drop: unknown key"),
    ):
        with pytest.raises(RecipeError, match=message):
            recipe_checks.check(pictures(smears, "no", *changes))


def volumes(root: Path, out: str, *changes: str) -> Any:
    given = [
        f"cohort={{path: {root}, domain: mri}}",
        "views={size: [32, 32, 16], normalize: zscore, spacing_mm: 6.0}",
        "encoder={name: segresnet3d, init_filters: 8, blocks_down: [1, 1, 1], blocks_up: [1, 1]}",
        "settings.steps=2",
        "settings.batch=2",
        "settings.warmup_steps=1",
        "settings.detector={strides: [4], width: 8}",
        f"out={root.parent / out}",
        "labels=6",
    ]
    return Recipe.load(recipe_folder() / "finetune" / "detection_hippocampus.yaml", [*given, *changes])


@pytest.fixture(scope="module")
def cohort(phantom_archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("volumes") / "cohort"
    shutil.copytree(phantom_archive.parent / "cohort", root)
    return root


def test_domain_of_a_cohort__gets_its_arguments_and_is_shared(cohort: Path) -> None:
    roads = []
    for domain in ("{name: mri}", "{name: mri, philips_scaling: true}"):
        recipe = volumes(cohort, "none", f"cohort.domain={domain}")
        section, _ = section_of(recipe, None)
        roads.append(volume_source(recipe, section, build.box_settings(recipe), None))
    assert roads[0].facts["domain"] != roads[1].facts["domain"]
    readers = [road.batches.reader for road in roads if isinstance(road.batches, VolumeBatches)]
    assert [reader.domain.philips_scaling for reader in readers] == [False, True]


def test_folds_over_some_unknown_patients__are_refused(cohort: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Cohort.load(cohort)
    some = replace(whole, cases=tuple(replace(case, patient_known=k > 0) for k, case in enumerate(whole.cases)))
    monkeypatch.setattr(Cohort, "load", lambda _, **__: some)
    with pytest.raises(RequestError, match="labelled series have no usable patient identity, so patients cannot be kept together"):
        api.finetune(volumes(cohort, "unknown", "folds=3"), None)
    assert not (cohort.parent / "unknown").exists()
    recipe = volumes(cohort, "unknown")
    found = volume_source(recipe, section_of(recipe, None)[0], BoxSettings(), None)
    assert found.cases.groups is None and set(found.patients.values()) == {None}


def volumes_of_folds(root: Path, sides: str, organs: bool) -> Any:
    """Return the source of a cohort dealt into folds; a training case (t) has no spleen, of others (v, s) both organs are there."""
    rows = ["image,label,split,patient"]
    for number, side in enumerate({"t": "train", "v": "val", "s": "test"}[side] for side in sides):
        image, label = tiny_volume(number)
        write_nifti(root / f"i{number}.nii.gz", image)
        label = label * (label < 2) if side == "train" else label
        for value, organ in ((1, "liver"), (2, "spleen")) if organs else ():
            if (label == value).any():
                write_nifti(root / f"l{number}" / f"{organ}.nii.gz", (label == value).astype(np.uint8))
        if not organs:
            write_nifti(root / f"l{number}.nii.gz", label)
        rows.append(f"i{number}.nii.gz,l{number}{'' if organs else '.nii.gz'},{side},p{number}")
    (root / "cohort.csv").write_text("\n".join(rows) + "\n")
    recipe = volumes(root / "cohort.csv", "none", "folds=3")
    return volume_source(recipe, section_of(recipe, None)[0], build.box_settings(recipe), None)


@pytest.mark.parametrize(
    ("sides", "organs", "found"), [("tttvs", False, [5, 2]), ("sssss", False, [5, 5]), ("sssss", True, [5, 5])]
)
def test_folds_of_volumes__have_the_structures_of_all_label_maps(
    tmp_path: Path, sides: str, organs: bool, found: list[int]
) -> None:
    source = volumes_of_folds(tmp_path, sides, organs)
    assert source.cases.classes == ("structure_1", "structure_2") and source.cases.present.sum(axis=0).tolist() == found


def test_folds_of_volumes__of_which_some_label_fewer_organs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RequestError, match=r"case case0001: .* a map does not label structure 2, which is not to say that it is absent"
    ):
        volumes_of_folds(tmp_path, "tttvs", organs=True)


@pytest.mark.slow
def test_volumes__from_label_maps_pretrained_beside_scratch(cohort: Path) -> None:
    args = {"init_filters": 8, "blocks_down": [1, 1, 1], "blocks_up": [1, 1]}
    facts = {"image_size": [32, 32, 16], "intensity": {"normalize": "zscore"}}
    weights = encoder_weights(cohort.parent / "weights", "segresnet3d", args, **facts)
    summary = api.finetune(volumes(cohort, "out", "encoder={}"), weights, twin=True)
    assert [row["arm"] for row in summary["rows"]] == ["pretrained", "scratch"] and summary["shared"]["boxes"]["boxes"] > 0
    content = json.loads(
        (cohort.parent / "out" / "cells" / f"scratch_n{summary['rows'][0]['labels']}_s0" / "results.json").read_text()
    )
    assert content["cases"][0]["case"].startswith("case0") and content["cases"][0]["patient_id"].startswith("patient0")
    assert len(content["cases"][0]["real"][0][0]) == 6
    names = (cohort.parent / "out" / "private" / "cases.csv").read_text().splitlines()
    assert names[0] == "case,image,patient" and any(line.startswith(content["cases"][0]["case"] + ",") for line in names)


def test_boxes_of_crops__are_those_of_the_parts(cohort: Path) -> None:
    recipe = volumes(cohort, "none", "views.spacing_mm=null", "views.size=[64, 48, 32]")
    settings = build.box_settings(recipe)
    section, _ = section_of(recipe, None)
    road = volume_source(recipe, section, settings, None)
    assert isinstance(road.batches, VolumeBatches)
    ids = [int(n) for n in road.cases.ids]
    first = road.batches.training(ids, 3, 0, 2)
    again = road.batches.training(ids, 3, 0, 2)
    assert (first[0] == again[0]).all() and first[0].shape == (2, 1, 64, 48, 32)
    for target in first[1]:
        assert len(target["boxes"]) and (target["boxes"][:, 3:] > target["boxes"][:, :3]).all()
        assert float(target["boxes"].max()) <= 64
    asked: list[str] = []
    reader = road.batches.reader
    road.batches.reader = lambda case: (asked.append(case.id), reader(case))[1]  # type: ignore[assignment,func-returns-value]
    road.batches.training(ids, 4, 0, 2)
    assert len(asked) == 2  # one look per crop: beyond its memory the reader reads the file each time
    road.batches.reader = reader
    whole = road.batches.whole(ids[0])
    assert (whole.scale == 1).all() and len(whole.boxes) == len(whole.labels)


@pytest.mark.slow
def test_cohort_without_listed_structures__has_those_of_its_training_maps(cohort: Path, tmp_path: Path) -> None:
    root = tmp_path / "cohort"
    shutil.copytree(cohort, root)
    (root / "dataset.json").unlink()
    summary = api.finetune(volumes(root, "out", "labels=3"), None)
    assert all(name.startswith("structure_") for name in summary["shared"]["classes"])
