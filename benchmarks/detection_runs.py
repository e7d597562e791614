"""What the benchmarks of detection share: a pretraining that goes on, a curve that says what each cell found, and its collection.

`bccd_detection` and `phantom_lesions` use it. What `medssl label-curve` left of a recipe of boxes is collected by

    python -m benchmarks.detection_runs runs/hippocampus/detection --run runs/hippocampus/mae_cnn --name hippocampus_boxes
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


def collect(name: str, curve: Path, pretraining: Path) -> dict[str, Any]:
    """Return what the finished cells of a curve say, without single boxes, and the pretraining."""
    results = [json.loads(path.read_text()) for path in sorted((curve / "cells").glob("*/results.json"))]
    run = json.loads((pretraining / "run.json").read_text())
    return {
        "benchmark": name,
        "when": now(),
        "summary": json.loads((curve / "summary.json").read_text()),
        "cells": [{key: content[key] for key in KEPT} for content in results],
        "pretraining": {key: run.get(key) for key in ("recipe_hash", "seed", "items", "started", "finished")},
        **facts_of_machine(),
    }


def write_collected(name: str, options: argparse.Namespace) -> None:
    """Write what `collect` finds in a folder of a benchmark to `<out>/<name>.json`."""
    write(name, collect(name, options.folder / "detection", options.folder / "pretrain"), options.out)


def write(name: str, content: Mapping[str, Any], out: Path) -> None:
    """Write `<out>/<name>.json`."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / f"{name}.json", (json.dumps(rounded(content), indent=1) + "\n").encode())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Collect a label curve of boxes.")
    parser.add_argument("curve", type=Path, help="`out` of the recipe")
    parser.add_argument("--run", type=Path, required=True, help="run folder of the pretraining")
    parser.add_argument("--name", required=True)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    write(options.name, collect(options.name, options.curve, options.run), options.out)


if __name__ == "__main__":
    main()
