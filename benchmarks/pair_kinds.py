"""Card alice 10.5: what the kind of pairs is worth. Alice on phantoms with random, same-volume and matched pairs; linear organ probe.

    python -m benchmarks.pair_kinds --folder runs/pair_kinds
    python -m benchmarks.pair_kinds --folder runs/pair_kinds_alone --overrides "objective.weights={cls: 1}"

The second line leaves the two terms out that do not depend on the partner.

Torso phantoms (`medssl.phantoms`) are written and indexed; per seed a matcher is trained on the training phantoms (`--matcher body_axis`
needs none), their embeddings are written, and Alice is trained once per kind of pairs with everything else equal. Encoders are frozen and
tiles of the training size are read from phantoms that no run has seen: a token of the bottleneck is called by the organ that fills at
least half of its cell, `other` where none does and the cell lies in the body. A logistic regression is fitted on the validation phantoms
and scored on the test phantoms, balanced accuracy over seven classes; intervals by patient, over the mean of the seeds. The untrained
encoders of the same seeds stand beside. Everything is kept in `--folder`: kill the script and start it again to go on.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import RESULTS, markdown, rounded
from benchmarks.match_accuracy import PHANTOM_RECIPE, facts_of_run, finished, phantom_archive, span, train_matchers
from medssl import api, build
from medssl.correspondence import embed
from medssl.domains.mri import MRI
from medssl.errors import TrainingStopped
from medssl.evaluation.bootstrap import bootstrap_interval, paired_bootstrap
from medssl.evaluation.cohort import Case, Cohort
from medssl.evaluation.controls import random_init
from medssl.evaluation.features import evaluation_mode
from medssl.evaluation.linear_probe import fit_linear
from medssl.matching.base import MatchVolume, body_mask
from medssl.matching.network import tile_starts
from medssl.phantoms import ORGAN_NAMES
from medssl.recipe import Recipe
from medssl.seeding import counter_rng
from medssl.training.run_folder import facts_of_machine, now
from medssl.types import Box, DrawKey
from medssl.views.pipeline import Crop, VolumeViews
from medssl.weights import write_atomic

RECIPE = Path(__file__).parent / "recipes" / "alice_phantoms.yaml"
ARMS = ("random", "same_volume", "matched")
SPACING, TILE = 4.0, 24
"""Of the recipe: voxel in mm, crop in voxels."""
CLASSES = ("other", *ORGAN_NAMES)
TOKENS = 12
"""Tokens of one class taken from one phantom, at most: large organs must not rule the fit."""


# --- tokens and what they show


class Seen:
    """A phantom as the probe sees it: the volume on the recipe's voxels, and the class of each token.

    Args:
        case: The case.
        stride: Voxels per token.
    """

    def __init__(self, case: Case, stride: int) -> None:
        files = sorted(case.image.iterdir()) if case.image.is_dir() else [case.image]
        sample = MRI().read(files, series_id=case.id)
        assert sample.spacing_mm is not None and case.label is not None
        self.patient = case.patient_id
        volume = MatchVolume.of_sample(sample, case.id)
        self.size = [max(TILE, math.ceil((extent / SPACING - 1e-3) / stride) * stride) for extent in volume.extent_mm]
        edges = [n * SPACING for n in self.size]
        views = VolumeViews("volume", size=self.size, spacing_mm=SPACING, normalize="zscore")
        key = DrawKey(0, 0, 0)
        box = Box((0.0, 0.0, 0.0), (edges[0], edges[1], edges[2]))
        valid = np.ones(volume.shape, dtype=bool)
        crop = Crop(sample.image, valid, sample.spacing_mm, (0.0, 0.0, 0.0), box, sample.meta.stats, key, 0)
        self.image = views.apply([crop], [[views.draw(key, 0)]], "cpu")["volume"][0]  # (1, 1, *size)
        self.classes = token_classes(volume, body_mask(sample), case.label, [n // stride for n in self.size], stride)


def token_classes(volume: MatchVolume, body: np.ndarray, label: Path, grid: Sequence[int], stride: int) -> np.ndarray:
    """Return the class of each token, (*grid) int64: 0 other, k organ k, -1 where it is neither clearly one nor in the body.

    Every voxel of the label map belongs to the token whose centre is nearest; SegResNet's tokens are centred on the first voxel of their
    cell.
    """
    import nibabel

    image: Any = nibabel.load(label)  # type: ignore[attr-defined]
    labels = np.asarray(image.dataobj).astype(np.int64)
    voxels = np.argwhere(np.ones(labels.shape, dtype=bool))
    item = volume.to_item(voxels @ image.affine[:3, :3].T + image.affine[:3, 3])
    token = np.rint((item / SPACING - 0.5) / stride).astype(int)
    inside = ((token >= 0) & (token < np.asarray(grid))).all(axis=1)
    at = np.clip((item / volume.spacing_mm).astype(int), 0, np.asarray(volume.shape) - 1)
    place = np.ravel_multi_index(tuple(token[inside].T), tuple(grid))
    kinds = np.where(body[tuple(at.T)], labels.ravel(), len(CLASSES))[inside]  # the last kind is air
    counts = np.bincount(place * (len(CLASSES) + 1) + kinds, minlength=math.prod(grid) * (len(CLASSES) + 1))
    table = counts.reshape(-1, len(CLASSES) + 1)
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    found = np.where(shares.max(axis=1) >= 0.5, shares.argmax(axis=1), -1)
    return np.where(found == len(CLASSES), -1, found).reshape(tuple(grid))


def tokens_of(encoder: Any, image: torch.Tensor) -> np.ndarray:
    """Return the bottleneck of a volume (1, 1, *size) in tiles of the training size, means where they overlap, (*grid, E)."""
    stride = int(encoder.patch_size[0])
    size = image.shape[2:]
    grid = [n // stride for n in size]
    total, count = torch.zeros(*grid, encoder.embed_dim), torch.zeros(*grid, 1)
    with evaluation_mode(encoder):
        for start in tile_starts(size, (TILE,) * 3, stride):
            tile = image[(slice(None), slice(None), *(slice(s, s + TILE) for s in start))]
            deepest = encoder.forward_features(tile).pyramid[-1][0].permute(1, 2, 3, 0)
            at = tuple(slice(s // stride, (s + TILE) // stride) for s in start)
            total[at] += deepest
            count[at] += 1
    return (total / count).numpy()


def sample_tokens(encoder: Any, phantoms: Sequence[Seen]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return features (N, E), classes (N,) and patients of at most `TOKENS` tokens per class and phantom; the same ones for every encoder."""
    features, classes, patients = [], [], []
    for phantom in phantoms:
        rows = tokens_of(encoder, phantom.image).reshape(-1, encoder.embed_dim)
        rng = counter_rng("pair kinds tokens", phantom.patient)
        for kind in range(len(CLASSES)):
            places = np.flatnonzero(phantom.classes.ravel() == kind)
            taken = places[np.sort(rng.permutation(len(places))[:TOKENS])]
            features.append(rows[taken])
            classes += [kind] * len(taken)
            patients += [phantom.patient] * len(taken)
    return np.concatenate(features), np.asarray(classes), patients


def probe(encoder: Any, fit: Sequence[Seen], held: Sequence[Seen]) -> dict[str, Any]:
    """Fit on some phantoms and predict the tokens of others."""
    features, classes, patients = sample_tokens(encoder, fit)
    model = fit_linear(features, classes, patients, task="classification", classes=len(CLASSES))
    features, classes, patients = sample_tokens(encoder, held)
    return {"true": classes.tolist(), "predicted": model.predict(features).astype(int).tolist(), "patient": patients}


# --- training


def train(arm: str, seed: int, folder: Path, matcher: str, overrides: Sequence[str]) -> Path | str:
    """Pretrain one arm, or go on with it; return the run, or the sentence with which a monitor stopped it."""
    run = folder / arm / str(seed)
    if finished(run):
        return run
    stopped = run / "stopped.json"
    if stopped.exists():
        return str(json.loads(stopped.read_text())["message"])
    tool = f"{{name: embedding, weights: {folder / 'matcher' / str(seed)}}}" if matcher == "embedding" else f"{{name: {matcher}}}"
    sampler = f"{{pairs: matched, matcher: {tool}}}" if arm == "matched" else f"{{pairs: {arm}}}"
    changes = [f"data.index={folder / 'archive'}", f"data.sampler={sampler}", f"train.seed={seed}", f"out={run}"]
    try:
        result = api.pretrain(RECIPE, [*overrides, *changes], resume=True)
    except TrainingStopped as err:
        write_atomic(stopped, json.dumps({"message": str(err)}).encode())
        return str(err)
    if result.status != "finished":
        raise SystemExit(f"{arm} {seed}: {result.status}; start again to go on")
    return run


def untrained(seed: int) -> Any:
    """Return the recipe's encoder without training."""
    component = next(iter(Recipe.load(RECIPE, ["data.index=none", "out=none"]).encoders.values()))
    return random_init(lambda: build.build_encoder(component), seed).eval()


def compute(
    folder: Path, seeds: Sequence[int], arms: Sequence[str], matcher: str, patients: int, overrides: Mapping[str, Sequence[str]]
) -> None:
    """Write phantoms, train, probe; what is there is left alone."""
    data = phantom_archive(folder, patients)
    cohort = Cohort.load(data)
    seen: dict[str, list[Seen]] = {}
    for seed in seeds:
        for arm in ("untrained", *arms):
            out = folder / "cells" / f"{arm}_{seed}.json"
            if out.exists():
                continue
            found: Path | str | None = None
            if arm == "matched" and matcher == "embedding":
                run = train_matchers(folder, [seed], overrides["matcher"])[f"embedding_s{seed}"]
                embed(PHANTOM_RECIPE, run, [f"data.index={folder / 'archive'}", "out=none"])
            if arm != "untrained":
                found = train(arm, seed, folder, matcher, overrides["alice"])
            if isinstance(found, str):
                write_atomic(out, json.dumps({"stopped": found}).encode())
                continue
            encoder = untrained(seed) if found is None else build.load_encoder(found)
            if not seen:
                stride = int(encoder.patch_size[0])
                seen = {split: [Seen(case, stride) for case in cohort.split(split)] for split in ("val", "test")}
            out.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(out, json.dumps(probe(encoder, seen["val"], seen["test"])).encode())
            print(f"{now()} {arm} {seed} probed", flush=True)


# --- the table


def right_by_class(cell: Mapping[str, Any]) -> tuple[np.ndarray, list[str]]:
    """Return per patient the share of right tokens of each class (N, K), NaN without such a token, and the patients."""
    true, predicted, patient = np.asarray(cell["true"]), np.asarray(cell["predicted"]), np.asarray(cell["patient"])
    names = sorted(set(cell["patient"]))
    rows = np.full((len(names), len(CLASSES)), np.nan)
    for n, name in enumerate(names):
        for kind in range(len(CLASSES)):
            own = (patient == name) & (true == kind)
            if own.any():
                rows[n, kind] = float((predicted[own] == kind).mean())
    return rows, names


def merits(cell: Mapping[str, Any]) -> tuple[np.ndarray, list[str]]:
    """Return the balanced accuracy of each patient (N,), the mean over the classes it has, and the patients."""
    rows, names = right_by_class(cell)
    return np.nanmean(rows, axis=1), names


def summarise(folder: Path, seeds: Sequence[int], arms: Sequence[str]) -> dict[str, Any]:
    """Return a row per arm, and differences of arms on the seeds that both have."""
    cells: dict[str, dict[int, Mapping[str, Any]]] = {}
    stopped: dict[str, str] = {}
    for arm in ("untrained", *arms):
        for seed in seeds:
            path = folder / "cells" / f"{arm}_{seed}.json"
            if not path.exists():
                continue
            content = json.loads(path.read_text())
            if "stopped" in content:
                stopped[f"{arm}_{seed}"] = content["stopped"]
            else:
                cells.setdefault(arm, {})[seed] = content
    rows, values = [], {arm: {seed: merits(cell) for seed, cell in found.items()} for arm, found in cells.items()}
    for arm, found in values.items():
        names = next(iter(found.values()))[1]
        mean, low, high = bootstrap_interval(np.mean([v for v, _ in found.values()], axis=0), names)
        by_class = np.nanmean([np.nanmean(right_by_class(cell)[0], axis=0) for cell in cells[arm].values()], axis=0)
        row: dict[str, Any] = {"arm": arm, "balanced_accuracy": mean, "interval": [low, high]}
        row["seeds"] = {str(seed): float(v.mean()) for seed, (v, _) in found.items()}
        rows.append(row | {"by_class": dict(zip(CLASSES, by_class.tolist()))})
    differences = []
    for arm, other in (
        ("same_volume", "random"),
        ("matched", "same_volume"),
        ("matched", "random"),
        *((a, "untrained") for a in arms),
    ):
        common = sorted(set(values.get(arm, {})) & set(values.get(other, {})))
        if common:
            a, b = (np.mean([values[name][seed][0] for seed in common], axis=0) for name in (arm, other))
            mean, low, high = paired_bootstrap(a, b, values[arm][common[0]][1])
            by_seed = {str(seed): float((values[arm][seed][0] - values[other][seed][0]).mean()) for seed in common}
            differences.append({"arm": arm, "minus": other, "difference": mean, "interval": [low, high], "seeds": by_seed})
    return {"rows": rows, "differences": differences, "stopped": stopped, "chance": 1 / len(CLASSES)}


def last_of(run: Path) -> dict[str, Any]:
    """Return seed, steps and the mean of the losses and monitors over the last tenth of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = max(line["step"] for line in lines)
    names = {
        name for line in lines for name in line if name.startswith("loss_") or name.endswith(("entropy", "information", "spread"))
    }
    tail = [line for line in lines if line["step"] > 0.9 * last]
    means = {name: [line[name] for line in tail if line.get(name) is not None] for name in sorted(names)}
    facts = json.loads((run / "run.json").read_text())
    kept = {key: facts.get(key) for key in ("status", "seed", "items", "recipe_hash")}
    return {**kept, "steps": last, **{name: float(np.mean(v)) for name, v in means.items() if v}}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/pair_kinds"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--matcher", choices=("embedding", "body_axis"), default="embedding", help="of the matched pairs")
    parser.add_argument(
        "--phantoms", type=int, default=80, help="a quarter for testing, 15 % to fit the probe, the rest to train on"
    )
    parser.add_argument("--overrides", nargs="*", default=[], help="changes to the recipe of Alice, for trials")
    parser.add_argument("--matcher-overrides", nargs="*", default=[], help="changes to the matcher's recipe, for trials")
    parser.add_argument("--collect", action="store_true", help="only gather what is there")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if not options.collect:
        changes = {"alice": options.overrides, "matcher": options.matcher_overrides}
        compute(options.folder, options.seeds, options.arms, options.matcher, options.phantoms, changes)
    runs = {f"{arm}_{seed}": options.folder / arm / str(seed) for arm in options.arms for seed in options.seeds}
    matchers = {f"matcher_{seed}": options.folder / "matcher" / str(seed) for seed in options.seeds}
    content: dict[str, Any] = rounded(
        {
            "benchmark": "pair_kinds",
            "when": now(),
            "settings": {
                "phantoms": options.phantoms,
                "matcher": options.matcher,
                "tokens": TOKENS,
                "seeds": options.seeds,
                "overrides": options.overrides,
            },
            **summarise(options.folder, options.seeds, options.arms),
            "runs": {name: last_of(run) for name, run in runs.items() if finished(run)}
            | {name: facts_of_run(run) for name, run in matchers.items() if finished(run)},
            **{key: facts_of_machine()[key] for key in ("hardware", "versions", "git")},
        }
    )
    shown = ("arm", "balanced_accuracy", "interval", "seeds")
    print(markdown([{key: span(row[key]) for key in shown} for row in content["rows"]]) + "\n")
    print(markdown([{key: span(value) for key, value in row.items()} for row in content["differences"]]))
    for name, sentence in content["stopped"].items():
        print(f"{name} was stopped: {sentence}")
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out / "pair_kinds.json", (json.dumps(content, indent=1) + "\n").encode())
    return content


if __name__ == "__main__":
    main()
