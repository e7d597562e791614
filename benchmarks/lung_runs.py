"""Lung ultrasound in five folds of patients: pretraining on the clips of a fold's training patients, then regular or not from frozen clips.

    python -m benchmarks.lung_runs ../shared/data --folder runs/lung
    python -m benchmarks.lung_runs ../shared/data --folder runs/lung --collect

28 clips of 15 patients (`us_lung_video`), 17 of them regular, of 5 patients. The patients of a fold are in neither the pretraining nor the fit
of its probe. Every cell (arm and fold) is computed once and kept in `cells/`: kill the script and start it again to go on. `--collect` gathers
what is there into `benchmarks/results/lung_runs.json` and prints the tables.

So few patients carry no claim that one arm is better than another, and most regular clips come from one place, the others from elsewhere: what
tells them apart need not be the lung. Settings are those of `echo_runs`, chosen on phantoms; nothing was chosen on these clips.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.alice_runs import pretrain
from benchmarks.common import RESULTS, markdown, rounded
from benchmarks.echo_runs import chosen, settings_of, text_of
from benchmarks.joint_data import read_table, write_table
from medssl import api, build, data_sources
from medssl.archive.index import index
from medssl.errors import RequestError
from medssl.evaluation.bootstrap import bootstrap_interval, paired_bootstrap
from medssl.evaluation.clips import PixelTokens
from medssl.evaluation.controls import random_init
from medssl.evaluation.features import embed
from medssl.evaluation.linear_probe import fit_linear
from medssl.evaluation.scores import balanced_accuracy, roc_auc
from medssl.training.run_folder import facts_of_machine, now
from medssl.weights import write_atomic

RECIPES = Path(__file__).resolve().parent / "recipes"
TRAINED = {"discovr": RECIPES / "lung_discovr.yaml", "video_mae": RECIPES / "lung_video_mae.yaml"}
ARMS = (*TRAINED, "random", "raw")
FOLDS = 5
NEIGHBOURS = 5
TEMPERATURE = 0.07
DRAWS = 2000
PROBES = ("linear", "knn")


def deal(patients: Mapping[str, int], folds: int = FOLDS) -> dict[str, int]:
    """Return patient -> fold: the patients of each class in turn, so that every fold has some of both.

    Args:
        patients: Patient -> class.
        folds: Folds.
    """
    dealt: dict[str, int] = {}
    start = 0
    for kind in sorted(set(patients.values())):
        names = sorted((name for name in patients if patients[name] == kind), key=lambda name: (len(name), name))
        dealt |= {name: (start + number) % folds for number, name in enumerate(names)}
        start += len(names)
    return dealt


def prepare(shared: Path, folder: Path) -> Path:
    """Index the clips with their patients, once."""
    rows = read_table(shared / "us_lung_video" / "metadata.csv")
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "splits.csv"
    write_table(table, [{"file": Path(row["file"]).name, "split": "train", "patient": f"lung {row['patient']}"} for row in rows])
    if not (folder / "index" / "series.parquet").is_file():
        index([shared / "us_lung_video"], folder / "index", modality="US", splits=table)
    return folder


class Clips:
    """The clips of the index: what they are called, whose they are, and in which fold.

    Args:
        shared: The shared test data.
        data: Folder of the index.
        overrides: Changes to the recipes.
    """

    def __init__(self, shared: Path, data: Path, overrides: Sequence[str] = ()) -> None:
        recipe = api.load_recipe(TRAINED["discovr"], [f"data.index={data / 'index'}", *overrides, "out=none"])
        self.section, self.encoder = recipe.sources["main"], recipe.encoders["encoder"]
        self.shelf = data_sources.fill_shelf("main", self.section)
        table = {Path(row["file"]).name: row for row in read_table(shared / "us_lung_video" / "metadata.csv")}
        rows = [table[self.shelf.archive.files(row.series_id)[0].name] for row in self.shelf.rows]
        self.series = [row.series_id for row in self.shelf.rows]
        self.patients = [row["patient"] for row in rows]
        self.irregular = np.array([row["label"] != "regular" for row in rows])
        dealt = deal({name: int(wrong) for name, wrong in zip(self.patients, self.irregular)})
        self.fold = np.array([dealt[name] for name in self.patients])
        if self.shelf.summary.failed:
            raise RequestError(
                f"{len(self.shelf.summary.failed)} clips could not be read; all are needed: {self.shelf.summary.failed}"
            )

    def condition(self, fold: int) -> str:
        """Return the SQL condition of the clips that a fold trains on."""
        held = ", ".join(f"'{name}'" for name, own in zip(self.series, self.fold) if own == fold)
        return f"series_id not in ({held})"

    def embed(self, encoder: nn.Module) -> np.ndarray:
        """Return the features of the middle of every clip, (N, E)."""
        source = data_sources.evaluation_source("main", self.shelf, self.section, self.series)
        return embed(encoder, data_sources.images_and_ids(source, torch.device("cpu"), batch=8))[0]


def changes_of(arm: str, overrides: Sequence[str]) -> list[str]:
    """Return the changes to the recipe of an arm: those that phantoms led to, but for the number of steps, and further ones."""
    return [*(change for change in chosen(arm) if not change.startswith("train.steps=")), *overrides]


def encoder_of(arm: str, seed: int, clips: Clips, run: Path | None) -> nn.Module:
    """Return the encoder of an arm; pixels for `raw`."""
    if run is not None:
        return build.load_encoder(run)  # type: ignore[no-any-return]
    encoder = random_init(lambda: build.build_encoder(clips.encoder), seed)
    return PixelTokens(encoder.patch_size) if arm == "raw" else encoder  # type: ignore[arg-type]


def scores(features: np.ndarray, clips: Clips, fold: int, seed: int) -> dict[str, list[float]]:
    """Return how irregular the clips of a fold look, 0 to 1, to probes fitted on the others."""
    held = clips.fold == fold
    fit = np.flatnonzero(~held)
    patients = [clips.patients[int(n)] for n in fit]
    model = fit_linear(features[fit], clips.irregular[fit].astype(int), patients, task="classification", classes=2, seed=seed)
    logits = (features[held] - model.mean) / model.scale @ model.weight + model.bias
    chance = 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    similarity = unit[held] @ unit[fit].T
    near = np.argsort(-similarity, axis=1)[:, :NEIGHBOURS]
    weight = np.exp(np.take_along_axis(similarity, near, axis=1) / TEMPERATURE)
    vote = (weight * clips.irregular[fit][near]).sum(axis=1) / weight.sum(axis=1)
    return {"linear": chance.tolist(), "knn": vote.tolist()}


def compute(
    shared: Path, data: Path, folder: Path, arms: Sequence[str], folds: Sequence[int], seed: int, overrides: Sequence[str] = ()
) -> None:
    """Train and probe the cells that are missing."""
    clips: Clips | None = None
    for fold in folds:
        for arm in arms:
            path = folder / "cells" / f"{arm}_fold{fold}_seed{seed}.json"
            if path.exists():
                if (before := json.loads(path.read_text())["overrides"]) != changes_of(arm, overrides):
                    raise SystemExit(f"{path}: computed with {before}, now {changes_of(arm, overrides)}; choose another folder")
                continue
            clips = clips or Clips(shared, data, overrides)
            begin, run = time.perf_counter(), None
            if arm in TRAINED:
                where = [f"data.index={data / 'index'}", f"data.where={clips.condition(fold)}"]
                changes = [*where, *changes_of(arm, overrides), f"train.seed={seed}"]
                run = pretrain(TRAINED[arm], folder / f"{arm}_fold{fold}_seed{seed}", changes)
            trained = time.perf_counter() - begin
            held = np.flatnonzero(clips.fold == fold)
            found: dict[str, Any] = {
                "arm": arm,
                "fold": fold,
                "seed": seed,
                "seconds": trained,
                "overrides": changes_of(arm, overrides),
                "when": now(),
            }
            found |= {"clip": [clips.series[n] for n in held], "patient": [clips.patients[n] for n in held]}
            found["irregular"] = clips.irregular[held].astype(int).tolist()
            found["score"] = scores(clips.embed(encoder_of(arm, seed, clips, run)), clips, fold, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(found).encode())
            print(f"{now()} {arm} fold {fold}: {len(held)} clips, {trained:.0f} s trained", flush=True)


# --- the table


def summarise(cells: Sequence[Mapping[str, Any]], draws: int = DRAWS) -> dict[str, Any]:
    """Return rows per arm and probe over the clips of all folds, and paired differences of DISCOVR to every other arm."""
    by_arm: dict[str, list[Mapping[str, Any]]] = {}
    for cell in sorted(cells, key=lambda cell: cell["fold"]):
        by_arm.setdefault(cell["arm"], []).append(cell)
    folds = {arm: [cell["fold"] for cell in group] for arm, group in by_arm.items()}
    if len({tuple(found) for found in folds.values()}) > 1:
        raise SystemExit(f"arms have different folds: {folds}; run what is missing first")
    patients = [name for cell in next(iter(by_arm.values())) for name in cell["patient"]]
    tables = {(arm, probe): _table(group, probe) for arm, group in by_arm.items() for probe in PROBES}
    statistics = {"auroc": roc_auc, "balanced_accuracy": _balanced}
    rows, differences = [], []
    for (arm, probe), table in tables.items():
        for metric, statistic in statistics.items():
            value, low, high = bootstrap_interval(table, patients, draws=draws, statistic=statistic)
            row = {"arm": arm, "probe": probe, "metric": metric, "value": value, "interval": [low, high]}
            rows.append({**row, "clips": len(table), "patients": len(set(patients)), "folds": len(folds[arm])})
    for (arm, probe), table in tables.items():
        if arm == "discovr" or "discovr" not in by_arm:
            continue
        for metric, statistic in statistics.items():
            value, low, high = paired_bootstrap(tables["discovr", probe], table, patients, draws=draws, statistic=statistic)
            row = {"discovr minus": arm, "probe": probe, "metric": metric, "difference": value, "interval": [low, high]}
            differences.append(row)
    return {"rows": rows, "differences": differences}


def _table(group: Sequence[Mapping[str, Any]], probe: str) -> np.ndarray:
    """Return (N, 2): target and score of the clips of all folds."""
    pairs = [pair for cell in group for pair in zip(cell["irregular"], cell["score"][probe])]
    return np.array(pairs, dtype=np.float64)


def _balanced(rows: np.ndarray) -> float:
    return balanced_accuracy(np.stack([rows[:, 0], rows[:, 1] > 0.5], axis=1))


def collect(folder: Path, seed: int, out: Path, draws: int = DRAWS) -> dict[str, Any]:
    """Write `lung_runs.json` and print the tables."""
    cells = [json.loads(path.read_text()) for path in sorted((folder / "cells").glob(f"*_seed{seed}.json"))]
    if not cells:
        raise SystemExit(f"no cell of seed {seed} in {folder / 'cells'}; run without --collect first")
    facts = facts_of_machine()
    content = rounded(
        {"benchmark": "lung_runs", "when": now(), "seed": seed, **summarise(cells, draws)}
        | {"train_s": {arm: [c["seconds"] for c in cells if c["arm"] == arm] for arm in TRAINED}}
        | {"recipes": {arm: path.read_text() for arm, path in TRAINED.items()}}
        | {"overrides": settings_of(cells)}
        | {
            "notes": [
                "15 patients: no claim that an arm is better",
                "most regular clips come from one place, the others from elsewhere",
            ]
        }
        | {key: facts[key] for key in ("hardware", "versions", "git")}
    )
    for key in ("rows", "differences"):
        print(markdown([{k: text_of(v) for k, v in row.items()} for row in content[key]]) + "\n")
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "lung_runs.json", (json.dumps(content, indent=1) + "\n").encode())
    return dict(content)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shared", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("runs/lung"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--folds", nargs="+", type=int, choices=range(FOLDS), default=list(range(FOLDS)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overrides", nargs="*", default=[], help="changes to the recipes, for trials")
    parser.add_argument("--collect", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if not options.collect:
        data = prepare(options.shared.resolve(), options.folder / "data")
        compute(options.shared.resolve(), data, options.folder, options.arms, options.folds, options.seed, options.overrides)
    return collect(options.folder, options.seed, options.out)


if __name__ == "__main__":
    main()
