"""The joint run as `medssl pretrain` makes it: odd volumes, sources that do not fit, and a run that is killed within an epoch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from medssl import api
from medssl.archive.index import index
from medssl.errors import RecipeError, RequestError
from medssl.recipe import recipe_folder

SMOKE = recipe_folder() / "smoke" / "joint_slice_volume_mri.yaml"
QUIET = ["train.monitor_items=0", "train.tensorboard=false"]
DEEP = ["objective.mode=deepcluster", "objective.intra_queue=0", "objective.inter_queue=0"]


def volume(slices: int, seed: int, size: int = 24) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(-1, 1, size), np.linspace(-1, 1, size), indexing="ij")
    body = (x**2 + y**2 < 0.8)[..., None] * (200 + 30 * np.sin(3 * x[..., None] + seed + np.arange(slices) / 3))
    return (body + 5 * rng.random((size, size, slices))).astype(np.float32)


def archive(folder: Path, volumes: dict[str, np.ndarray]) -> Path:
    images = folder / "images"
    images.mkdir(parents=True)
    for number, (name, array) in enumerate(volumes.items()):
        affine = np.diag([1.0, 1.0, 2.0 + number % 3, 1.0])
        nib.save(nib.Nifti1Image(array, affine), images / f"{name}.nii.gz")  # type: ignore[attr-defined, no-untyped-call]
    summary = index([images], folder / "index", modality="MR")
    assert summary.reasons == ({"single_slice": 1} if "one" in volumes else {})
    return folder / "index"


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One slice (a series that the index rejects), many slices, a slice of NaN, a constant slice, and ordinary volumes."""
    padded, constant = volume(7, 3), volume(7, 4)
    padded[:, :, 3] = np.nan
    constant[:, :, 2] = 150.0
    volumes = {"one": volume(1, 1), "many": volume(120, 2), "padded": padded, "constant": constant, "plain": volume(5, 5)}
    return archive(tmp_path_factory.mktemp("odd"), volumes)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six colour pictures."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    (folder / "images").mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    index([folder / "images"], folder / "index", modality="GM")
    return folder / "index"


def sources(path: Path, slices: Path | None = None) -> list[str]:
    return [f"sources.stacks.index={path}", f"sources.slices.index={slices or path}"]


def losses(out: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("data_wait", "seconds_per_step", "time")} for line in found]


@pytest.mark.parametrize("mode", ["swav", "deepcluster"])
def test_odd_volumes__train_together(mode: str, odd: Path, tmp_path: Path) -> None:
    """Batches of 4 from 4 volumes of 5 to 120 slices, a view of 6 planes; 50 prototypes for 8 items."""
    changes = [*(DEEP if mode == "deepcluster" else []), "objective.inter_prototypes=50", "objective.intra_prototypes=50"]
    out = tmp_path / "run"
    done = api.pretrain(SMOKE, [*sources(odd), *QUIET, *changes, "train.steps=12", f"out={out}"])
    assert done.status == "finished" and done.items == 8 and not done.failed
    lines = losses(out)
    terms = {key for line in lines for key in line if key.startswith("loss")}
    assert terms == {"loss", "loss_intra", "loss_inter", "loss_mask"}
    assert all(np.isfinite(value) for line in lines for value in line.values())
    weights = load_file(out / "weights" / "last" / "joint.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())


@pytest.mark.parametrize("mode", ["swav", "deepcluster"])
def test_one_item__trains(mode: str, tmp_path: Path) -> None:
    path = archive(tmp_path / "archive", {"only": volume(5, 1)})
    changes = DEEP if mode == "deepcluster" else []
    done = api.pretrain(SMOKE, [*sources(path), *QUIET, *changes, "train.steps=6", f"out={tmp_path / 'run'}"])
    assert done.status == "finished" and done.items == 2
    assert all(np.isfinite(line["loss"]) for line in losses(tmp_path / "run"))


@pytest.mark.parametrize(("mode", "stop"), [("swav", 5), pytest.param("deepcluster", 5, marks=pytest.mark.slow)])
def test_killed_within_an_epoch__resumes_to_the_same_bits(mode: str, stop: int, odd: Path, tmp_path: Path) -> None:
    """Eight items and batches of 4: epochs begin at even steps; the checkpoint that is resumed is that of step 3."""
    changes = [*sources(odd), *QUIET, *(DEEP if mode == "deepcluster" else []), "train.steps=8", "train.checkpoint_every=3"]

    def die(done: int, _total: int, _metrics: Any) -> None:
        if done == stop:
            raise KeyboardInterrupt

    api.pretrain(SMOKE, [*changes, f"out={tmp_path / 'whole'}"])
    with pytest.raises(KeyboardInterrupt):
        api.pretrain(SMOKE, [*changes, f"out={tmp_path / 'killed'}"], on_step=die)
    assert api.pretrain(tmp_path / "killed", resume=True).status == "finished"
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    for part in ("joint", "slice_encoder", "aggregator"):
        whole, resumed = (load_file(tmp_path / name / "weights" / "last" / f"{part}.safetensors") for name in ("whole", "killed"))
        assert whole.keys() == resumed.keys() and all(torch.equal(value, resumed[key]) for key, value in whole.items())


def test_colour_and_grey_in_one_run__is_refused_before_anything_is_written(odd: Path, pictures: Path, tmp_path: Path) -> None:
    colour = [*sources(odd, pictures), "sources.slices.domain=microscopy", *QUIET, "train.steps=2", f"out={tmp_path / 'run'}"]
    with pytest.raises(RequestError, match=r"source slices: 6 of 6 items have 3 channels, the encoder takes 1; .*channels: mean"):
        api.pretrain(SMOKE, colour)
    assert not (tmp_path / "run").exists()
    assert api.pretrain(SMOKE, [*colour, "sources.slices.views.channels=mean"]).status == "finished"


FLAT = """
data: {index: INDEX, domain: mri, sampler: {foreground: 0}, views: {kind: image, size: 64, count: 2}}
encoder: {name: image2d, model: test_resnet}
train: {steps: 2, batch: 1, monitor_items: 0, tensorboard: false}
"""


@pytest.mark.parametrize("objective", ["graph_matching", "global_local_contrast"])
def test_one_image_a_step__is_refused_before_anything_is_written(objective: str, odd: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(FLAT.replace("INDEX", str(odd)) + f"objective: {objective}\n")
    with pytest.raises(RequestError, match=r"needs 2 or more on each process; here it gets 1: raise train\.batch"):
        api.pretrain(recipe, [f"out={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()
    with pytest.raises(RecipeError, match=rf"{objective} cannot work on encoder segresnet3d .*encoders that fit: image2d"):
        api.pretrain(recipe, [f"out={tmp_path / 'run'}", "encoder={name: segresnet3d}"])


@pytest.mark.parametrize("name", ["graph_matching", "global_local_contrast"])
def test_other_objectives__take_odd_volumes(name: str, odd: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    objective = {
        "graph_matching": "objective: {name: graph_matching, dim: 8}\n",
        "global_local_contrast": "objective: {name: global_local_contrast, dim: 8, hidden: 16, decoder_blocks: 3, decoder_width: 8}\n",
    }
    recipe.write_text(FLAT.replace("INDEX", str(odd)).replace("batch: 1", "batch: 4") + objective[name])
    done = api.pretrain(recipe, [f"out={tmp_path / 'run'}", "train.steps=4", "data.sampler={partitions: 2}"])
    assert done.status == "finished"
    assert all(np.isfinite(line["loss"]) for line in losses(tmp_path / "run") if "loss" in line)


def test_contrast_by_place__of_pictures_is_refused_before_anything_is_written(odd: Path, pictures: Path, tmp_path: Path) -> None:
    """Colour pictures belong to no volume: the global term has no partition for them, and trained nothing without a word."""
    recipe = tmp_path / "recipe.yaml"
    objective = "objective: {name: global_local_contrast, dim: 8, hidden: 16, weights: {global: 1}}\n"
    flat = FLAT.replace("INDEX", str(pictures)).replace("domain: mri", "domain: microscopy").replace("batch: 1", "batch: 4")
    recipe.write_text(flat.replace("count: 2", "count: 2, channels: mean") + objective)
    with pytest.raises(RequestError, match=r"source main: its items are all pictures .* would train nothing"):
        api.pretrain(recipe, [f"out={tmp_path / 'run'}"])
    with pytest.raises(RequestError, match=r"all items of main are pictures .* the global term would train nothing"):
        api.pretrain(recipe, [f"out={tmp_path / 'run'}", "objective.weights={global: 1, local: 1}", "objective.decoder_width=8"])
    assert not (tmp_path / "run").exists()
    notes: list[str] = []
    run = ["objective.variant=random", f"out={tmp_path / 'run'}"]
    assert api.pretrain(recipe, run, on_note=notes.append).status == "finished"
    assert not any("pictures" in note for note in notes)
    assert losses(tmp_path / "run")[-1]["loss_global"] > 0
    two = FLAT[FLAT.index("encoder") :].replace("batch: 1", "batch: 4") + objective.replace("{global: 1}", "{global: 1, local: 1}")
    views = "views: {kind: image, size: 64, count: 2, channels: mean}"
    recipe.write_text(
        f"sources:\n  a: {{index: {odd}, domain: mri, {views}}}\n  b: {{index: {pictures}, domain: microscopy, {views}}}\n{two}"
    )
    api.pretrain(recipe, [f"out={tmp_path / 'two'}"], on_note=notes.append)
    said = ["source b: 6 of 6 items are pictures that belong to no volume or clip; the global term leaves them out"]
    assert (
        [note for note in notes if "pictures" in note] == json.loads((tmp_path / "two" / "run.json").read_text())["notes"] == said
    )
