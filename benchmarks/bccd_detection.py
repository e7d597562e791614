"""Detection of blood cells (BCCD) with 10, 30, 100 and 214 labelled smears: from scratch against a pretraining on the same smears, unlabelled.

    python -m benchmarks.bccd_detection --prepare
    python -m benchmarks.bccd_detection
    python -m benchmarks.bccd_detection --collect

Pretraining sees the 214 training smears without boxes (objective `graph_matching`, seed 0); detection is the committed recipe
`finetune/detection_bccd`, equal steps for every number of labels. Test smears are touched by the last score alone. Every cell is kept: kill
the script and start it again to go on. The 60 test smears have no patients, so intervals draw smears, and hold for these weights.
"""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import detection_runs
from medssl.archive.index import index
from medssl.recipe import Recipe
from medssl.training.run_folder import now
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


def pretraining(folder: Path, steps: int, batch: int) -> dict[str, Any]:
    """Return the recipe of the pretraining on the training smears."""
    return {
        "kind": "pretrain",
        "data": {"index": str(folder / "archive"), "card": "bccd", "where": "split = 'train'", "domain": "microscopy"},
        "views": VIEWS,
        "encoder": {"name": "image2d", "model": "resnet18", "in_channels": 3},
        "objective": {"name": "graph_matching", "nodes": min(16, batch)},
        "optim": {"lr": 5e-4, "weight_decay": 0.01, "schedule": {"warmup_steps": min(30, steps - 1)}},
        "train": {"steps": steps, "batch": batch, "checkpoint_every": 50, "keep_checkpoints": 1, "monitor_items": 32, "monitor_every": 100,
                  "tensorboard": False, "workers": 1},
        "export": {"licence": "MIT"},
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = detection_runs.parser(__doc__, "runs/bccd", [10, 30, 100, 214], 400)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--pretrain-batch", type=int, default=16)
    parser.add_argument("--prepare", action="store_true", help="index the smears, and stop")
    options = parser.parse_args(argv)
    if options.collect:
        detection_runs.write_collected("bccd_detection", options)
        return
    archive = prepare(options.data, options.folder)
    if options.prepare:
        return
    wanted = partial(pretraining, options.folder, options.pretrain_steps, options.pretrain_batch)
    run = detection_runs.pretrained(options.folder / "pretrain", wanted, options.pretrain)
    given = [f"source.index={archive}", f"boxes.path={options.data / 'boxes.csv'}", f"out={options.folder / 'detection'}"]
    recipe = Recipe.load(RECIPES / "detection_bccd.yaml", [*given, *options.detection])
    detection_runs.curve(recipe, run, options, "map_10_50")


if __name__ == "__main__":
    main()
