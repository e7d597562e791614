"""Collect a label curve into benchmarks/results/, with the validation curves and the hardware.

    medssl label-curve recipes/finetune/segresnet_hippocampus.yaml --weights runs/hippocampus/mae_cnn --labels 5,20 --seeds 0,1,2
    python -m benchmarks.collect_curve runs/hippocampus/curve_segresnet --run runs/hippocampus/mae_cnn --name hippocampus_segresnet

Cells are computed by the command line, one by one and resumable; this script only gathers what they left, finished or not, and prints
the table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from medssl.evaluation.label_curve import markdown, read_cell, summarise
from medssl.training.run_folder import facts_of_machine
from medssl.weights import write_atomic

RESULTS = Path(__file__).parent / "results"


def validation_curve(cell: Path) -> list[dict[str, Any]]:
    """Return step and mean validation Dice of a cell."""
    lines = [json.loads(line) for line in (cell / "curve.jsonl").read_text().splitlines()]
    return [{"step": line["step"], "val_dice": line["val_dice"]} for line in lines if line.get("val_dice") is not None]


def gather(folder: Path, run: Path | None) -> dict[str, Any]:
    """Return summary, settings, validation curves and, of the pretraining run, its recipe hash and last metrics."""
    cells = sorted((folder / "cells").iterdir())
    results = {cell.name: result for cell in cells if (result := read_cell(cell)) is not None}
    shared = json.loads((folder / "label_curve.json").read_text())
    content: dict[str, Any] = {
        "summary": summarise(list(results.values())),
        "shared": shared,
        "validation_curves": {name: validation_curve(folder / "cells" / name) for name in results},
        "seconds": {name: result.seconds for name, result in results.items()},
        "cells": sorted(results),
        **facts_of_machine(),
    }
    if run is not None:
        facts = json.loads((run / "run.json").read_text())
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        content["pretraining"] = {
            "recipe_hash": facts["recipe_hash"],
            "seed": facts["seed"],
            "items": facts["items"],
            "last_loss": [line["loss"] for line in lines if line.get("loss") is not None][-1],
            "probes": {key: line[key] for line in lines for key in line if key.startswith("probe/")},
            "data_wait": sum(line.get("data_wait") or 0.0 for line in lines) / max(sum("data_wait" in line for line in lines), 1),
        }
    return content


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run", type=Path, default=None)
    parser.add_argument("--name", required=True)
    options = parser.parse_args(argv)
    content = gather(options.folder, options.run)
    write_atomic(RESULTS / f"{options.name}.json", json.dumps(content, indent=1).encode())
    print(markdown(content["summary"]))


if __name__ == "__main__":
    main()
