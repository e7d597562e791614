"""Does the joint objective find shapes in stacks? 200 synthetic shapes of 4 classes, 20 epochs, through `medssl pretrain` (card 9.9).

    python -m benchmarks.joint_shapes

A shape is told by how its cross-section changes along the slices (cylinder, ball, cone, hourglass). Every slice is moved and turned in its
plane by itself, so that no single slice and no fixed place in the plane says the class; sizes overlap. The probe is linear, on the volume
embedding Z of 200 other shapes, five folds; beside it the same encoder untrained. Noise and sizes were chosen by the untrained encoder alone;
everything else was fixed before the first run. Every arm and seed is kept in `--folder`: kill the script and start it again to go on.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from benchmarks.common import Check, Result, finish, kept, parser
from medssl import api, build, data_sources
from medssl.archive.index import index
from medssl.evaluation.features import embed
from medssl.layers.standardise import standardised
from medssl.recipe import PretrainRecipe, Recipe
from medssl.training import checkpoint

CLASSES = ("cylinder", "ball", "cone", "hourglass")
GAIN, NMI = 0.15, 0.5
SLICES, SIDE = 16, 32
NOISE = 150.0
"""As strong as the shape itself. With less, the untrained encoder has little room above it (1.00 at 20, 0.74 at 80, 0.56 here)."""
SWAV: dict[str, Any] = {"mode": "swav", "intra_prototypes": 16, "inter_prototypes": 8, "intra_queue": 512, "inter_queue": 128}
DEEPCLUSTER: dict[str, Any] = {"mode": "deepcluster", "intra_prototypes": [16], "inter_prototypes": [4, 4, 4]}
ARMS = {
    "swav": {**SWAV, "standardise": False},
    "swav standardised": {**SWAV, "standardise": True},
    "deepcluster": {**DEEPCLUSTER, "standardise": False},
    "deepcluster standardised": {**DEEPCLUSTER, "standardise": True},
}


def radius(kind: str, t: np.ndarray) -> np.ndarray:
    """Radius of the cross-section at t, -1 to 1 along the shape, 1 at its widest."""
    profile = {
        "cylinder": np.ones_like(t) * 0.8,
        "ball": np.sqrt(1 - 0.97 * t**2),
        "cone": 0.6 - 0.4 * t,
        "hourglass": 0.2 + 0.8 * np.abs(t),
    }
    return profile[kind]


def shape(kind: str, rng: np.random.Generator) -> np.ndarray:
    """One volume (SIDE, SIDE, SLICES)."""
    t = np.linspace(-1, 1, SLICES)
    size = rng.uniform(0.4, 1.0) * SIDE / 3
    x, y = np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij")
    slices = []
    for r in radius(kind, t) * size:
        centre = SIDE / 2 + rng.uniform(-SIDE / 8, SIDE / 8, 2)
        angle, ratio = rng.uniform(0, np.pi), rng.uniform(0.8, 1.0)
        u = (x - centre[0]) * np.cos(angle) + (y - centre[1]) * np.sin(angle)
        v = (y - centre[1]) * np.cos(angle) - (x - centre[0]) * np.sin(angle)
        slices.append(np.clip(r - np.hypot(u * np.sqrt(ratio), v / np.sqrt(ratio)) + 0.5, 0, 1))
    volume = 150 * np.stack(slices, axis=-1) * rng.uniform(0.7, 1.3) + 50 + rng.normal(0, NOISE, (SIDE, SIDE, SLICES))
    return np.asarray(volume, dtype=np.float32)


def archive(folder: Path, count: int, seed: int) -> tuple[Path, dict[str, int]]:
    """Write shapes as NIfTI, index them; return the index and the class of each file name."""
    import nibabel as nib

    rng = np.random.default_rng(seed)
    images = folder / "images"
    images.mkdir(parents=True)
    labels = {}
    for number in range(count):
        image: Any = nib.Nifti1Image(shape(CLASSES[number % 4], rng), np.diag([1.0, 1.0, 2.0, 1.0]))  # type: ignore[attr-defined, no-untyped-call]
        nib.save(image, images / f"shape_{number}.nii.gz")  # type: ignore[attr-defined]
        labels[f"shape_{number}.nii.gz"] = number % 4
    index([images], folder / "index", modality="MR")
    return folder / "index", labels


def recipe_of(path: Path, out: Path, arm: str, *, seed: int, steps: int, batch: int) -> Any:
    """The recipe of an arm."""
    views = {
        **{"kind": "stack", "size": SIDE, "slices": SLICES // 2, "count": 2, "area": [0.6, 1.0], "flip": [0.5, 0.5]},
        **{"noise_std": 0.1, "contrast": [0.8, 1.25], "rotate_deg": 20},
    }
    encoder = {
        **{"name": "slice_volume", "dim": 32, "chunk": 1024, "slice_encoder": {"model": "test_resnet"}},
        "aggregator": {"depth": 2, "heads": 4, "dim_head": 16, "hidden_dim": 64},
    }
    train = {"steps": steps, "batch": batch, "seed": seed, "checkpoint_every": steps, "monitor_items": 0, "tensorboard": False}
    return Recipe.parse(
        {
            **{"kind": "pretrain", "sources": {"shapes": {"index": str(path), "domain": "mri", "views": views}}},
            **{"encoders": {"encoder": encoder}, "out": str(out)},
            "objective": {"name": "intra_inter_clustering", "projector_dim": 32, "freeze_prototypes": 20, "places": 8, **ARMS[arm]},
            **{"optim": {"lr": 2e-3, "schedule": {"warmup_steps": 20}}, "train": {**train, "log_every": 10}},
        }
    )


def features(encoder: nn.Module, recipe: PretrainRecipe, path: Path, labels: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Volume embeddings of all shapes of an index, and their classes."""
    section = recipe.sources["shapes"].model_copy(update={"index": str(path)})
    shelf = data_sources.fill_shelf("shapes", section)
    series = [row.series_id for row in shelf.rows]
    source = data_sources.evaluation_source("shapes", shelf, section, series)
    z, _ = embed(encoder, data_sources.images_and_ids(source, torch.device("cpu"), 16))
    return z, np.array([labels[shelf.archive.files(name)[0].name] for name in series])


def probe(z: np.ndarray, classes: np.ndarray, folds: int = 5) -> float:
    """Accuracy of ridge regression on standardised features, each shape predicted by the folds it is not in."""
    order = np.random.default_rng(0).permutation(len(z))
    hits = 0
    for fold in range(folds):
        test = order[fold::folds]
        fit = np.setdiff1d(order, test)
        mean, std = z[fit].mean(axis=0), z[fit].std(axis=0) + 1e-6
        x = np.c_[(z - mean) / std, np.ones(len(z))]
        weight = np.linalg.solve(x[fit].T @ x[fit] + np.eye(x.shape[1]), x[fit].T @ np.eye(4)[classes[fit]])
        hits += int(((x[test] @ weight).argmax(axis=1) == classes[test]).sum())
    return hits / len(z)


def mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """Normalised mutual information of two labellings: 2 I / (H + H)."""
    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1)
    joint = table / table.sum()
    rows, columns = joint.sum(axis=1), joint.sum(axis=0)

    def entropy(p: np.ndarray) -> float:
        return float(-(p[p > 0] * np.log(p[p > 0])).sum())

    both = entropy(rows) + entropy(columns)
    return 2 * (both - entropy(joint.ravel())) / both if both else 0.0


def prototypes(recipe: PretrainRecipe, run: Path, items: int) -> list[Tensor]:
    """The prototypes of L_inter in the newest checkpoint of a run."""
    from torch.distributed.checkpoint.state_dict_loader import load

    objective, _ = build.build_objective(recipe, items)
    state = {"model": objective.state_dict()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process without a process group is what we mean
        load(state, checkpoint_id=str(checkpoint.step_folders(run / "checkpoints")[-1]), no_dist=True)
    objective.load_state_dict(state["model"])
    return [head.weight[: int(head.active)].detach() for head in objective.inter.heads]


def play(arm: str, seed: int, *, items: int, epochs: int, batch: int) -> dict[str, Any]:
    """One run: pretrain, probe Z, compare with the untrained encoder; return its row."""
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Path(folder), arm, seed=seed, items=items, epochs=epochs, batch=batch)
    return {"mode": arm, "seed": seed, **found}


def compare(folder: Path, arm: str, *, seed: int, items: int, epochs: int, batch: int) -> dict[str, Any]:
    """Pretrain in a folder; return accuracies, mutual information, loss and seconds."""
    seen, _ = archive(folder / "seen", items, seed)
    other, labels = archive(folder / "other", items, 10_000 + seed)
    run, steps = folder / "run", epochs * items // batch
    recipe = recipe_of(seen, run, arm, seed=seed, steps=steps, batch=batch)
    untrained = build.build_objective(recipe, items)[0].encoder.eval()
    random, classes = features(untrained, recipe, other, labels)
    begin = time.perf_counter()
    api.pretrain(recipe)
    seconds = time.perf_counter() - begin
    z, _ = features(build.load_encoder(run), recipe, other, labels)
    heads = prototypes(recipe, run, items)
    seen_as = standardised(torch.from_numpy(z)) if ARMS[arm]["standardise"] else torch.from_numpy(z)
    rows = normalize(seen_as, dim=1)
    scores = [mutual_information((rows @ head.T).argmax(dim=1).numpy(), classes) for head in heads]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    inter = [line["loss_inter"] for line in lines if "loss_inter" in line]
    log_k = float(np.mean([math.log(len(head)) for head in heads]))
    return {
        "accuracy": probe(z, classes),
        "accuracy_untrained": probe(random, classes),
        "nmi": float(np.mean(scores)),
        "loss_inter_over_ln_k": float(np.mean(inter[-3:])) / log_k,
        "train_s": seconds,
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options_parser = parser(__doc__, repeats=3)
    options_parser.add_argument("--items", type=int, default=200)
    options_parser.add_argument("--epochs", type=int, default=20)
    options_parser.add_argument("--batch", type=int, default=10)
    options_parser.add_argument("--folder", type=Path, default=Path("runs/joint_shapes"))
    options_parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    options = options_parser.parse_args(argv)
    settings = {name: getattr(options, name) for name in ("items", "epochs", "batch")}
    rows: list[dict[str, Any]] = []
    for seed in range(options.repeats):
        for arm in options.arms:
            path = options.folder / f"{arm.replace(' ', '_')}_{seed}.json"
            rows.append(kept(path, settings, partial(play, arm, seed, **settings)))
            print(rows[-1], flush=True)
    checks = []
    for arm in options.arms:
        own = [row for row in rows if row["mode"] == arm]
        gains = [row["accuracy"] - row["accuracy_untrained"] for row in own]
        checks.append(Check(f"{arm}: probe on Z minus untrained, mean of seeds", float(np.mean(gains)), GAIN))
        checks.append(
            Check(
                f"{arm}: NMI of assignments with class, mean of seeds and heads", float(np.mean([row["nmi"] for row in own])), NMI
            )
        )
    notes = [
        f"chance is 0.25; {options.items} shapes are probed, so one standard error is about {0.5 * options.items**-0.5:.2g}",
        "shapes that are probed are not those of the pretraining; N and spacing are equal in all, so positions tell nothing",
    ]
    return finish(Result("joint_shapes", rows, checks, vars(options), notes), options.out)


if __name__ == "__main__":
    main()
