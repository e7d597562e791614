"""Choose settings of `echo_runs` on its validation patients: one seed of every trial in `recipes/echo_trials.yaml`, all of them reported.

    python -m benchmarks.echo_trials --folder runs/echo
    python -m benchmarks.echo_trials --folder runs/echo --only discovr discovr_lr --overrides train.steps=300

Trials share the cohort of `echo_runs` (`FOLDER/data`) and are kept in `FOLDER/trials/NAME`: kill the script and start it again to go on. The
table, `benchmarks/results/echo_trials.json`, is the record of what was tried; test patients are not looked at.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.common import RESULTS, markdown, rounded
from benchmarks.echo_runs import ARMS, COHORT, RECIPES, compute, prepare
from medssl.training.run_folder import facts_of_machine, now
from medssl.weights import write_atomic

TRIALS = RECIPES / "echo_trials.yaml"
MONITORS = (
    "loss",
    "video_spread",
    "image_spread",
    "video_teacher_entropy",
    "cluster_agreement_hidden",
    "cluster_agreement_visible",
)
"""What tells a collapse, and whether clusters are learnt: means over the last tenth of the steps."""


def read_trials(path: Path) -> dict[str, dict[str, Any]]:
    """Read name -> arm and overrides."""
    found: dict[str, dict[str, Any]] = yaml.safe_load(path.read_text())
    for name, trial in found.items():
        if trial.get("arm") not in ARMS or set(trial) - {"arm", "overrides"}:
            raise SystemExit(f"{path}: {name} is {trial}; accepted: arm ({', '.join(ARMS)}) and overrides")
    return found


def result_of(name: str, cell: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """Return one row: settings, scores on the validation patients, and how the training ended."""
    row: dict[str, Any] = {"trial": name, "arm": cell["arm"], "overrides": " ".join(cell["overrides"])}
    for readout, values in cell["predicted"].items():
        row[f"ef_mae_{readout}"] = float(np.abs(np.subtract(cell["ef"], values)).mean())
    row |= {"dice": float(np.nanmean(cell["dice"])), "train_s": cell["seconds"]["train"]}
    if not (run / "metrics.jsonl").exists():
        return row
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    tail = [line for line in lines if line["step"] > 0.9 * lines[-1]["step"]]
    means = {key: [line[key] for line in tail if line.get(key) is not None] for key in MONITORS}
    return row | {"steps": lines[-1]["step"]} | {key: float(np.mean(values)) for key, values in means.items() if values}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/echo"))
    parser.add_argument("--trials", type=Path, default=TRIALS)
    parser.add_argument("--only", nargs="+", help="names of trials; default all")
    parser.add_argument(
        "--overrides", nargs="*", default=[], help="changes to every trial that trains, for instance train.steps=300"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    trials = read_trials(options.trials)
    if unknown := [name for name in options.only or () if name not in trials]:
        raise SystemExit(f"no trial {', '.join(unknown)} in {options.trials}; it has {', '.join(trials)}")
    data = prepare(options.folder / "data")
    rows: list[dict[str, Any]] = []
    for name in options.only or trials:
        arm, folder = trials[name]["arm"], options.folder / "trials" / name
        compute(data, folder, [(arm, 0)], split="val", overrides=[*trials[name].get("overrides", []), *options.overrides])
    for name in trials:  # all that were ever tried here, whatever was asked for now
        arm, folder = trials[name]["arm"], options.folder / "trials" / name
        path = folder / "cells" / f"{arm}_0_val.json"
        if path.exists():
            rows.append(result_of(name, json.loads(path.read_text()), folder / f"{arm}_0"))
    content = _write(rows, options.out)
    print(markdown(content["rows"]))
    return content


def _write(rows: Sequence[Mapping[str, Any]], out: Path) -> dict[str, Any]:
    facts = facts_of_machine()
    content = {"benchmark": "echo_trials", "when": now(), "split": "val", "seed": 0, "cohort": COHORT, "rows": list(rows)}
    content = rounded(content | {key: facts[key] for key in ("hardware", "versions", "git")})
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "echo_trials.json", (json.dumps(content, indent=1) + "\n").encode())
    return content


if __name__ == "__main__":
    main()
