"""Segmentation of pictures: reading, crops, the whole road beside its twin, and requests that mix pictures and volumes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medssl import api
from medssl.cli.results import _clinical_report
from medssl.domains.label_files.picture import read_picture_labels
from medssl.errors import GeometryError, ImageError, MedsslError, RecipeError, RequestError, WeightsError
from medssl.evaluation.cohort import Cohort
from medssl.evaluation.finetune import Pretrained, build_network, finetune, look_at, predict, start_encoder
from medssl.evaluation.metrics import areas_mm2, hd95_mm
from medssl.evaluation.segmentation_results import score_case
from medssl.evaluation.segmentation_settings import FinetuneSettings
from medssl.evaluation.volumes import CaseReader, TrainingCrops, picture_augment
from medssl.registry import lookup
from medssl.report.page import report as draw
from medssl.weights import load_part, save_part
from tests.evaluation.picture_cohort import SHAPE, picture, save, write_pictures
from tests.evaluation.tiny_cohort import write_cohort
from tests.synthetic_planar import write_planar_dicom

ENCODER: dict[str, Any] = {"name": "image2d", "args": {"model": "test_resnet", "in_channels": 1}}
SETTINGS = FinetuneSettings(
    network="pyramid",
    network_args={"width": 8},
    encoder=ENCODER,
    domain="xray",
    crop=(32, 32),
    steps=2,
    batch=2,
    warmup_steps=1,
    log_every=1,
    augment={"rotate_deg": 20, "scale": [0.9, 1.1], "noise_std": 0.1},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def cohort(folder: Path) -> Cohort:
    return Cohort.load(folder)


def weights(folder: Path, seed: int = 3) -> Path:
    """Weights of the encoder, as a run leaves those of a slice encoder."""
    torch.manual_seed(seed)
    encoder = lookup("encoder", "image2d")(**ENCODER["args"])
    part = encoder.part("slice_encoder")
    return save_part(folder, "slice_encoder", encoder.net.state_dict(), {**part.manifest, "intensity": {"normalize": "zscore"}})


# --- reading


def test_pictures__are_volumes_of_one_slice_on_their_own_pixels(cohort: Cohort) -> None:
    case = cohort.split("train")[1]
    volume = CaseReader("xray")(case)
    image, label = picture(1)
    assert volume.picture and not volume.measured and volume.image.shape == (1, *SHAPE, 1)
    assert np.array_equal(volume.image[0, ..., 0], image) and volume.label is not None
    assert np.array_equal(volume.label[..., 0], label)
    assert set(volume.points) == {1, 2} and cohort.structures == {1: "disc", 2: "square"}


def test_label_forms__are_read_pixel_by_pixel(tmp_path: Path) -> None:
    import nibabel

    label = picture(4)[1]
    save(tmp_path / "grey.png", label)
    save(tmp_path / "deep.png", label.astype(np.uint16))
    save(tmp_path / "map.tif", label)
    palette = Image.new("P", SHAPE[::-1])
    palette.putdata(label.ravel().tolist())
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "palette.png")
    nibabel.save(nibabel.Nifti1Image(label.T[..., None], np.diag([-1.0, -1, 1, 1])), tmp_path / "slice.nii.gz")
    for name in ("grey.png", "deep.png", "map.tif", "palette.png", "slice.nii.gz"):
        assert np.array_equal(read_picture_labels(tmp_path / name, SHAPE).array[..., 0], label), name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("colour.png", np.zeros((*SHAPE, 3), np.uint8), r"label map in colour \(RGB\)"),
        ("turned.png", np.zeros(SHAPE[::-1], np.uint8), "labels of 64x48 pixels on a picture of 48x64"),
        ("half.tif", np.full(SHAPE, 0.5, np.float32), "not whole numbers"),
        ("lossy.jpg", np.zeros(SHAPE, np.uint8), "no label map of a picture; accepted: PNG, TIFF and BMP"),
    ],
)
def test_label_maps_that_do_not_fit__are_refused(tmp_path: Path, name: str, content: np.ndarray, message: str) -> None:
    save(tmp_path / name, content)
    with pytest.raises((GeometryError, ImageError), match=message):
        read_picture_labels(tmp_path / name, SHAPE)


def test_unknown_values_and_damage__name_the_case_and_no_file(tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "c", train=2, val=0, test=1)
    label = picture(0)[1]
    label[0, 0] = 9
    save(root / "labels" / "p0.png", label)
    (root / "labels" / "p1.png").write_bytes((root / "labels" / "p1.png").read_bytes()[:60])
    cases = Cohort.load(root).split("train")
    with pytest.raises(ImageError, match="case0001: its label map holds the value 9, which stands for no structure") as unknown:
        CaseReader("xray")(cases[0])
    with pytest.raises(ImageError, match="case0002: ") as damaged:
        CaseReader("xray")(cases[1])
    assert "p0" not in str(unknown.value) and "p1" not in str(damaged.value)


def test_other_cohort_forms__hold_pictures_too(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    for number, side in ((0, "Tr"), (1, "Tr"), (2, "Ts")):
        image, label = picture(number)
        save(raw / f"images{side}" / f"a{number}_0000.png", np.stack([image, image // 2, label], axis=-1))
        save(raw / f"labels{side}" / f"a{number}.png", label)
    facts = {"channel_names": {"0": "R", "1": "G", "2": "B"}, "labels": {"disc": 1, "square": 2}, "file_ending": ".png"}
    (raw / "dataset.json").write_text(json.dumps(facts))
    cohort = Cohort.load(raw)
    volume = CaseReader("microscopy")(cohort.split("train")[0])
    assert volume.image.shape == (3, *SHAPE, 1) and len(cohort.split("test")) == 1
    rows = ["image,label,split", "imagesTr/a0_0000.png,labelsTr/a0.png,train", "imagesTr/a1_0000.png,labelsTr/a1.png,test"]
    (raw / "table.csv").write_text("\n".join(rows))
    assert CaseReader("microscopy")(Cohort.load(raw / "table.csv").split("test")[0]).image.shape == (3, *SHAPE, 1)


# --- crops


def test_crops__hold_image_and_label_of_the_same_pixels(cohort: Cohort) -> None:
    volumes = [CaseReader("xray")(case) for case in cohort.split("train")[1:3]]
    plain = TrainingCrops(
        size=(32, 32), spacing_mm=None, normalize="none", augment={}, foreground=1.0, seed=0, device=torch.device("cpu")
    )
    images, labels = plain.batch(volumes, 0)
    assert images.shape == labels.shape == (2, 1, 32, 32)
    for k, volume in enumerate(volumes):
        where = [
            (i, j)
            for i in range(SHAPE[0] - 31)
            for j in range(SHAPE[1] - 31)
            if np.array_equal(volume.image[0, i : i + 32, j : j + 32, 0], images[k, 0].numpy())
        ]
        ((i, j),) = where
        assert volume.label is not None
        assert np.array_equal(volume.label[i : i + 32, j : j + 32, 0], labels[k, 0].numpy())
    moved = TrainingCrops(
        size=(32, 32), spacing_mm=None, normalize="none", augment={"rotate_deg": 30, "scale": [0.8, 1.2]}, foreground=1.0, seed=0,
        device=torch.device("cpu"),
    )  # fmt: skip
    for step in range(6):  # a disc stays bright and a square dark: image and label turn together, within the plane
        images, labels = moved.batch(volumes, step)
        for value, sign in ((1, 1), (2, -1)):
            inside = images[labels == value]
            assert len(inside) == 0 or sign * (float(inside.mean()) - 120) > 40


def test_augmentation__that_leaves_the_plane_is_refused() -> None:
    assert picture_augment({"rotate_deg": 10, "flip": 0.5, "noise_std": 1}) == {
        "rotate_deg": (0, 0, 10),
        "flip": (0.5, 0.5, 0),
        "noise_std": 1,
    }
    with pytest.raises(RequestError, match="a picture turns by one angle"):
        picture_augment({"rotate_deg": [5, 0, 0]})
    with pytest.raises(RequestError, match=r"augment\.warp"):
        picture_augment({"warp": {"amplitude": 0.1}})


# --- scores


def test_scores__are_in_the_plane_and_in_mm_where_the_picture_says_so(tmp_path: Path) -> None:
    image, label = picture(5)
    (tmp_path / "images").mkdir()
    write_planar_dicom(tmp_path / "images" / "a.dcm", image, modality="DX", PixelSpacing=[0.5, 0.25])
    save(tmp_path / "labels" / "a.png", label)
    (tmp_path / "split.csv").write_text("file,split\na.dcm,train\n")
    case = Cohort.load(tmp_path).cases[0]
    volume = CaseReader("xray")(case)
    assert volume.measured and volume.spacing_mm == (0.5, 0.25, 1.0)
    found = np.roll(volume.label, 4, axis=1)  # type: ignore[arg-type]
    assert volume.label is not None
    score = score_case(case, volume, found, volume.label, {1: "disc", 2: "square"}, ["disc", "square", "other"])
    assert score.hd95_mm["square"] == pytest.approx(1.0)  # four columns of 0.25 mm
    assert score.area_mm2["square"] == score.reference_mm2["square"] == pytest.approx(144 * 0.125)
    assert score.volume_ml == {} and score.dice["other"] is None
    square = volume.label[..., 0] == 2
    assert areas_mm2(square.astype(int), [1], (0.5, 0.25)) == {1: pytest.approx(18.0)}
    apart = np.zeros((20, 20), int), np.zeros((20, 20), int)
    apart[0][5, 5], apart[1][5, 8] = 1, 1
    assert hd95_mm(*apart, [1], (1.0, 2.0))[1] == pytest.approx(6.0)
    unmeasured = replace(volume, measured=False)
    assert score_case(case, unmeasured, found, volume.label, {2: "square"}, ["square"]).hd95_mm == {"square": None}


# --- the road


def test_finetune__writes_what_a_reader_of_pictures_expects(cohort: Cohort, tmp_path: Path) -> None:
    settings = replace(SETTINGS, predictions=True, val_every=2, flips=(1,), figures=2)
    result = finetune(cohort, settings, tmp_path / "out", labels=3, seed=0)
    assert len(result.cases) == 2 and all(case.hd95_mm == {"disc": None, "square": None} for case in result.cases)
    for case in result.cases:
        with Image.open(tmp_path / "out" / "predictions" / f"{case.id}.png") as written:
            assert written.size == SHAPE[::-1] and written.mode == "L" and max(np.asarray(written).ravel()) <= 2
    manifest = json.loads((tmp_path / "out" / "network.json").read_text())
    assert (manifest["library"], manifest["axis_order"], manifest["crop"]) == ("medssl.PyramidSegmenter", "HW", [32, 32])
    kept = np.load(tmp_path / "out" / "figures" / "segmentation.npz")
    assert kept["image"].shape == (2, *SHAPE, 1) and kept["picture"]
    assert np.array_equal(kept["label"][0, ..., 0], picture(5)[1])
    worst = np.load(tmp_path / "out" / "figures" / "worst.npz")
    assert "0_picture_image" in worst and "0_axial_image" not in worst
    assert result.to_json()["mean"]["hd95_mm"] == {"disc": None, "square": None}


def test_slice_encoder__is_taken_beside_its_twin_and_reported(folder: Path, tmp_path: Path) -> None:
    path = weights(tmp_path / "weights")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
kind: finetune
cohort: {{path: {folder}, domain: xray}}
network: pyramid
encoder: {{name: image2d, model: test_resnet}}
settings: {{crop: [32, 32], network_args: {{width: 8}}, steps: 2, warmup_steps: 1, device: cpu, layer_decay: 0.8}}
out: {tmp_path / "out"}
"""
    )
    curve = api.label_curve(recipe, path, counts=[1, 2], seeds=[0])
    assert {(row["arm"], row["labels"]) for row in curve["rows"]} == {(a, n) for a in ("pretrained", "scratch") for n in (1, 2)}
    content = [json.loads(file.read_text()) for file in sorted((tmp_path / "out" / "cells").glob("*/results.json"))]
    assert {c["arm"]: (c["loaded"] or {}).get("matched") for c in content} == {
        "pretrained": len(load_part(path)[0]),
        "scratch": None,
    }
    found = _clinical_report(tmp_path / "out", tmp_path / "clinical.html", True).read_text()
    drawn = draw(tmp_path / "out", tmp_path / "page.html", with_images=True).read_text()
    for html in (found, drawn):
        assert ("data:image/png" in html and "over the image:" in html) or "Label and prediction of case" in html
        assert "in three planes" not in html


@pytest.mark.slow
def test_flexible_unet__goes_the_same_road(cohort: Cohort, tmp_path: Path) -> None:
    encoder = {"name": "image2d", "args": {"model": "resnet18", "in_channels": 1}}
    torch.manual_seed(0)
    made = lookup("encoder", "image2d")(**encoder["args"])  # type: ignore[call-overload]
    given = Pretrained(made.net.state_dict(), made.part("encoder").manifest)
    settings = replace(SETTINGS, network="flexible_unet", network_args={}, encoder=encoder, crop=(64, 64), layer_decay=0.7)
    result = finetune(cohort, settings, tmp_path / "out", labels=2, weights=given)
    assert result.loaded is not None and (result.loaded["matched"], result.loaded["missing"]) == (120, 0)
    assert json.loads((tmp_path / "out" / "network.json").read_text())["library"] == "monai.FlexibleUNet"
    assert all(set(case.dice) == {"disc", "square"} for case in result.cases)


def test_training__finds_the_shapes(cohort: Cohort, tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=40, batch=4, lr=5e-3, warmup_steps=5, augment={}, log_every=20, figures=0)
    result = finetune(cohort, settings, tmp_path / "out", seed=0)
    first, last = result.curve[0]["loss"], result.curve[-1]["loss"]
    assert last < 0.7 * first
    assert np.mean([case.dice["disc"] or 0.0 for case in result.cases]) > 0.3


def test_prediction__covers_pictures_smaller_and_larger_than_the_window(cohort: Cohort) -> None:
    volume = CaseReader("xray")(cohort.cases[1])
    for crop in ((32, 32), (64, 96)):
        settings = replace(SETTINGS, crop=crop)
        network = build_network(settings, n_classes=3, seed=0)
        assert predict(network, volume, settings).shape == (*SHAPE, 1)
        look = look_at(start_encoder(settings, None, 0), volume, cohort.cases[1], settings)
        assert look.spacing_mm is None and look.feature is not None and np.isfinite(look.feature).all()


# --- what does not go together


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": (32, 32, 32)}, r"crop \[32, 32, 32\] is of volumes, and the domain xray reads pictures; give crop: \[H, W\]"),
        ({"domain": "mri"}, r"crop \[32, 32\] is of pictures, and the domain mri reads volumes"),
        ({"network": "segresnet", "network_args": {}}, 'the encoder is "image2d"; it is built around segresnet3d'),
        (
            {"encoder": {"name": "segresnet3d", "args": {"init_filters": 8}}},
            r"encoder segresnet3d sees volumes, the crop \[32, 32\] has 2 axes",
        ),
        ({"spacing_mm": (1.0, 1.0)}, "7 of 7 pictures do not say how large their pixels are; set spacing_mm: null"),
        (
            {"encoder": {"name": "image2d", "args": {"model": "test_resnet", "in_channels": 3}}},
            r"7 of 7 images have 1 channel\(s\), the encoder takes 3",
        ),
    ],
)
def test_pictures_and_volumes__are_not_mixed(cohort: Cohort, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MedsslError, match=message):
        finetune(cohort, replace(SETTINGS, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"crop": [32]}, "crop: .*three positive numbers, for pictures two|a list of 3"),
        ({"crop": [32, 32], "spacing_mm": [1.0, 1.0, 1.0]}, "spacing_mm: .*one number above 0 for each axis of the crop"),
        ({"crop": [32, 32], "flips": [2]}, "flips: .*axes 0 to 1"),
        ({"crop": [32, 32], "dicom_seg": True}, "dicom_seg: .*false for pictures"),
    ],
)
def test_settings__of_other_axes_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        FinetuneSettings.from_dict({"domain": "xray", **values})


def test_volumes_under_a_domain_of_pictures__are_refused_by_the_recipe_and_the_reader(tmp_path: Path) -> None:
    root = write_cohort(tmp_path / "volumes", train=1, val=0, test=1)
    given = ["cohort.domain=xray", f"cohort.path={root}", f"out={tmp_path / 'out'}"]
    recipe = {"kind": "finetune", "network": "pyramid", "encoder": {"name": "image2d"}, "cohort": {"path": "x"}}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    with pytest.raises(RecipeError, match=r"settings: crop .* is of volumes, and the domain xray reads pictures"):
        api.finetune(path, None, given)
    with pytest.raises(ImageError):
        api.finetune(path, None, [*given, "settings.crop=[32, 32]"])
    shutil.rmtree(root)


def test_boxes__are_not_made_of_label_maps_of_pictures(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    content = {"kind": "finetune", "task": "detection", "cohort": {"path": str(folder), "domain": "xray"}, "encoder": ENCODER}
    recipe.write_text(json.dumps(content))
    with pytest.raises(RecipeError, match=r"cohort\.domain: xray reads pictures; boxes in pictures come from an index"):
        api.finetune(recipe, None, [f"out={tmp_path / 'out'}"])


def test_weights_of_the_whole_joint_run__say_which_part_to_give(cohort: Cohort, tmp_path: Path) -> None:
    manifest = {"library": "medssl.SliceVolumeEncoder", "encoder": {"name": "slice_volume", "args": {}}}
    with pytest.raises((RequestError, WeightsError), match="give the weights of its slice encoder"):
        finetune(cohort, replace(SETTINGS, encoder=None), tmp_path / "out", weights=Pretrained({}, manifest))


# --- what differs between pictures of one cohort


def colour_cohort(folder: Path, grey: str) -> Cohort:
    """Pictures in colour, one of them grey: a blank field is stored so."""
    write_pictures(folder)
    for path in (folder / "images").iterdir():
        image = np.asarray(Image.open(path).convert("L"))
        save(path.with_suffix(".png"), image if path.stem == grey else np.stack([image, image // 2, image // 3], axis=-1))
    (folder / "images" / "p0.jpg").unlink()
    table = folder / "split.csv"
    table.write_text(table.read_text().replace("p0.jpg", "p0.png"))
    return Cohort.load(folder)


@pytest.mark.parametrize("grey", ["p1", "p6"], ids=["in training", "in the test set"])
def test_a_grey_picture__of_a_colour_cohort_is_taken_as_grey(tmp_path: Path, grey: str) -> None:
    cohort = colour_cohort(tmp_path / "cohort", grey)
    colour = {"name": "image2d", "args": {"model": "test_resnet", "in_channels": 3}}
    settings = replace(SETTINGS, encoder=colour, domain="microscopy")
    assert len(finetune(cohort, settings, tmp_path / "out").cases) == 2
    with pytest.raises(ImageError, match=r"case case000\d: a picture of 3 channels, the encoder takes 1"):
        finetune(cohort, replace(SETTINGS, domain="microscopy"), tmp_path / "grey")
    assert not (tmp_path / "grey").exists()


def test_pixel_size__of_test_pictures_is_asked_for_before_training(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "cohort")
    for n in range(5):  # training and validation pictures as DICOM, which says the size; test pictures as PNG
        image, _ = picture(n)
        old = next((folder / "images").glob(f"p{n}.*"))
        old.unlink()
        write_planar_dicom(folder / "images" / f"p{n}.dcm", image, PixelSpacing=[0.5, 0.25])
    table = folder / "split.csv"
    lines = table.read_text().splitlines()
    table.write_text(
        "\n".join([lines[0], *(line.replace(".jpg", ".dcm").replace(".png", ".dcm") for line in lines[1:6]), *lines[6:]])
    )
    with pytest.raises(RequestError, match="spacing_mm: 2 of 7 pictures do not say"):
        finetune(Cohort.load(folder), replace(SETTINGS, spacing_mm=(0.5, 0.5)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_figures__show_large_pictures_whole(tmp_path: Path) -> None:
    from medssl.evaluation.segmentation_results import PICTURE_SIZE, write_figures
    from medssl.evaluation.volumes import Volume
    from medssl.evaluation.worst import SIZE, slices

    label = np.zeros((1000, 800, 1), np.int16)
    label[100:300, 50:150], label[100:300, 650:750] = 1, 2  # far from their common middle
    image = np.zeros((1, *label.shape), np.float32)
    spacing = (0.5, 0.5, 1.0)
    volume = Volume(image, np.ones(label.shape, bool), label, spacing, np.eye(4), {}, picture=True)
    write_figures(tmp_path / "f.npz", [(volume, np.zeros_like(label), 0.0)], {1: "left", 2: "right"})
    with np.load(tmp_path / "f.npz") as kept:
        assert set(np.unique(kept["label"])) == {0, 1, 2} and max(kept["label"].shape) <= PICTURE_SIZE
        assert kept["spacing_mm"][0, 0] == 0.5 * 4
    parts = slices(image[0], label, np.zeros_like(label), spacing, picture=True)
    assert set(np.unique(parts["picture_label"])) == {0, 1, 2} and max(parts["picture_label"].shape) <= SIZE
    assert parts["picture_spacing_mm"].tolist() == [0.5 * 7] * 2


def test_areas__are_what_the_clinical_page_compares(tmp_path: Path) -> None:
    from medssl.evaluation.clinical import clinical_facts

    def case(n: int, unit: str) -> dict[str, Any]:
        sizes = {f"reference_{unit}": {"disc": 10.0 * n}, f"area_{unit}": {"disc": 9.0 * n if n else 4.0}}
        return {"id": f"case{n:04d}", "patient": f"p{n}", "dice": {"disc": 0.9 if n else 0.0}, "hd95_mm": {"disc": None}, **sizes}

    def facts(unit: str) -> dict[str, Any]:
        result = {"arm": "scratch", "labels": 3, "seed": 0, "structures": ["disc"], "cases": [case(n, unit) for n in range(4)]}
        return clinical_facts([result], draws=20)

    (row,) = facts("mm2")["agreement"]["rows"]
    assert row["unit"] == "mm2" and row["reference"] == [0.0, 10.0, 20.0, 30.0]
    assert facts("px")["agreement"] == {"why": "the pictures do not say how large their pixels are."}
    assert [facts(unit)["structures"]["rows"][0]["invented"] for unit in ("mm2", "px")] == [1, 1]


def test_a_flip_that_is_no_number__is_refused_in_words(cohort: Cohort, tmp_path: Path) -> None:
    with pytest.raises(MedsslError, match="flip"):
        finetune(cohort, replace(SETTINGS, augment={"flip": True}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
