"""Alice on the hippocampus set from end to end: matcher, embeddings, Alice beside mae_cnn, fine-tuning with few labels beside scratch.

    medssl index ../shared/data/msd_hippocampus/images --splits ../shared/data/msd_hippocampus/split.csv --modality MR --out runs/hippocampus/archive
    python -m benchmarks.alice_runs --folder runs/hippocampus
    python -m benchmarks.alice_runs --folder runs/hippocampus --collect

Recipes as committed, in `recipes/pretrain` and `recipes/finetune`; they name `runs/hippocampus/archive` and `../shared/data`, so start it
where these lie. Pretraining has one seed (0), equal steps and batch, and only the training volumes, without labels; fine-tuning has equal
steps, cases and augmentation, three seeds. Test volumes are touched by the last score alone. Every stage and every cell is kept: kill the
script and start it again to go on. Differences are taken on the same patients and seeds; intervals are bootstraps by patient, and hold
for these weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.collect_curve import validation_curve
from benchmarks.common import RESULTS, rounded
from benchmarks.match_accuracy import finished
from benchmarks.pair_kinds import last_of
from medssl import api, build
from medssl.correspondence import embed
from medssl.evaluation.bootstrap import paired_bootstrap
from medssl.evaluation.cohort import Cohort
from medssl.evaluation.finetune import open_weights
from medssl.evaluation.label_curve import label_curve, markdown, read_cell, score_table, summarise
from medssl.evaluation.segmentation_results import FinetuneResult
from medssl.leakage import refuse_pretraining_images
from medssl.training.run_folder import facts_of_machine, now
from medssl.weights import write_atomic

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
MATCHER = RECIPES / "pretrain" / "anatomical_embedding_segresnet3d_hippocampus.yaml"
ARMS = {
    "alice": RECIPES / "pretrain" / "alice_segresnet3d_hippocampus.yaml",
    "mae-cnn": RECIPES / "pretrain" / "mae_cnn_segresnet3d_hippocampus.yaml",
}
FINETUNE = RECIPES / "finetune" / "segresnet_hippocampus.yaml"


def pretrain(recipe: Path, run: Path, overrides: Sequence[str]) -> Path:
    """Pretrain, or go on; nothing happens when the run is finished."""
    if not finished(run):
        result = api.pretrain(recipe, [*overrides, f"out={run}"], resume=True)
        if result.status != "finished":
            raise SystemExit(f"{run.name}: {result.status}; start again to go on")
        print(f"{now()} {run.name} pretrained", flush=True)
    return run


def stages(folder: Path, overrides: Mapping[str, Sequence[str]]) -> dict[str, Path]:
    """Return the finished pretraining runs by arm; Alice after its matcher and the embeddings."""
    index = [f"data.index={folder / 'archive'}"]
    matcher = pretrain(MATCHER, folder / "matcher", [*index, *overrides["matcher"]])
    sampler = f"data.sampler.matcher={{name: embedding, weights: {matcher}}}"
    extra = {"alice": [sampler], "mae-cnn": []}
    if not finished(folder / "alice"):
        done = embed(MATCHER, matcher, [*index, *overrides["matcher"], "out=none"])
        for facts in done.values():
            print(
                f"{now()} {facts.written} embeddings written, {facts.present} present, {len(facts.failed)} failed, "
                f"{facts.bytes_per_volume} bytes per volume",
                flush=True,
            )
    return {arm: pretrain(recipe, folder / arm, [*index, *extra[arm], *overrides["pretrain"]]) for arm, recipe in ARMS.items()}


def curve(folder: Path, runs: Mapping[str, Path], counts: Sequence[int], seeds: Sequence[int], overrides: Sequence[str]) -> None:
    """Compute the cells that are missing."""
    recipe = api.load_recipe(FINETUNE, overrides, kind="finetune")
    settings = build.finetune_settings(recipe)
    cohort = Cohort.load(recipe.cohort.path)
    arms: dict[str, Any] = {}
    for arm, run in runs.items():
        refuse_pretraining_images(run, cohort)
        arms[arm] = open_weights(run, transfer=settings.transfer)
    arms["scratch"] = None
    label_curve(
        cohort,
        settings,
        folder / "curve",
        arms=arms,
        counts=counts,
        seeds=seeds,
        on_cell=lambda done, total, cell, result: print(f"{now()} cell {done}/{total} {cell.name}", flush=True),
    )


def against(results: Sequence[FinetuneResult], arm: str, other: str) -> list[dict[str, Any]]:
    """Return the paired difference of two arms per number of labels, on the seeds that both have."""
    rows = []
    for labels in sorted({result.labels for result in results}):
        found = {name: {r.seed: r for r in results if r.labels == labels and r.arm == name} for name in (arm, other)}
        seeds = sorted(set(found[arm]) & set(found[other]))
        if not seeds:
            continue
        ours, patients = score_table([found[arm][seed] for seed in seeds])
        theirs, others = score_table([found[other][seed] for seed in seeds])
        if patients != others:
            raise SystemExit(
                "the cells of two arms were scored on different patients; remove the folder of the curve and start again"
            )
        value, low, high = paired_bootstrap(ours.mean(axis=0), theirs.mean(axis=0), patients)
        by_seed = [float(v) for v in ours.mean(axis=1) - theirs.mean(axis=1)]
        rows.append(
            {"labels": labels, "arm": arm, "against": other, "seeds": seeds, "difference": value, "low": low, "high": high}
            | {"seed_differences": by_seed}
        )
    return rows


def collect(folder: Path, out: Path) -> dict[str, Any]:
    """Write `hippocampus_alice.json` from what is there, and print the tables."""
    cells = sorted((folder / "curve" / "cells").iterdir())
    results = [result for cell in cells if (result := read_cell(cell)) is not None]
    done = [cell.name for cell in cells if (cell / "results.json").is_file()]
    summary = summarise(results)
    summary["differences"] += against(results, "alice", "mae-cnn")
    runs = {name: folder / name for name in ("matcher", *ARMS)}
    content: dict[str, Any] = {
        "benchmark": "hippocampus_alice",
        "when": now(),
        "summary": summary,
        "shared": json.loads((folder / "curve" / "label_curve.json").read_text()),
        "validation_curves": {name: validation_curve(folder / "curve" / "cells" / name) for name in done},
        "cells": done,
        "pretraining": rounded({name: last_of(run) for name, run in runs.items() if finished(run)}),
        **{key: facts_of_machine()[key] for key in ("hardware", "versions", "git")},
    }
    print(markdown(summary))
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "hippocampus_alice.json", (json.dumps(content, indent=1) + "\n").encode())
    return content


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/hippocampus"))
    parser.add_argument("--labels", nargs="+", type=int, default=[5, 20])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--matcher-overrides", nargs="*", default=[], help="changes to the matcher's recipe, for trials")
    parser.add_argument("--overrides", nargs="*", default=[], help="changes to both pretraining recipes, for trials")
    parser.add_argument("--finetune-overrides", nargs="*", default=[], help="changes to the fine-tuning recipe, for trials")
    parser.add_argument("--collect", action="store_true", help="only gather what is there")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if not options.collect:
        runs = stages(options.folder, {"matcher": options.matcher_overrides, "pretrain": options.overrides})
        curve(options.folder, runs, options.labels, options.seeds, options.finetune_overrides)
    return collect(options.folder, options.out)


if __name__ == "__main__":
    main()
