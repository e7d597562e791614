"""Detection of spheres among distractors in small volumes: FROC of a scratch SegResNet beside one pretrained with `mae_cnn`.

    python -m benchmarks.phantom_lesions
    python -m benchmarks.phantom_lesions --collect

A volume is a textured body with two vessels (bright cylinders) and flat discs, and none to three lesions: bright spheres of 5 to 9 voxels
across. Brightness tells lesions from neither vessels nor discs; roundness does. Every third volume has no lesion. Pretraining sees 120
unlabelled volumes, detection 8 and 24 labelled ones, scores 60 others; all are drawn from different seeds. Every cell is kept: kill the
script and start it again to go on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import detection_runs
from medssl.archive.index import index
from medssl.recipe import Recipe, apply_overrides
from medssl.seeding import counter_rng
from medssl.weights import private_folder, write_atomic

ENCODER = {"name": "segresnet3d", "init_filters": 8, "blocks_down": [1, 1, 1], "blocks_up": [1, 1]}
SIZE = 32


def lesion_phantom(seed: int, size: int = SIZE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a volume (X, Y, Z) float32, its map of lesions (uint8), and their boxes (N, 6) by arithmetic.

    Args:
        seed: Another seed gives another volume; a multiple of 3 gives one without a lesion.
        size: Voxels along each axis, 32 or more.
    """
    rng = counter_rng(seed, "lesion phantom")
    axes = np.meshgrid(*[np.arange(size) + 0.5] * 3, indexing="ij")
    middle = size / 2
    image = 100 + 8 * np.sin(axes[0] / 5 + rng.uniform(0, 6)) * np.cos(axes[1] / 6 + rng.uniform(0, 6))
    image[sum((a - middle) ** 2 for a in axes) > (0.48 * size) ** 2] = 20
    taken: list[tuple[np.ndarray, float]] = []
    bright = 45
    for _ in range(2):  # vessels
        axis, place, radius = int(rng.integers(3)), rng.uniform(0.3 * size, 0.7 * size, 2), rng.uniform(1.2, 2.2)
        across = [a for k, a in enumerate(axes) if k != axis]
        image[(across[0] - place[0]) ** 2 + (across[1] - place[1]) ** 2 < radius**2] += bright
    label = np.zeros((size,) * 3, dtype=np.uint8)
    boxes = []
    lesions = 0 if seed % 3 == 0 else int(rng.integers(1, 4))
    for number in range(lesions + 2):
        radius = rng.uniform(2.5, 4.5)
        for _ in range(100):
            centre = rng.uniform(0.22 * size, 0.78 * size, 3)
            if all(np.linalg.norm(centre - other) > radius + far + 3 for other, far in taken):
                break
        else:
            continue
        taken.append((centre, radius))
        apart = [axes[k] - centre[k] for k in range(3)]
        if number < lesions:
            inside = sum(a**2 for a in apart) < radius**2
            label[inside] = 1
            boxes.append([*(side.min() for side in np.nonzero(inside)), *(side.max() + 1 for side in np.nonzero(inside))])
        else:  # a disc: as wide as a lesion, and flat
            flat = int(rng.integers(3))
            inside = (sum(apart[k] ** 2 for k in range(3) if k != flat) < radius**2) & (np.abs(apart[flat]) < 1)
        image[inside & (label == 0 if number >= lesions else True)] += bright
    image = image + rng.normal(0, 8, image.shape)
    return image.astype(np.float32), label, np.array(boxes, dtype=np.float64).reshape(-1, 6)


def write_volumes(folder: Path, *, unlabelled: int, train: int, test: int) -> None:
    """Write pretraining volumes to unlabelled/ and a cohort of images/, labels/ and split.csv to cohort/; those that are there stay.

    Raises:
        SystemExit: Other numbers of volumes are there.
    """
    import nibabel

    def save(array: np.ndarray, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)  # type: ignore[attr-defined, no-untyped-call]

    if (folder / "cohort" / "split.csv").is_file():  # written last
        asked, there = (unlabelled, train, test), volumes_in(folder)
        if asked != there:
            raise SystemExit(
                f"{folder} holds {spaced(there)} volumes (unlabelled, training, test), --volumes asks for {spaced(asked)}; results of one folder "
                f"share their volumes; give --volumes {spaced(there)}, or another --folder"
            )
        return
    private_folder(folder)
    for number in range(unlabelled):
        save(lesion_phantom(10_000 + number)[0], folder / "unlabelled" / f"phantom_{number:04d}.nii.gz")
    lines = ["file,split,few_label_rank"]
    for number in range(train + test):
        side = "train" if number < train else "test"
        image, label, _ = lesion_phantom((1 if side == "train" else 5_000) + number)
        save(image, folder / "cohort" / "images" / f"case_{number:04d}.nii.gz")
        save(label, folder / "cohort" / "labels" / f"case_{number:04d}.nii.gz")
        lines.append(f"case_{number:04d}.nii.gz,{side},{number + 1 if side == 'train' else ''}")
    write_atomic(folder / "cohort" / "dataset.json", json.dumps({"labels": {"background": 0, "lesion": 1}}).encode())
    write_atomic(folder / "cohort" / "split.csv", ("\n".join(lines) + "\n").encode())


def volumes_in(folder: Path) -> tuple[int, int, int]:
    """Return how many unlabelled, training and test volumes a folder holds."""
    sides = [line.split(",")[1] for line in (folder / "cohort" / "split.csv").read_text().splitlines()[1:]]
    return len(list((folder / "unlabelled").glob("*.nii.gz"))), sides.count("train"), sides.count("test")


def spaced(numbers: Iterable[int]) -> str:
    """Return numbers as a command line takes them."""
    return " ".join(map(str, numbers))


def pretraining(folder: Path, steps: int) -> dict[str, Any]:
    """Index the unlabelled volumes, and return the recipe of the pretraining with `mae_cnn` on them."""
    if not (folder / "archive").is_dir():
        index([folder / "unlabelled"], folder / "archive", modality="MR", site="phantom")
    return {
        "kind": "pretrain",
        "data": {"index": str(folder / "archive"), "where": "true", "domain": "mri"},
        "views": {"size": [32, 32, 32], "normalize": "zscore", "mask": {"ratio": 0.6, "cell": 8}},
        "encoder": ENCODER,
        "objective": {"name": "mae_cnn", "mask_channel": True},
        "optim": {"lr": 2e-3, "weight_decay": 0.01, "schedule": {"warmup_steps": min(30, steps - 1)}},
        "train": {
            "steps": steps,
            "batch": 4,
            "checkpoint_every": 100,
            "keep_checkpoints": 1,
            "monitor_items": 0,
            "tensorboard": False,
        },
    }


def detection(folder: Path, steps: int) -> dict[str, Any]:
    """Return the recipe of the fine-tuning."""
    return {
        "kind": "finetune",
        "task": "detection",
        "cohort": {"path": str(folder / "cohort"), "domain": "mri"},
        "views": {"size": [32, 32, 32], "normalize": "zscore"},
        "settings": {
            "detector": {"strides": [4], "width": 32, "anchor_scale": 2.0, "candidates": 8, "detections": 30},
            "steps": steps, "batch": 4, "lr": 2e-3, "warmup_steps": min(20, steps - 1), "foreground": 0.67,
            "augment": {"flip": [0.5, 0.5, 0.5], "noise_std": 0.1},
        },
        "out": str(folder / "detection"),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = detection_runs.parser(__doc__, "runs/phantom_lesions", [8, 24], 600)
    parser.add_argument("--volumes", type=int, nargs=3, default=[120, 24, 60], help="unlabelled, training, test")
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args(argv)
    if options.collect:
        detection_runs.write_collected("phantom_lesions", options)
        return
    unlabelled, train, test = options.volumes
    write_volumes(options.folder, unlabelled=unlabelled, train=train, test=test)
    wanted = partial(pretraining, options.folder, options.pretrain_steps)
    run = detection_runs.pretrained(options.folder / "pretrain", wanted, options.pretrain)
    recipe = Recipe.parse(apply_overrides(detection(options.folder, options.steps), options.detection))
    detection_runs.curve(recipe, run, options, "froc")


if __name__ == "__main__":
    main()
