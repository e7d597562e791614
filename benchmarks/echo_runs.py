"""Labelled echo phantoms from end to end: pretraining of every arm and seed, then frozen ejection fraction and left-ventricle segmentation.

    python -m benchmarks.echo_runs --folder runs/echo
    python -m benchmarks.echo_runs --folder runs/echo --collect

The first run draws the cohort and indexes it. Every cell (arm and seed) is trained and probed once and kept in `cells/`: kill the script and
start it again to go on. `--split val` probes the validation patients, which is what settings were chosen on; test patients are looked at by the
last run alone. `--collect` gathers what is there into `benchmarks/results/echo_runs.json` and prints the tables.

Probes are fitted on the labels of the training patients: a ridge on the vector of a clip, and a linear head on the tokens of single frames. The
vector is what the encoder pools; or mean and deviation over time of the mean token (`motion`); or these and the deviation over time of single
places (`motion_places`). Differences draw the same patients for both arms; intervals hold for these weights, how much training itself varies
shows in the spread over seeds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from benchmarks.alice_runs import pretrain
from benchmarks.common import RESULTS, markdown, one_setting, rounded
from benchmarks.joint_data import read_table
from benchmarks.match_accuracy import finished
from medssl import api, build, data_sources
from medssl.archive.index import index
from medssl.clip_tasks import ClipLook
from medssl.encoders.video_vit import VideoViT
from medssl.errors import RequestError
from medssl.evaluation.bootstrap import bootstrap_interval, paired_bootstrap
from medssl.evaluation.clips import IGNORED, HeadSettings, PixelTokens, embed_clips, fit_head, labels_in_view, motion_of
from medssl.evaluation.controls import random_init
from medssl.evaluation.linear_probe import fit_linear
from medssl.evaluation.metrics import dice
from medssl.phantoms.echo import ECHO_LABELS, make_echo_cohort
from medssl.training.run_folder import facts_of_machine, now
from medssl.weights import write_atomic

RECIPES = Path(__file__).resolve().parent / "recipes"
TRAINED = {
    "discovr": RECIPES / "echo_discovr.yaml",
    "video_mae": RECIPES / "echo_video_mae.yaml",
    "frames": RECIPES / "echo_frames.yaml",
}
CHOSEN = RECIPES / "echo_chosen.yaml"
ARMS = (*TRAINED, "random", "random_frames", "raw")
"""`random` is the untrained encoder of discovr and video_mae, `random_frames` that of frames: its tokens are of one frame and not of two."""
SEEDS = (0, 1, 2)
COHORT: dict[str, Any] = {"patients": 280, "clips": 1, "seed": 6, "size": (96, 96), "seconds": 1.6}
LV = ECHO_LABELS.index("lv_cavity")
SHOWN = 4
"""Labelled frames of a clip, spread over the tubelets."""
HEAD = HeadSettings()
DRAWS = 2000


def chosen(arm: str) -> list[str]:
    """Return the changes to an arm's recipe that `echo_trials` led to."""
    found: dict[str, list[str]] = yaml.safe_load(CHOSEN.read_text())
    return found.get(arm, [])


def prepare(folder: Path, cohort: Mapping[str, Any] | None = None) -> Path:
    """Draw a cohort (`COHORT`) and index it, once; return the folder that holds both."""
    make_echo_cohort(folder / "cohort", **(cohort or COHORT))
    if not (folder / "index" / "series.parquet").is_file():
        index([folder / "cohort" / "images"], folder / "index", modality="US", splits=folder / "cohort" / "split.csv")
    return folder


@dataclass
class Cases:
    """What probes see of the clips of a split.

    Args:
        vectors: Name -> (N, E) features of clips.
        tokens: (N, SHOWN, h, w, E') of single frames.
        labels: (N, SHOWN, H, W) 1 in the cavity, 0 elsewhere, `IGNORED` outside the sector.
        ef: (N,) ejection fraction in percent.
        patients: N patients.
        files: N file names.
    """

    vectors: dict[str, np.ndarray]
    tokens: np.ndarray
    labels: np.ndarray
    ef: np.ndarray
    patients: list[str]
    files: list[str]


def shown_recipe(data: Path, overrides: Sequence[str] = (), arm: str = "discovr") -> Any:
    """Return the recipe whose views and encoder arms are probed with; of changes, those of views and encoder count."""
    changes = [change for change in overrides if change.startswith(("views.", "encoder."))]
    return api.load_recipe(TRAINED[arm], [f"data.index={data / 'index'}", *changes, "out=none"])


def look_at(recipe: Any, data: Path, encoder: nn.Module, split: str, raw: bool = False) -> Cases:
    """Show the middle of every clip of a split to an encoder."""
    section = recipe.sources["main"].model_copy(update={"where": f"split = '{split}'"})
    views = section.views
    shelf = data_sources.fill_shelf("main", section)
    rows = {row["file"]: row for row in read_table(data / "cohort" / "split.csv")}
    files = [shelf.archive.files(row.series_id)[0].name for row in shelf.rows]
    if missing := {name for name, row in rows.items() if row["split"] == split} - set(files):
        raise RequestError(
            f"{len(missing)} clips of split {split} are not in the index, or cannot be read; remove the index and start again"
        )
    source = data_sources.evaluation_source("main", shelf, section, [row.series_id for row in shelf.rows])
    look = ClipLook(source, torch.device("cpu"), batch=16)
    found = embed_clips(encoder, look, tokens=True)
    assert found.tokens is not None
    shown = look.shown
    per_token = views["frames"] // found.tokens.shape[1]
    chosen = np.linspace(0, views["frames"] - 2, SHOWN).round().astype(int) // 2 * 2
    labels = []
    for n, name in enumerate(files):
        with np.load(data / "cohort" / "labels" / rows[name]["label"]) as known:
            drawn = (known["labels"] == LV).astype(np.int64)
        labels.append(labels_in_view(drawn, shown["frame"][n, chosen], shown["map"][n], source.view_maker.size, shown["sector"][n]))
        labels[-1][~shown["valid"][n, chosen]] = IGNORED
    vectors = {"pooled": found.pooled}
    if not raw:
        vectors["motion_places"] = motion_of(torch.from_numpy(found.tokens), torch.from_numpy(found.token_valid)).numpy()
        vectors["motion"] = vectors["motion_places"][:, : 2 * found.tokens.shape[-1]]
    return Cases(
        vectors,
        found.tokens[:, chosen // per_token],
        np.stack(labels),
        np.array([float(rows[name]["ef"]) for name in files]),
        [rows[name]["patient"] for name in files],
        files,
    )


def encoder_of(arm: str, seed: int, data: Path, overrides: Sequence[str], run: Path | None) -> nn.Module:
    """Return the encoder of an arm; pixels for `raw`."""
    if run is not None:
        return build.load_encoder(run)
    recipe = shown_recipe(data, overrides, "frames" if arm == "random_frames" else "discovr")
    encoder = random_init(lambda: build.build_encoder(recipe.encoders["encoder"]), seed)
    if arm == "raw":
        assert isinstance(encoder, VideoViT)
        return PixelTokens(encoder.patch_size)
    return encoder


def probe(fit: Cases, held: Cases, seed: int) -> dict[str, Any]:
    """Fit on one split and say what is found on another: EF of each clip, and Dice of each clip over its frames."""
    found: dict[str, Any] = {"file": held.files, "patient": held.patients, "ef": held.ef.tolist(), "predicted": {}}
    for name, values in fit.vectors.items():
        model = fit_linear(values, fit.ef, fit.patients, task="regression", seed=seed)
        found["predicted"][name] = model.predict(held.vectors[name]).tolist()
    found["mean_of_training"] = float(fit.ef.mean())
    seen = fit.tokens.reshape(-1, fit.tokens.shape[-1]).astype(np.float64)
    seen = seen[(seen != 0).any(axis=1)]
    mean, scale = seen.mean(axis=0), seen.std(axis=0) + 1e-6

    def rows(cases: Cases) -> np.ndarray:
        flat: np.ndarray = ((cases.tokens.reshape(-1, *cases.tokens.shape[2:]) - mean) / scale).astype(np.float32)
        return flat

    model_of_frames = fit_head(rows(fit), fit.labels.reshape(-1, *fit.labels.shape[2:]), classes=2, settings=HEAD, seed=seed)
    with torch.no_grad():
        drawn = model_of_frames(torch.from_numpy(rows(held))).argmax(dim=1).numpy().reshape(held.labels.shape)
    known = np.where(held.labels == IGNORED, 0, held.labels)
    drawn[held.labels == IGNORED] = 0
    found["dice"] = [dice(one, truth, [1])[1] for one, truth in zip(drawn, known)]
    return found


def compute(
    data: Path,
    folder: Path,
    cells: Sequence[tuple[str, int]],
    *,
    split: str,
    overrides: Sequence[str] = (),
) -> None:
    """Train and probe the cells that are missing."""
    for arm, seed in cells:
        path = folder / "cells" / f"{arm}_{seed}_{split}.json"
        if path.exists():
            if (before := json.loads(path.read_text())["overrides"]) != list(overrides):
                raise SystemExit(f"{path}: computed with overrides {before}, now {list(overrides)}; choose another folder")
            continue
        begin = time.perf_counter()
        run, trained_before = None, finished(folder / f"{arm}_{seed}")
        if arm in TRAINED:
            changes = [f"data.index={data / 'index'}", *overrides, f"train.seed={seed}"]
            run = pretrain(TRAINED[arm], folder / f"{arm}_{seed}", changes)
        trained = time.perf_counter() - begin
        recipe = shown_recipe(data, overrides)
        encoder = encoder_of(arm, seed, data, overrides, run)
        fit, held = (look_at(recipe, data, encoder, name, raw=arm == "raw") for name in ("train", split))
        found = {"arm": arm, "seed": seed, "split": split, "overrides": list(overrides), **probe(fit, held, seed)}
        found |= {
            "seconds": {"train": None if trained_before else trained, "probe": time.perf_counter() - begin - trained},
            "when": now(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(found).encode())
        errors = {name: float(np.abs(np.subtract(found["ef"], v)).mean()) for name, v in found["predicted"].items()}
        said = ", ".join(f"EF {name} {value:.2f}" for name, value in errors.items())
        print(f"{now()} {arm} {seed} {split}: {said}, Dice {np.nanmean(found['dice']):.3f}, {trained:.0f} s trained", flush=True)


# --- the table


def summarise(cells: Sequence[Mapping[str, Any]], draws: int = DRAWS) -> dict[str, Any]:
    """Return rows per arm and readout, and paired differences of DISCOVR to every other arm.

    A clip's score is the mean over seeds of its error in points, or of its Dice.
    """
    by_arm: dict[str, list[Mapping[str, Any]]] = {}
    common = set.intersection(*({c["seed"] for c in cells if c["arm"] == arm} for arm in {c["arm"] for c in cells} - {"raw"}))
    for cell in sorted(cells, key=lambda cell: cell["seed"]):
        if cell["arm"] == "raw" or cell["seed"] in common:  # all arms of a table have the same seeds; pixels have none
            by_arm.setdefault(cell["arm"], []).append(cell)
    scores = {arm: _scores(group) for arm, group in by_arm.items()}
    patients = next(iter(cells))["patient"]
    rows, differences = [], []
    for arm, group in by_arm.items():
        for metric, table in scores[arm].items():
            value, low, high = bootstrap_interval(table.mean(axis=1), patients, draws=draws)
            rows.append(
                {"arm": arm, "metric": metric, "value": value, "interval": [low, high], "seeds": table.mean(axis=0).tolist()}
                | {
                    "clips": len(table),
                    "patients": len(set(patients)),
                    "train_s": seconds_of_training(group),
                }
            )
    for arm in by_arm if "discovr" in by_arm else ():
        for metric in scores["discovr"] if arm != "discovr" else ():
            theirs = scores[arm].get(metric, scores[arm]["ef_mae_pooled" if metric.startswith("ef") else "dice"])
            value, low, high = paired_bootstrap(scores["discovr"][metric].mean(axis=1), theirs.mean(axis=1), patients, draws=draws)
            better = "lower" if metric.startswith("ef") else "higher"
            differences.append(
                {"discovr minus": arm, "metric": metric, "difference": value, "interval": [low, high], "better": better}
            )
    first = next(iter(cells))
    blind = float(np.abs(np.asarray(first["ef"]) - first["mean_of_training"]).mean())
    return {"rows": rows, "differences": differences, "ef_mae_of_the_mean": blind}


def seconds_of_training(group: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the mean over the cells that trained; a cell that found its run finished did not."""
    known = [cell["seconds"]["train"] for cell in group if cell["seconds"]["train"] is not None]
    return float(np.mean(known)) if known else None


def _scores(group: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Return metric -> (clips, seeds)."""
    if any(cell["file"] != group[0]["file"] for cell in group):
        raise SystemExit("cells were scored on different clips; remove the cells and run again")
    found = {
        f"ef_mae_{name}": np.stack([np.abs(np.subtract(cell["ef"], cell["predicted"][name])) for cell in group], axis=1)
        for name in group[0]["predicted"]
    }
    return {**found, "dice": np.stack([cell["dice"] for cell in group], axis=1)}


def collect(folder: Path, split: str, out: Path, draws: int = DRAWS) -> dict[str, Any]:
    """Write `echo_runs.json` (`echo_runs_val.json` for the validation split) and print the tables."""
    cells = [json.loads(path.read_text()) for path in sorted((folder / "cells").glob(f"*_{split}.json"))]
    if not cells:
        raise SystemExit(f"no cell of split {split} in {folder / 'cells'}; run without --collect first")
    name = "echo_runs" if split == "test" else f"echo_runs_{split}"
    facts = facts_of_machine()
    content = rounded(
        {"benchmark": name, "when": now(), "split": split, "cohort": COHORT, **summarise(cells, draws)}
        | {"recipes": {arm: path.read_text() for arm, path in TRAINED.items()}}
        | {"overrides": settings_of(cells)}
        | {key: facts[key] for key in ("hardware", "versions", "git")}
    )
    for key in ("rows", "differences"):
        shown = [{k: text_of(v) for k, v in row.items()} for row in content[key]]
        print(markdown(shown) + "\n")
    print(f"EF error of always saying the mean: {content['ef_mae_of_the_mean']}")
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / f"{name}.json", (json.dumps(content, indent=1) + "\n").encode())
    return dict(content)


def settings_of(cells: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return arm -> overrides, the same in all cells of an arm."""
    return {arm: one_setting([c for c in cells if c["arm"] == arm]) for arm in sorted({c["arm"] for c in cells})}


def text_of(value: Any) -> Any:
    """Return a list of numbers as text, and anything else as it is."""
    return ", ".join(f"{v:.4g}" for v in value) if isinstance(value, list) else value


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/echo"))
    parser.add_argument("--data", type=Path, help="folder of cohort and index; default FOLDER/data")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--overrides", nargs="*", default=[], help="further changes to all recipes, for trials")
    parser.add_argument("--collect", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if not options.collect:
        data = prepare(options.data or options.folder / "data")
        for seed in options.seeds:
            for arm in options.arms:
                if arm != "raw" or seed == options.seeds[0]:
                    overrides = [*chosen(arm), *options.overrides]
                    compute(data, options.folder, [(arm, seed)], split=options.split, overrides=overrides)
    return collect(options.folder, options.split, options.out)


if __name__ == "__main__":
    main()
