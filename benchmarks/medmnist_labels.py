"""Classes of MedMNIST pictures and volumes from 1, 10 and 100 % of the labels: the joint 2D-3D encoder fine-tuned, beside its scratch twin.

    python -m benchmarks.joint_data ../shared/data --out runs/joint/data
    python -m benchmarks.joint_runs ../shared/data --folder runs/joint --arms joint --seeds 2
    python -m benchmarks.medmnist_labels --weights runs/joint/joint/2
    python -m benchmarks.medmnist_labels --weights runs/joint/joint/2 --collect

The joint run saw the training images of all three sets, without labels, and none of the others. Both arms train for equal steps with equal
views, and the state scored is the last one. Nothing was tuned for pictures; for stacks of adrenal glands, views without `area` and 400 steps
were chosen on the validation loss of one cell (all labels, pretrained, seed 0). Every cell is kept: kill the script and start it again to go
on. MedMNIST names no patients, so intervals draw images; the sets' own test splits are scored once a cell.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, markdown, rounded
from benchmarks.joint_data import MEDMNIST
from medssl import api
from medssl.archive.table import Archive
from medssl.recipe import Recipe, apply_overrides
from medssl.training.run_folder import facts_of_machine, now
from medssl.weights import load_part, write_atomic

PICTURE: dict[str, Any] = {"kind": "image", "size": 64, "channels": "mean", "normalize": {"window": [0, 255]}}
VIEWS: dict[str, dict[str, Any]] = {
    "pneumoniamnist": PICTURE,
    "breastmnist": PICTURE,
    "adrenalmnist3d_64": {**PICTURE, "kind": "stack", "slices": 8},
}
DOMAINS = {"pneumoniamnist": "xray", "breastmnist": "ultrasound", "adrenalmnist3d_64": "mri"}
BATCH = {"pneumoniamnist": 32, "breastmnist": 32, "adrenalmnist3d_64": 8}
KEEPS_SIZE: dict[str, Any] = {"rotate_deg": 5, "contrast": [0.85, 1.2], "brightness": 0.05, "noise_std": 0.02}
AUGMENT: dict[str, dict[str, Any]] = {
    "pneumoniamnist": {"area": [0.6, 1.0], "aspect": [0.9, 1.1], **KEEPS_SIZE},
    "breastmnist": {"area": [0.6, 1.0], "aspect": [0.9, 1.1], **KEEPS_SIZE},
    "adrenalmnist3d_64": KEEPS_SIZE,  # how large the gland is, is a sign of its class
}
STEPS = {"pneumoniamnist": 150, "breastmnist": 150, "adrenalmnist3d_64": 400}
SHARES = (0.01, 0.1, 1.0)
LEAST = 4  # labels: 1 % of the breast images are five


def budgets(training: int) -> list[int]:
    """Return the numbers of labels that 1, 10 and 100 % of the training images are."""
    return sorted({max(LEAST, round(share * training)) for share in SHARES})


def recipe_of(name: str, data: Path, out: Path, steps: int) -> dict[str, Any]:
    """Return the recipe of a set."""
    return {
        "kind": "finetune",
        "task": "classification",
        "source": {
            "index": str(data / "archive"),
            "where": f"site = '{name}'",
            "domain": DOMAINS[name],
            "views": VIEWS[name],
            "sampler": {"cover": [1.0, 1.0]} if VIEWS[name]["kind"] == "stack" else {},
        },
        "table": str(data / "tree" / name / "labels.csv"),
        "target": "label",
        "classes": ["0", "1"],
        "settings": {
            "head": "linear", "steps": steps, "batch": BATCH[name], "lr": 1e-3, "layer_decay": 0.75, "warmup_steps": min(20, steps - 1),
            "class_weights": "balanced", "val_every": max(1, steps // 2), "augment": AUGMENT[name],
        },
        "out": str(out / name),
    }  # fmt: skip


def collect(folder: Path, weights: Path) -> dict[str, Any]:
    """Return the tables of the sets that have finished cells, and what the weights are."""
    manifest = load_part(weights)[1]
    content: dict[str, Any] = {"benchmark": "medmnist_labels", "when": now(), "sets": {}}
    content["weights"] = {key: manifest.get(key) for key in ("weights_hash", "recipe_hash", "seed", "step")}
    for name in MEDMNIST:
        path = folder / name / "summary.json"
        if not path.is_file():
            continue
        summary = json.loads(path.read_text())
        content["sets"][name] = summary
        for row in summary["rows"]:
            print(name, row["labels"], row["arm"], f"{row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})", row["seed_means"])
        print(markdown(summary["differences"]))
    return {**content, **{key: facts_of_machine()[key] for key in ("hardware", "versions", "git")}}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="run folder of a joint run")
    parser.add_argument("--data", type=Path, default=Path("runs/joint/data"))
    parser.add_argument("--folder", type=Path, default=Path("runs/joint/labels"))
    parser.add_argument("--sets", nargs="+", choices=list(MEDMNIST), default=list(MEDMNIST))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of every cell; by default those of `STEPS`")
    parser.add_argument("--overrides", nargs="*", default=[], help="changes to all recipes, for trials")
    parser.add_argument("--collect", action="store_true", help="gather finished cells into --out, and stop")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    if not options.collect:
        archive = Archive.open(options.data / "archive")
        for name in options.sets:
            counts = budgets(
                len(archive.select(f"site = '{name}' and split = 'train'"))
            )  # without those of equal pixels in two splits
            steps = options.steps or STEPS[name]
            recipe = apply_overrides(recipe_of(name, options.data, options.folder, steps), options.overrides)

            def said(done: int, total: int, cell: Any, content: Any, name: str = name) -> None:
                print(f"{now()} {name} {done}/{total} {cell.name}: AUC {content['rows'][0]['value']:.3f}", flush=True)

            api.label_curve(Recipe.parse(recipe), options.weights, counts=counts, seeds=options.seeds, on_cell=said)
    content = collect(options.folder, options.weights)
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out / "medmnist_labels.json", (json.dumps(rounded(content), indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
