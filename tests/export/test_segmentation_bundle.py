"""A fine-tuned network as a MONAI bundle: the label maps that medssl writes, without medssl."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from medssl.cli import main as cli
from medssl.encoders.segresnet3d import SegResNet3D
from medssl.errors import WeightsError
from medssl.evaluation.cohort import Cohort
from medssl.evaluation.finetune import Pretrained, finetune, open_weights
from medssl.evaluation.segmentation_settings import FinetuneSettings
from medssl.export.write import export_weights
from medssl.weights import load_part, save_part
from tests.evaluation.channel_cohort import write_decathlon, write_nnunet
from tests.evaluation.tiny_cohort import TINY_ENCODER, tiny_volume
from tests.export.test_monai_bundle import ALL_THREE, parsed, run_isolated

pytestmark = [
    pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader"),
    pytest.mark.filterwarnings("ignore:parsing config_file"),
]
SETTINGS = FinetuneSettings(
    network="segresnet", encoder=TINY_ENCODER, crop=(16, 16, 16), steps=12, batch=1, warmup_steps=2, val_every=0, predictions=True
)
VARIANTS: dict[str, dict[str, Any]] = {
    "own voxels": {},
    "resampled and mirrored": {"spacing_mm": (1.3, 1.0, 1.6), "flips": (0, 2), "overlap": 0.25, "normalize": "percentile"},
    "larger than the image": {"crop": (32, 16, 24), "normalize": {"window": [0, 900]}},
}


def oblique_cohort(folder: Path) -> Cohort:
    """A cohort whose files have permuted and flipped axes, three different voxel edges, and values 2 and 5."""
    tilt = np.deg2rad(10)
    rotation = np.array([[np.cos(tilt), -np.sin(tilt), 0], [np.sin(tilt), np.cos(tilt), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.array([[0, 1.1, 0], [-1.5, 0, 0], [0, 0, -2.2]])
    affine[:3, 3] = (-20, 30, 40)
    with (folder / "split.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["file", "split", "few_label_rank"])
        for number, side in enumerate(("train", "train", "test")):
            image, label = tiny_volume(number)
            for kind, array in (("images", image), ("labels", np.array([0, 2, 5], np.uint8)[label])):
                (folder / kind).mkdir(exist_ok=True)
                nifti = nib.Nifti1Image(array, affine)
                nifti.header.set_xyzt_units("mm")
                nib.save(nifti, folder / kind / f"v{number}.nii.gz")
            table.writerow([f"v{number}.nii.gz", side, number + 1 if side == "train" else ""])
    return Cohort.load(folder)


def run_bundle(bundle: Path, image: Path | list[str], out: Path) -> None:
    """Do with one image, or the files of its channels, what the evaluator of a bundle does, by the bundle's own expressions."""
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config(bundle / "configs" / "inference.json")
    parser.config["output_dir"] = str(out)  # type: ignore[index]
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(bundle / "models" / "model.pt", weights_only=True))
    shown = parser.get_parsed_content("preprocessing")({"image": image if isinstance(image, list) else str(image)})["image"]
    with torch.no_grad():
        scores = parser.get_parsed_content("inferer")(shown[None], network)[0]
    parser.get_parsed_content("postprocessing")({"image": shown, "pred": scores})


@pytest.mark.parametrize("variant", VARIANTS)
def test_bundle__draws_what_medssl_draws_in_the_axes_of_the_file(variant: str, tmp_path: Path) -> None:
    cohort = oblique_cohort(tmp_path)
    finetune(cohort, FinetuneSettings(**{**vars(SETTINGS), **VARIANTS[variant]}), tmp_path / "tuned")
    report = export_weights(tmp_path / "tuned" / "network.safetensors", "monai-bundle", tmp_path / "bundle")
    assert report.max_feature_difference < 1e-5 and report.missing == ()
    run_bundle(tmp_path / "bundle", tmp_path / "images" / "v2.nii.gz", tmp_path / "out")
    found = nib.load(tmp_path / "out" / "v2_seg.nii.gz")  # type: ignore[attr-defined]
    (file,) = (tmp_path / "tuned" / "predictions").iterdir()
    expected = nib.load(file)  # type: ignore[attr-defined]
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-4)
    ours, theirs = np.asarray(expected.dataobj), np.asarray(found.dataobj)
    assert theirs.dtype == np.int16 and set(np.unique(theirs)) <= {0, 2, 5}
    assert ours.shape == theirs.shape and (ours == theirs).mean() > 0.999 and len(np.unique(ours)) > 1
    metadata = json.loads((tmp_path / "bundle" / "configs" / "metadata.json").read_text())
    channels = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
    assert channels["0"] == "background" and len(channels) == 3
    readme = (tmp_path / "bundle" / "docs" / "README.md").read_text()
    assert "Research only" in readme and "clipped after" not in readme


@pytest.mark.parametrize("form", ["nnunet", "decathlon"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_bundle_of_several_channels__draws_what_medssl_draws(form: str, variant: str, tmp_path: Path) -> None:
    from monai.bundle import ConfigParser

    cohort = Cohort.load({"nnunet": write_nnunet, "decathlon": write_decathlon}[form](tmp_path / "set", train=2, test=1))
    encoder = {"name": "segresnet3d", "args": {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]}}
    settings = FinetuneSettings(**{**vars(SETTINGS), **VARIANTS[variant], "encoder": encoder})
    finetune(cohort, settings, tmp_path / "tuned")
    report = export_weights(tmp_path / "tuned" / "network.safetensors", "monai-bundle", tmp_path / "bundle")
    assert report.max_feature_difference < 1e-5 and report.missing == ()
    parser = ConfigParser()
    parser.read_config(tmp_path / "bundle" / "configs" / "inference.json")
    parser.config["dataset_dir"] = str(tmp_path / "set" / "imagesTr")  # type: ignore[index]
    shown = parser.get_parsed_content("datalist")
    assert len(shown) == 3 and all(isinstance(item["image"], list) == (form == "nnunet") for item in shown)
    run_bundle(tmp_path / "bundle", shown[2]["image"], tmp_path / "out")
    (written,), (file,) = (list(folder.iterdir()) for folder in (tmp_path / "out", tmp_path / "tuned" / "predictions"))
    found, expected = nib.load(written), nib.load(file)  # type: ignore[attr-defined]
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-4)
    ours, theirs = np.asarray(expected.dataobj), np.asarray(found.dataobj)
    assert ours.shape == theirs.shape and (ours == theirs).mean() > 0.999 and len(np.unique(ours)) > 1
    inputs = json.loads((tmp_path / "bundle" / "configs" / "metadata.json").read_text())["network_data_format"]["inputs"]["image"]
    assert inputs["num_channels"] == 2 and inputs["channel_def"] == {"0": "T2", "1": "ADC"}
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 8), np.int16), np.eye(4)), tmp_path / "one.nii.gz")
    with pytest.raises(RuntimeError, match="applying transform") as caught:  # MONAI wraps what stopped it
        run_bundle(tmp_path / "bundle", tmp_path / "one.nii.gz", tmp_path / "none")
    causes = [str(caught.value)]
    error: BaseException | None = caught.value
    while error is not None:
        causes.append(str(error))
        error = error.__cause__
    assert any("an image has 1 channels, the network takes 2" in cause for cause in causes)


def test_other_exports_and_networks__are_refused_with_a_sentence(tmp_path: Path) -> None:
    cohort = oblique_cohort(tmp_path)
    finetune(
        cohort, FinetuneSettings(**{**vars(SETTINGS), "steps": 2, "warmup_steps": 0, "predictions": False}), tmp_path / "tuned"
    )
    network = tmp_path / "tuned" / "network.safetensors"
    with pytest.raises(WeightsError, match=r"is a fine-tuned network, which goes to monai-bundle; segresnet takes an encoder"):
        export_weights(network, "segresnet", tmp_path / "out")
    with pytest.raises(WeightsError, match="is a fine-tuned network with its head; fine-tuning starts from an encoder"):
        open_weights(network)
    state, manifest = load_part(network)
    known = {key: value for key, value in manifest.items() if key not in ("part", "weights_hash")}
    for change, said in (
        ({"network": "pyramid"}, r"network pyramid\); a bundle holds segmentation of volumes by unetr, segresnet, swin_unetr"),
        ({"network": None, "task": "classification"}, r"task classification\)"),
        ({"overlap": None}, "does not say overlap, it is of an earlier medssl; fine-tune again"),
        ({"domain_args": {"body_hu": -300}}, "fine-tune without domain_args"),
    ):
        other = {key: value for key, value in {**known, **change}.items() if key not in change or value is not None}
        save_part(tmp_path / "other", "network", state, other)
        with pytest.raises(WeightsError, match=said):
            export_weights(tmp_path / "other" / "network.safetensors", "monai-bundle", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("licence", "said"),
    [
        ("Apache-2.0", "fine-tuned from weights under Apache-2.0 (https://spdx.org/licenses/)"),
        (None, "fine-tuned from weights whose licence nobody stated"),
        ("", "trained from scratch"),
    ],
)
def test_licence__is_that_of_the_starting_weights(licence: str | None, said: str, tmp_path: Path) -> None:
    encoder = SegResNet3D(**TINY_ENCODER["args"])
    facts = encoder.part("encoder").manifest | {"intensity": {"normalize": SETTINGS.normalize}, "licence": licence}
    state = {key: value for key, value in encoder.net.state_dict().items() if key.startswith(tuple(encoder.key_groups["encoder"]))}
    weights = Pretrained(state, {key: value for key, value in facts.items() if value is not None}) if licence != "" else None
    short = FinetuneSettings(**{**vars(SETTINGS), "steps": 1, "warmup_steps": 0, "predictions": False, "figures": 0})
    finetune(oblique_cohort(tmp_path), short, tmp_path / "tuned", weights=weights)
    export_weights(tmp_path / "tuned", "monai-bundle", tmp_path / "bundle")
    text = (tmp_path / "bundle" / "LICENSE").read_text()
    assert said in text and "not stated by its owner" in text and "export.licence" not in text


def test_folder_of_a_fine_tuning__is_taken_where_it_holds_one_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = FinetuneSettings(**{**vars(SETTINGS), "steps": 1, "warmup_steps": 0, "predictions": False, "figures": 0})
    cell = tmp_path / "tuned" / "cells" / "scratch_n2_s0"
    finetune(oblique_cohort(tmp_path), short, cell)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["export", str(tmp_path / "tuned"), "--to", "monai-bundle", "--out", str(tmp_path / "bundle")])
    assert stopped.value.code == 0 and "0 missing, 0 unexpected" in capsys.readouterr().out
    assert export_weights(cell, "monai-bundle", tmp_path / "again").missing == ()
    shutil.copytree(cell, cell.with_name("scratch_n2_s1"))
    with pytest.raises(
        WeightsError, match="holds 2 fine-tuned networks; give the folder of one: cells/scratch_n2_s0, cells/scratch"
    ):
        export_weights(tmp_path / "tuned", "monai-bundle", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("network", "encoder", "crop"),
    [
        (
            "swin_unetr",
            {"name": "swin3d", "args": {"feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 2, 2], "window_size": [4, 4, 2]}},
            (64, 32, 32),
        ),
        (
            "unetr",
            {"name": "vit3d", "args": {"image_size": [32, 32, 16], "hidden_size": 48, "num_heads": 4, "num_layers": 12, "patch_size": 16}},
            (32, 32, 16),
        ),
    ],
)  # fmt: skip
def test_other_networks__have_the_same_scores(
    network: str, encoder: dict[str, Any], crop: tuple[int, int, int], tmp_path: Path
) -> None:
    cohort = oblique_cohort(tmp_path)
    settings = {
        "network": network,
        "encoder": encoder,
        "crop": crop,
        "steps": 1,
        "warmup_steps": 0,
        "predictions": False,
        "figures": 0,
    }
    finetune(cohort, FinetuneSettings(**{**vars(SETTINGS), **settings}), tmp_path / "tuned")
    report = export_weights(tmp_path / "tuned" / "network.safetensors", "monai-bundle", tmp_path / "bundle")
    assert report.max_feature_difference < 1e-5 and type(
        parsed(tmp_path / "bundle", "network_def")
    ).__name__.lower() == network.replace("_", "")


@pytest.mark.slow
def test_bundle__verifies_and_runs_where_medssl_is_not(tmp_path: Path) -> None:
    cohort = oblique_cohort(tmp_path)
    finetune(cohort, SETTINGS, tmp_path / "tuned")
    export_weights(tmp_path / "tuned" / "network.safetensors", "monai-bundle", tmp_path / "bundle")
    done = run_isolated(ALL_THREE, tmp_path, *[str(tmp_path / name) for name in ("bundle", "images", "out")])
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if line in ("no medssl", "metadata ok", "network ok", "ran False")] == [
        "no medssl", "metadata ok", "network ok", "ran False",
    ]  # fmt: skip
    assert len(list((tmp_path / "out").glob("*_seg.nii.gz"))) == 3
