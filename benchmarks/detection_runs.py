"""What the benchmarks of detection share: a pretraining that goes on, a curve that says what each cell found, and its collection.

No benchmark of its own: `bccd_detection` and `phantom_lesions` use it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, rounded
from benchmarks.match_accuracy import finished
from medssl import api
from medssl.recipe import Recipe, apply_overrides
from medssl.training.run_folder import facts_of_machine, now
from medssl.weights import write_atomic

KEPT = ("arm", "labels", "seed", "rows", "curve", "choice", "seconds", "hardware", "versions", "git")


def parser(text: str | None, folder: str, labels: Sequence[int], pretrain_steps: int) -> argparse.ArgumentParser:
    """Return what both command lines take."""
    found = argparse.ArgumentParser(description=(text or "").splitlines()[0])
    found.add_argument("--folder", type=Path, default=Path(folder))
    found.add_argument("--labels", type=int, nargs="+", default=list(labels))
    found.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    found.add_argument("--pretrain-steps", type=int, default=pretrain_steps)
    found.add_argument("--pretrain", nargs="*", default=[], help="overrides of the pretraining")
    found.add_argument("--detection", nargs="*", default=[], help="overrides of the fine-tuning")
    found.add_argument("--collect", action="store_true", help="gather finished cells into --out, and stop")
    found.add_argument("--out", type=Path, default=RESULTS)
    return found


def pretrained(run: Path, recipe: Callable[[], Mapping[str, Any]], overrides: Sequence[str]) -> Path:
    """Pretrain, or go on; nothing happens when the run is finished."""
    if finished(run):
        return run
    result = api.pretrain(Recipe.parse(apply_overrides({**recipe(), "out": str(run)}, overrides)), resume=True)
    if result.status != "finished":
        raise SystemExit(f"pretraining: {result.status}; start again to go on")
    print(f"{now()} pretrained", flush=True)
    return run


def curve(recipe: Any, run: Path, options: argparse.Namespace, metric: str) -> dict[str, Any]:
    """Compute the cells that are missing, print the metric of each, and the table."""

    def said(done: int, total: int, cell: Any, content: Any) -> None:
        row = next(row for row in content["rows"] if row["metric"] == metric)
        print(f"{now()} {done}/{total} {cell.name}: {metric} {row['value']:.3f}, {content['seconds']['train']:.0f} s", flush=True)

    summary = api.label_curve(recipe, run, counts=options.labels, seeds=options.seeds, on_cell=said)
    print((Path(recipe.out) / "table.md").read_text())
    return summary


def collect(name: str, folder: Path) -> dict[str, Any]:
    """Return what the finished cells say, without single boxes, and the pretraining."""
    results = [json.loads(path.read_text()) for path in sorted((folder / "detection" / "cells").glob("*/results.json"))]
    run = json.loads((folder / "pretrain" / "run.json").read_text())
    return {
        "benchmark": name,
        "when": now(),
        "summary": json.loads((folder / "detection" / "summary.json").read_text()),
        "cells": [{key: content[key] for key in KEPT} for content in results],
        "pretraining": {key: run.get(key) for key in ("recipe_hash", "seed", "items", "started", "finished")},
        **facts_of_machine(),
    }


def write_collected(name: str, options: argparse.Namespace) -> None:
    """Write what `collect` finds to `<out>/<name>.json`."""
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rounded(collect(name, options.folder)), indent=1) + "\n"
    write_atomic(options.out / f"{name}.json", text.encode())
