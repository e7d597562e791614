"""Detection of blood cells (BCCD) with 10, 30, 100 and 214 labelled smears: from scratch against a pretraining on the same smears, unlabelled.

    python -m benchmarks.bccd_detection --prepare
    python -m benchmarks.bccd_detection
    python -m benchmarks.bccd_detection --collect

Pretraining sees the 214 training smears without boxes (objective `graph_matching`, seed 0); detection is the committed recipe
`finetune/detection_bccd`, equal steps for every number of labels. Test smears are touched by the last score alone. Every cell is kept: kill
the script and start it again to go on. The 60 test smears have no patients, so intervals draw smears, and hold for these weights.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, rounded
from benchmarks.match_accuracy import finished
from medssl import api
from medssl.archive.index import index
from medssl.recipe import Recipe
from medssl.training.run_folder import facts_of_machine, now
from medssl.weights import private_folder, write_atomic

DATA = Path("../shared/data/bccd")
RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "finetune"
VIEWS: dict[str, Any] = {
    "kind": "image", "size": 96, "count": 2, "channels": "keep", "normalize": {"window": [0, 255]}, "area": [0.1, 0.5],
    "aspect": [0.8, 1.25], "flip": [0.5, 0.5], "contrast": [0.7, 1.4], "brightness": 0.15, "noise_std": 0.02,
}  # fmt: skip


def prepare(data: Path, folder: Path) -> Path:
    """Index the smears with the sides of the set's own split; return the index."""
    if (folder / "archive").is_dir():
        return folder / "archive"
    private_folder(folder)
    with (data / "split.csv").open(newline="") as stream:
        rows = [f"{row['image']}.jpg,{row['split']}\n" for row in csv.DictReader(stream)]
    write_atomic(folder / "split.csv", ("file,split\n" + "".join(rows)).encode())
    summary = index([data / "JPEGImages"], folder / "archive", splits=folder / "split.csv", modality="GM", site="bccd")
    print(f"{now()} {summary.n_series} smears indexed", flush=True)
    return folder / "archive"


def pretrain(folder: Path, steps: int, batch: int, overrides: Sequence[str] = ()) -> Path:
    """Pretrain on the training smears, or go on; nothing happens when the run is finished."""
    run = folder / "pretrain"
    if finished(run):
        return run
    recipe = {
        "kind": "pretrain",
        "data": {"index": str(folder / "archive"), "card": "bccd", "where": "split = 'train'", "domain": "microscopy"},
        "views": VIEWS,
        "encoder": {"name": "image2d", "model": "resnet18", "in_channels": 3},
        "objective": {"name": "graph_matching", "nodes": min(16, batch)},
        "optim": {"lr": 5e-4, "weight_decay": 0.01, "schedule": {"warmup_steps": min(30, steps - 1)}},
        "train": {"steps": steps, "batch": batch, "checkpoint_every": 50, "keep_checkpoints": 1, "monitor_items": 32, "monitor_every": 100,
                  "tensorboard": False, "workers": 1},
        "export": {"licence": "MIT"},
        "out": str(run),
    }  # fmt: skip
    from medssl.recipe import apply_overrides

    result = api.pretrain(Recipe.parse(apply_overrides(recipe, overrides)), resume=True)
    if result.status != "finished":
        raise SystemExit(f"pretraining: {result.status}; start again to go on")
    print(f"{now()} pretrained", flush=True)
    return run


def curve(
    data: Path, folder: Path, run: Path, counts: Sequence[int], seeds: Sequence[int], overrides: Sequence[str]
) -> dict[str, Any]:
    """Compute the cells that are missing."""
    given = [f"source.index={folder / 'archive'}", f"boxes.path={data / 'boxes.csv'}", f"out={folder / 'detection'}"]

    def said(done: int, total: int, cell: Any, content: Any) -> None:
        row = content["rows"][0]
        print(f"{now()} {done}/{total} {cell.name}: mAP {row['value']:.3f}, {content['seconds']['train']:.0f} s", flush=True)

    recipe = Recipe.load(RECIPES / "detection_bccd.yaml", [*given, *overrides])
    return api.label_curve(recipe, run, counts=counts, seeds=seeds, on_cell=said)


def collect(folder: Path) -> dict[str, Any]:
    """Return what the finished cells say, without single boxes."""
    summary = json.loads((folder / "detection" / "summary.json").read_text())
    cells = []
    for path in sorted((folder / "detection" / "cells").glob("*/results.json")):
        content = json.loads(path.read_text())
        cells.append(
            {
                key: content[key]
                for key in ("arm", "labels", "seed", "rows", "curve", "choice", "seconds", "hardware", "versions", "git")
            }
        )
    run = json.loads((folder / "pretrain" / "run.json").read_text())
    pretraining = {key: run.get(key) for key in ("recipe_hash", "seed", "items", "started", "finished")}
    return {
        "benchmark": "bccd_detection",
        "when": now(),
        "summary": summary,
        "cells": cells,
        "pretraining": pretraining,
        **facts_of_machine(),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--folder", type=Path, default=Path("runs/bccd"))
    parser.add_argument("--labels", type=int, nargs="+", default=[10, 30, 100, 214])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pretrain-steps", type=int, default=400)
    parser.add_argument("--pretrain-batch", type=int, default=16)
    parser.add_argument("--pretrain", nargs="*", default=[], help="overrides of the pretraining")
    parser.add_argument("--detection", nargs="*", default=[], help="overrides of the recipe")
    parser.add_argument("--prepare", action="store_true", help="index the smears, and stop")
    parser.add_argument("--collect", action="store_true", help="gather finished cells into --out, and stop")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    if options.collect:
        options.out.mkdir(parents=True, exist_ok=True)
        write_atomic(options.out / "bccd_detection.json", (json.dumps(rounded(collect(options.folder)), indent=1) + "\n").encode())
        return
    prepare(options.data, options.folder)
    if options.prepare:
        return
    run = pretrain(options.folder, options.pretrain_steps, options.pretrain_batch, options.pretrain)
    curve(options.data, options.folder, run, options.labels, options.seeds, options.detection)
    print((options.folder / "detection" / "table.md").read_text())


if __name__ == "__main__":
    main()
