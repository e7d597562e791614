"""Frozen linear probes of the joint pretraining: three MedMNIST sets and few-label segmentation of the hippocampus.

    python -m benchmarks.joint_probes ../shared/data --data runs/joint/data --run runs/joint/joint/0 --out runs/joint/cells/joint_0

All arms are read in the same way:

- *pneumoniamnist*, *breastmnist*: ridge regression on the pooled stages of the slice encoder, images of 28 px shown at 64.
- *adrenalmnist3d_64*: ridge regression on the mean over 8 slices of the same, joined with the volume embedding where the arm has one.
- *hippocampus*: ridge regression per pixel on the maps of all stages (five labelled patients, balanced pixels), axial slices at 64 px;
  what is subtracted from the background's score is chosen on the five training volumes. Dice by patient.

Ridge is fitted on the training split, its penalty is chosen by folds within it. Before anything is probed, `check_apart` refuses weights
whose training items hold the pixels of an image that is evaluated.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.joint_data import MEDMNIST, read_table
from medssl import build
from medssl.archive.pixels.checks import content_hash
from medssl.data_sources import store_folder
from medssl.errors import LeakageError
from medssl.evaluation.controls import random_init, small_images
from medssl.evaluation.features import evaluation_mode
from medssl.evaluation.linear_probe import fit_linear
from medssl.recipe import Recipe
from medssl.registry import lookup
from medssl.sampling.items import read as read_items
from medssl.sampling.planes import display, spread
from medssl.store.reader import StoreReader
from medssl.types import Stack
from medssl.weights import write_atomic

SIZE, SLICES, LABELLED, PIXELS = 64, 8, 5, 400
"""Pixels of a view; slices of a volume; labelled patients; pixels per class and slice stack that the segmentation is fitted on (times 10)."""
STRUCTURES = (1, 2)
TASKS = (*MEDMNIST, "hippocampus")


@dataclass
class Arm:
    """What is probed.

    Args:
        slices: Network of single slices (`Image2D`).
        volume: The whole encoder where it takes stacks, else None.
    """

    slices: Any
    volume: Any


def arm_of(encoder: nn.Module) -> Arm:
    """Take an encoder apart."""
    inner = getattr(encoder, "slice_encoder", None)
    return Arm(encoder, None) if inner is None else Arm(inner, encoder)


def load_arm(run: Path) -> Arm:
    """Load the last weights of a run."""
    return arm_of(build.load_encoder(run))


def random_arm(recipe: Path, seed: int) -> Arm:
    """Build the encoder of a recipe without training."""
    component = next(iter(Recipe.load(recipe).encoders.values()))
    return arm_of(random_init(lambda: build.build_encoder(component), seed).eval())


# --- features


def medmnist(shared: Path, name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images (N, H, W) or (N, X, Y, Z) uint8 and labels (N,) of one split."""
    with np.load(shared / "medmnist" / f"{name}.npz") as data:
        return data[f"{split}_images"], data[f"{split}_labels"].reshape(-1)


def shown(images: np.ndarray) -> Tensor:
    """Return images (N, H, W) of 8 bits as the views of pretraining show them without augmentation, (N, 1, 64, 64)."""
    x = torch.from_numpy(np.ascontiguousarray(images)).float()[:, None] / 255
    return functional.interpolate(x, size=(SIZE, SIZE), mode="bilinear", align_corners=False)


def pooled(arm: Arm, x: Tensor, batch: int = 64) -> np.ndarray:
    """Return the pooled stages of images (N, 1, H, W)."""
    with evaluation_mode(arm.slices):
        return torch.cat([arm.slices.embed(part, "stages") for part in x.split(batch)]).numpy()


def planes_of(volume: np.ndarray) -> np.ndarray:
    """Return evenly spread axial slices (S, H, W) of a volume (X, Y, Z), turned as in pretraining."""
    places = spread(volume.shape[2], SLICES, 1.0, 0.5)
    return display(np.moveaxis(volume[:, :, list(places)], 2, 0), 2)


def volume_features(arm: Arm, volumes: np.ndarray, batch: int = 16) -> dict[str, np.ndarray]:
    """Return `slices`, the mean over slices, and `volume`, the volume embedding where there is one."""
    rows: dict[str, list[np.ndarray]] = {}
    depth = torch.tensor(spread(volumes.shape[3], SLICES, 1.0, 0.5)).float()
    for first in range(0, len(volumes), batch):
        planes = np.stack([planes_of(volume) for volume in volumes[first : first + batch]])
        x = shown(planes.reshape(-1, *planes.shape[2:]))
        means = pooled(arm, x).reshape(len(planes), planes.shape[1], -1).mean(axis=1)
        rows.setdefault("slices", []).append(means)
        if arm.volume is not None:
            stack = Stack(
                x.reshape(len(planes), -1, 1, SIZE, SIZE),
                torch.ones(planes.shape[:2], dtype=torch.bool),
                depth.expand(len(planes), -1),
            )
            with evaluation_mode(arm.volume):
                rows.setdefault("volume", []).append(arm.volume.forward_features(stack).pooled.numpy())
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def raw_features(images: np.ndarray) -> np.ndarray:
    """Return the pixels of pictures, or volumes averaged to 16^3, between 0 and 1."""
    if images.ndim == 3:
        return images.reshape(len(images), -1) / 255
    return np.concatenate([small_images(torch.from_numpy(v[None, None]).float() / 255, 16).numpy() for v in images])


# --- classification


def classify(features: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray], split: str) -> dict[str, list[float]]:
    """Fit on `train` and score a split.

    Returns:
        `target` and `score` (about 0 to 1) per image.
    """
    model = fit_linear(features["train"], labels["train"].astype(float), None, task="regression")
    scores = model.predict(features[split])
    return {"target": labels[split].astype(float).tolist(), "score": scores.tolist()}


def classification(arm: Arm | None, shared: Path, name: str, split: str) -> dict[str, Any]:
    """Probe one MedMNIST set; without an arm, its raw pixels. Keys are the ways of reading the features."""
    images, labels = {}, {}
    for part in ("train", split):
        images[part], labels[part] = medmnist(shared, name, part)
    if arm is None:
        rows: dict[str, dict[str, np.ndarray]] = {"main": {part: raw_features(x) for part, x in images.items()}}
    elif images["train"].ndim == 3:
        rows = {"main": {part: pooled(arm, shown(x)) for part, x in images.items()}}
    else:
        found = {part: volume_features(arm, x) for part, x in images.items()}
        ways = list(found["train"])
        rows = {way: {part: values[way] for part, values in found.items()} for way in ways}
        rows["main"] = {part: np.concatenate([values[way] for way in ways], axis=1) for part, values in found.items()}
    return {way: classify(values, labels, split) for way, values in rows.items()}


# --- segmentation


@dataclass
class Case:
    """A volume of axial slices on a square canvas.

    Args:
        name: File.
        planes: (S, 1, 64, 64) normalised as in pretraining.
        labels: (S, H, W) as displayed.
        canvas: Side of the square in pixels of the volume.
    """

    name: str
    planes: Tensor
    labels: np.ndarray
    canvas: int


def load_case(shared: Path, name: str) -> Case:
    """Read a hippocampus volume and its label; intensities from the 0.5 to the 99.5 percentile of the body, as in pretraining."""
    import nibabel

    folder = shared / "msd_hippocampus"
    sample = lookup("domain", "mri")().read([folder / "images" / name], series_id="case")
    label: Any = nibabel.as_closest_canonical(nibabel.load(folder / "labels" / name))  # type: ignore[attr-defined, no-untyped-call]
    stats = sample.meta.stats
    volume = (np.asarray(sample.image[0], np.float32) - stats["p00_5"]) / max(stats["p99_5"] - stats["p00_5"], 1e-6)
    planes = display(np.moveaxis(np.clip(volume, 0, 1), 2, 0), 2)
    truth = display(np.moveaxis(np.asarray(label.dataobj).astype(np.int64), 2, 0), 2)
    side = max(planes.shape[1:])
    square = np.zeros((len(planes), side, side), np.float32)
    top, left = _corner(planes.shape[1:], side)
    square[:, top : top + planes.shape[1], left : left + planes.shape[2]] = planes
    x = functional.interpolate(torch.from_numpy(square)[:, None], size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return Case(name, x, np.ascontiguousarray(truth), side)


def _corner(shape: Sequence[int], side: int) -> tuple[int, int]:
    return (side - shape[0]) // 2, (side - shape[1]) // 2


def maps(arm: Arm | None, x: Tensor) -> list[Tensor]:
    """Return the maps of all stages, (S, C_i, h_i, w_i); without an arm, the 7 x 7 pixels around each pixel."""
    if arm is None:
        return [functional.unfold(x, 7, padding=3).reshape(len(x), 49, *x.shape[2:])]
    with evaluation_mode(arm.slices):
        return list(arm.slices.forward_features(x).pyramid)


def _large(level: Tensor) -> Tensor:
    return functional.interpolate(level, size=(SIZE, SIZE), mode="bilinear", align_corners=False)


def resized_labels(case: Case) -> np.ndarray:
    """Return labels at the pixels of the view, (S, 64, 64); -1 beside the slice."""
    top, left = _corner(case.labels.shape[1:], case.canvas)
    square = np.full((len(case.labels), case.canvas, case.canvas), -1, np.int64)
    square[:, top : top + case.labels.shape[1], left : left + case.labels.shape[2]] = case.labels
    at = ((np.arange(SIZE) + 0.5) * case.canvas / SIZE).astype(int)
    return square[:, at][:, :, at]


def pixel_rows(arm: Arm | None, case: Case, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return features and labels of as many pixels of each class, drawn from one volume."""
    labels = resized_labels(case)
    picked = []
    for value in (0, *STRUCTURES):
        places = np.argwhere(labels == value)
        picked.append(places[rng.permutation(len(places))[: 10 * PIXELS]])
    at = np.concatenate(picked)
    rows = [
        np.concatenate([_large(level[s : s + 1])[0][:, at[at[:, 0] == s, 1], at[at[:, 0] == s, 2]].T for level in levels], axis=1)
        for levels in [maps(arm, case.planes)]
        for s in np.unique(at[:, 0])
    ]
    order = np.argsort(at[:, 0], kind="stable")
    return np.concatenate(rows), labels[tuple(at[order].T)]


@dataclass
class PixelModel:
    """Linear scores per class: background, anterior, posterior.

    Args:
        weight: (E, 3).
        bias: (3,).
        offset: Added to the background.
    """

    weight: Tensor
    bias: Tensor
    offset: float = 0.0

    def scores(self, levels: Sequence[Tensor], case: Case) -> np.ndarray:
        """Return (S, 3, H, W) at the pixels of the volume; the linear map comes before enlarging, which is linear too."""
        total, start = torch.zeros(()), 0
        for level in levels:
            weight = self.weight[start : start + level.shape[1]]
            total = total + _large(torch.einsum("schw,ck->skhw", level, weight))
            start += level.shape[1]
        total = functional.interpolate(
            total + self.bias[:, None, None], size=(case.canvas, case.canvas), mode="bilinear", align_corners=False
        )
        top, left = _corner(case.labels.shape[1:], case.canvas)
        return total[:, :, top : top + case.labels.shape[1], left : left + case.labels.shape[2]].numpy()


def fit_pixels(arm: Arm | None, cases: Sequence[Case], seed: int) -> PixelModel:
    """Fit one ridge regression per class on balanced pixels, grouped by patient; then choose the background's offset on the same volumes."""
    rng = np.random.default_rng(seed)
    parts = [pixel_rows(arm, case, rng) for case in cases]
    x, y = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
    groups = [case.name for case, part in zip(cases, parts) for _ in part[1]]
    models = [fit_linear(x, (y == value).astype(float), groups, task="regression") for value in (0, *STRUCTURES)]
    weight = np.stack([model.weight[:, 0] / model.scale for model in models], axis=1)
    bias = np.array([model.bias[0] - (model.mean / model.scale) @ model.weight[:, 0] for model in models])
    fitted = PixelModel(torch.from_numpy(weight).float(), torch.from_numpy(bias).float())
    known = [fitted.scores(maps(arm, case.planes), case) for case in cases]
    offsets = np.linspace(-0.2, 0.6, 17)
    merits = [np.mean([mean_dice(s, case.labels, o) for s, case in zip(known, cases)]) for o in offsets]
    fitted.offset = float(offsets[int(np.argmax(merits))])
    return fitted


def mean_dice(scores: np.ndarray, labels: np.ndarray, offset: float) -> float:
    """Return the mean Dice of both structures over a volume."""
    found = (scores + np.array([offset, 0, 0])[:, None, None]).argmax(axis=1)
    return float(
        np.mean([2 * ((found == k) & (labels == k)).sum() / max((found == k).sum() + (labels == k).sum(), 1) for k in STRUCTURES])
    )


def segmentation(arm: Arm | None, shared: Path, split: str, seed: int, limit: int | None = None) -> dict[str, Any]:
    """Fit on the first labelled patients and return the mean Dice of each patient of a split."""
    rows = read_table(shared / "msd_hippocampus" / "split.csv")
    train = sorted((row for row in rows if row["split"] == "train"), key=lambda row: int(row["few_label_rank"]))[:LABELLED]
    model = fit_pixels(arm, [load_case(shared, row["file"]) for row in train], seed)
    files = sorted(row["file"] for row in rows if row["split"] == split)[:limit]
    cases = (load_case(shared, name) for name in files)
    dice = [mean_dice(model.scores(maps(arm, case.planes), case), case.labels, model.offset) for case in cases]
    return {"main": {"patient": files, "dice": dice}, "offset": model.offset}


# --- leakage


def held_out_hashes(shared: Path) -> set[str]:
    """Return the pixel hashes of every image that is evaluated or held out: MedMNIST, hippocampus, chest radiographs."""
    found = set()
    for name in MEDMNIST:
        for split in ("val", "test"):
            found |= {content_hash(image) for image in medmnist(shared, name, split)[0]}
    mri, xray = lookup("domain", "mri")(), lookup("domain", "xray")()
    for row in read_table(shared / "msd_hippocampus" / "split.csv"):
        if row["split"] != "train":
            sample = mri.read([shared / "msd_hippocampus" / "images" / row["file"]], series_id="held out")
            found.add(content_hash(sample.image[0]))
    for row in read_table(shared / "cxr_hannover" / "metadata.csv"):
        if row["split"] != "train":
            sample = xray.read([shared / "cxr_hannover" / "images" / row["file"]], series_id="held out")
            found.add(content_hash(sample.image[0]))
    return found


def trained_hashes(run: Path) -> Iterator[str]:
    """Yield the pixel hash of every item of a run but clips, as its store holds them."""
    recipe = Recipe.load(run / "recipe.yaml")
    items = read_items(run / "items.parquet")
    for name, section in recipe.sources.items():
        domain = lookup("domain", section.domain.name)(**section.domain.args)
        reader = StoreReader(store_folder(section, domain))
        for item in items:
            if item.source == name and reader.record(item.series_id).kind != "clip":
                yield content_hash(np.asarray(reader.read(item.series_id).image)[0])


def check_apart(run: Path, held_out: set[str]) -> int:
    """Refuse a run that was trained on a held-out image.

    Returns:
        Items that were compared.

    Raises:
        LeakageError: With the number of such items.
    """
    hashes = list(trained_hashes(run))
    both = sum(value in held_out for value in hashes)
    if both:
        raise LeakageError(f"{both} of {len(hashes)} training items hold the pixels of an image that is held out; select others")
    return len(hashes)


# --- one cell


def probe(arm: Arm | None, shared: Path, out: Path, *, split: str, seed: int, tasks: Sequence[str] = TASKS) -> None:
    """Probe all tasks of one arm; results that are there already stay."""
    out.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        target = out / f"{task}_{split}.json"
        if target.exists():
            continue
        begin = time.perf_counter()
        found = segmentation(arm, shared, split, seed) if task == "hippocampus" else classification(arm, shared, task, split)
        write_atomic(target, json.dumps({"task": task, "split": split, "seconds": time.perf_counter() - begin, **found}).encode())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shared", type=Path)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, help="run folder of a pretraining")
    what.add_argument("--random", type=Path, help="recipe whose encoder is probed untrained")
    what.add_argument("--raw", action="store_true", help="raw pixels")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", choices=("val", "test"), default="val")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    options = parser.parse_args(argv)
    shared = options.shared.resolve()
    if options.run is not None:
        check_apart(options.run, held_out_hashes(shared))
    arm = load_arm(options.run) if options.run else random_arm(options.random, options.seed) if options.random else None
    probe(arm, shared, options.out, split=options.split, seed=options.seed, tasks=options.tasks)


if __name__ == "__main__":
    main()
