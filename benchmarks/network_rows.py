"""One row per network on the hippocampus set: 20 labels, one seed, 300 steps, pretrained for as many steps and from scratch.

    medssl index ../shared/data/msd_hippocampus/images --splits ../shared/data/msd_hippocampus/split.csv --modality MR --out runs/hippocampus/archive
    python -m benchmarks.network_rows
    python -m benchmarks.network_rows --collect

A smoke row: it shows that weights reach the network and what a run costs on a CPU, not which network is better; one seed says little, and 300
steps are far from the plateau. Networks are small forms of SwinUNETR, nnU-Net's residual-encoder U-Net, and the pyramid over a SegResNet.
Pretraining is `mae_cnn`; `swin_unetr_alice` is Alice, with matched pairs by the matcher and the embeddings of `alice_runs`. Every stage and
cell is kept: kill the script and start it again to go on. A row that the folder lacks stays in the JSON as it was.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, rounded
from benchmarks.match_accuracy import finished
from medssl import api
from medssl.evaluation.label_curve import markdown
from medssl.recipe import Recipe, apply_overrides
from medssl.training.run_folder import facts_of_machine, now
from medssl.weights import write_atomic

SHARED = Path("../shared/data/msd_hippocampus")
CROP = [32, 64, 32]  # what a Swin of stride 32 takes; volumes are about 35 x 50 x 36 voxels
SWIN = {"name": "swin3d", "feature_size": 12, "depths": [2, 2, 2, 2], "num_heads": [3, 6, 12, 24], "window_size": 4}
RESENC = {"name": "resenc3d", "features_per_stage": [8, 16, 32, 64], "n_blocks_per_stage": [1, 2, 2, 2], "strides": [1, 2, 2, 2]}
SEGRESNET = {"name": "segresnet3d", "init_filters": 8, "blocks_down": [1, 2, 2, 4], "blocks_up": [1, 1, 1]}
NETWORKS: dict[str, dict[str, Any]] = {
    "swin_unetr": {"network": "swin_unetr", "encoder": SWIN, "lr": 1e-3},
    "swin_unetr_alice": {"network": "swin_unetr", "encoder": SWIN, "lr": 1e-3, "objective": "alice"},
    "resenc_unet": {"network": "resenc_unet", "encoder": RESENC, "lr": 1e-3},
    "pyramid": {"network": "pyramid", "encoder": SEGRESNET, "lr": 3e-3, "args": {"strides": [2, 4, 8], "width": 32}},
}
ALICE = {
    "name": "alice", "weights": {"cls": 1, "patch": 1, "rec": 1}, "prototypes": 128,
    "head_hidden": 256, "bottleneck": 64, "casa_heads": 4, "casa_hidden": 256,
}  # fmt: skip
"""As in `recipes/pretrain/alice_segresnet3d_hippocampus.yaml`."""
AUGMENT = {"rotate_deg": 15, "scale": [0.9, 1.1], "noise_std": 0.1, "brightness": 0.2, "contrast": [0.8, 1.25], "gamma": [0.7, 1.5]}


def pretraining(name: str, archive: Path, matcher: Path, out: Path, steps: int) -> dict[str, Any]:
    """Return the recipe of the pretraining of a network's encoder."""
    recipe: dict[str, Any] = {
        "kind": "pretrain",
        "data": {"index": str(archive), "card": "msd_hippocampus", "where": "split = 'train'", "domain": "mri"},
        "views": {"size": CROP, "normalize": "zscore", "rotate_deg": 15, "scale": [0.9, 1.1], "mask": {"ratio": 0.6, "cell": 8}},
        "encoder": NETWORKS[name]["encoder"],
        "objective": {"name": "mae_cnn", "mask_channel": True},
        "optim": {"lr": 1e-3, "weight_decay": 0.01, "schedule": {"warmup_steps": min(30, steps - 1)}},
        "train": {
            "steps": steps,
            "batch": 2,
            "checkpoint_every": 100,
            "monitor_every": 100,
            "monitor_items": 16,
            "tensorboard": False,
        },
        "export": {"licence": "CC-BY-SA-4.0"},
        "out": str(out),
    }
    if NETWORKS[name].get("objective") == "alice":
        recipe["data"]["sampler"] = {"pairs": "matched", "matcher": {"name": "embedding", "weights": str(matcher)}}
        recipe["views"] |= {"kind": "pair", "spacing_mm": 1.0}
        recipe["objective"] = ALICE
    return recipe


def finetuning(name: str, cohort: Path, out: Path, steps: int) -> dict[str, Any]:
    """Return the recipe of the fine-tuning of a network."""
    network = NETWORKS[name]
    return {
        "kind": "finetune",
        "cohort": {"path": str(cohort), "card": "msd_hippocampus", "domain": "mri"},
        "network": network["network"],
        "encoder": network["encoder"],
        "settings": {
            "crop": CROP, "steps": steps, "batch": 2, "lr": network["lr"], "warmup_steps": min(50, steps - 1), "weight_decay": 1e-5,
            "foreground": 0.5, "augment": AUGMENT, "val_every": 100, "val_cases": 10, "network_args": network.get("args", {}),
        },
        "out": str(out),
    }  # fmt: skip


def row(name: str, options: argparse.Namespace) -> None:
    """Pretrain and fine-tune one network, or go on."""
    run = options.folder / name / "pretrain"
    if not finished(run):
        recipe = apply_overrides(pretraining(name, options.archive, options.matcher, run, options.pretrain_steps), options.pretrain)
        result = api.pretrain(Recipe.parse(recipe), resume=True)
        if result.status != "finished":
            raise SystemExit(f"{name}: {result.status}; start again to go on")
        print(f"{now()} {name} pretrained", flush=True)
    recipe = apply_overrides(finetuning(name, options.cohort, options.folder / name / "curve", options.steps), options.finetune)

    def said(done: int, total: int, cell: Any, result: Any) -> None:
        print(f"{now()} {name} {cell.name}: {result.seconds['per_step']:.2f} s a step", flush=True)

    api.label_curve(Recipe.parse(recipe), run, counts=[options.labels], seeds=[options.seed], on_cell=said)


def collect(folder: Path, before: Path) -> dict[str, Any]:
    """Return the rows of the networks that are there, and of the others those of the JSON before."""
    kept = json.loads(before.read_text())["networks"] if before.is_file() else {}
    facts = {"when": now(), **{key: facts_of_machine()[key] for key in ("hardware", "versions", "git")}}
    rows: dict[str, Any] = {}
    for name in NETWORKS:
        path = folder / name / "curve" / "summary.json"
        if path.is_file():
            summary = json.loads(path.read_text())
            rows[name] = {**rounded(summary), **facts}
            print(f"{name}\n\n{markdown(summary)}\n")
        elif name in kept:
            rows[name] = kept[name]
    return {"benchmark": "network_rows", "networks": rows}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--archive", type=Path, default=Path("runs/hippocampus/archive"))
    parser.add_argument("--matcher", type=Path, default=Path("runs/hippocampus/matcher"), help="of Alice's pairs")
    parser.add_argument("--cohort", type=Path, default=SHARED)
    parser.add_argument("--folder", type=Path, default=Path("runs/hippocampus/rows"))
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--labels", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--pretrain-steps", type=int, default=300)
    parser.add_argument("--pretrain", nargs="*", default=[], help="overrides of the pretraining")
    parser.add_argument("--finetune", nargs="*", default=[], help="overrides of the fine-tuning")
    parser.add_argument("--collect", action="store_true", help="gather what is there into --out, and stop")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    if not options.collect:
        for name in options.networks:
            row(name, options)
    path: Path = options.out / "network_rows.json"
    content = collect(options.folder, path)
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
