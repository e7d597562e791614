"""The joint run from end to end: pretraining of every arm and seed, frozen probes beside their controls, one table.

    python -m benchmarks.joint_data ../shared/data --out runs/joint/data
    python -m benchmarks.joint_runs ../shared/data --folder runs/joint
    python -m benchmarks.joint_runs ../shared/data --folder runs/joint --collect

Recipes name `runs/joint/data`, so start it where `runs/joint` lies. Every cell (arm and seed) is computed once and kept: kill the script and
start it again to go on. `--collect` only gathers what is there into `benchmarks/results/joint.json`, prints the table and puts the scores of
every cell beside it, in `benchmarks/results/joint/`. `--restore` takes the cells that lie there as computed, so that another machine goes on;
that is for runs without overrides.

Intervals are percentile bootstraps by image (MedMNIST names no patients) or by patient (hippocampus) of the mean over seeds; differences
draw the same images for both arms. They hold for these weights: how much training itself varies shows in the spread over seeds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import RESULTS, markdown, rounded
from benchmarks.joint_probes import TASKS, check_apart, held_out_hashes, load_arm, probe, random_arm
from medssl import api
from medssl.evaluation.scores import roc_auc
from medssl.seeding import counter_rng
from medssl.training.run_folder import facts_of_machine, now
from medssl.weights import write_atomic

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "pretrain"
JOINT = RECIPES / "joint_resnet18_64.yaml"
DRAWS = 2000
PUBLISHED = {"pneumoniamnist": (0.944, 0.854), "breastmnist": (0.901, 0.863), "adrenalmnist3d_64": (0.827, 0.721)}
"""AUC and accuracy of supervised ResNet-18 (adrenal: 3D, 28^3) as MedMNIST v2 is remembered; not measured here."""


@dataclass(frozen=True)
class Plan:
    """One arm.

    Args:
        recipe: Pretraining recipe; None for raw pixels.
        overrides: Changes to it.
        seeds: Seeds.
        trained: False for the untrained encoder.
    """

    recipe: Path | None
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    trained: bool = True


PLANS: dict[str, Plan] = {
    "joint": Plan(JOINT),
    # the volume embedding of this arm is untrained: what the collapse monitor looks at says nothing about it
    "intra": Plan(JOINT, ("objective.weights={intra: 1}", "train.monitor_items=0")),
    "inter": Plan(RECIPES / "joint_resnet18_64_stacks.yaml"),
    "joint_equal": Plan(JOINT, ("objective.weights={intra: 1, inter: 1, mask: 0.1}",)),
    "random": Plan(JOINT, trained=False),
    "raw": Plan(None, seeds=(0,), trained=False),
    "graph_matching": Plan(RECIPES / "joint_graph_matching_resnet18_64.yaml", seeds=(0,)),
    "graph_matching_published": Plan(
        RECIPES / "joint_graph_matching_resnet18_64.yaml", ("objective.residual=false", "objective.noise=1"), seeds=(0,)
    ),
    "global_local": Plan(RECIPES / "joint_global_local_resnet18_64.yaml", seeds=(0,)),
}


def cells(seeds: Sequence[int] | None = None) -> list[tuple[str, int]]:
    """Return (arm, seed) in the order of computing: controls, then seed by seed the arms that are compared, then the single rows."""
    free = [(arm, seed) for arm, plan in PLANS.items() if not plan.trained for seed in plan.seeds]
    trained = [arm for arm, plan in PLANS.items() if plan.trained]
    several = [(arm, seed) for seed in (0, 1, 2) for arm in trained if len(PLANS[arm].seeds) > 1]
    single = [(arm, 0) for arm in trained if len(PLANS[arm].seeds) == 1]
    return [cell for cell in free + several + single if seeds is None or cell[1] in seeds]


def train(arm: str, seed: int, folder: Path, overrides: Sequence[str]) -> Path:
    """Pretrain one arm, or go on with it; nothing happens when it is finished."""
    run = folder / arm / str(seed)
    if not (run / "run.json").exists() or json.loads((run / "run.json").read_text()).get("status") != "finished":
        plan = PLANS[arm]
        assert plan.recipe is not None
        result = api.pretrain(plan.recipe, [*plan.overrides, *overrides, f"train.seed={seed}", f"out={run}"], resume=True)
        if result.status != "finished":
            raise SystemExit(f"{arm} {seed}: {result.status}; start again to go on")
    return run


def compute(
    shared: Path,
    folder: Path,
    wanted: Sequence[tuple[str, int]],
    *,
    split: str,
    overrides: Sequence[str] = (),
    tasks: Sequence[str] = TASKS,
) -> None:
    """Train and probe cells."""
    held_out: set[str] | None = None
    for arm, seed in wanted:
        plan, out = PLANS[arm], folder / "cells" / f"{arm}_{seed}"
        if all((out / f"{task}_{split}.json").exists() for task in tasks):
            continue
        run = train(arm, seed, folder, overrides) if plan.trained else None
        facts: dict[str, Any] = {}
        if run is not None:
            held_out = held_out if held_out is not None else held_out_hashes(shared)
            facts = {"compared_items": check_apart(run, held_out), "pretraining": last_metrics(run)}
            found = load_arm(run)
        else:
            found = random_arm(plan.recipe, seed) if plan.recipe else None
        probe(found, shared, out, split=split, seed=seed, tasks=tasks)
        write_atomic(out / "facts.json", json.dumps(facts).encode())
        print(f"{now()} {arm} {seed} probed", flush=True)


# --- the table


def read_cells(folder: Path, split: str, way: str = "main") -> dict[str, dict[str, np.ndarray]]:
    """Return arm -> task -> rows: (N, 1 + seeds) of target and scores, or (N, seeds) of Dice; arms that lack a task leave it out."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for arm, plan in PLANS.items():
        for task in TASKS:
            paths = [folder / "cells" / f"{arm}_{seed}" / f"{task}_{split}.json" for seed in plan.seeds]
            contents = [json.loads(path.read_text()) for path in paths if path.exists()]
            contents = [content[way] for content in contents if way in content]
            if not contents:
                continue
            if task == "hippocampus":
                columns = [content["dice"] for content in contents]
            else:
                columns = [contents[0]["target"], *(content["score"] for content in contents)]
            found.setdefault(arm, {})[task] = np.array(columns, dtype=float).T
    return found


def merits(rows: np.ndarray, task: str) -> list[float]:
    """Return AUC, or mean Dice, of each seed."""
    if task == "hippocampus":
        return [float(column.mean()) for column in rows.T]
    return [roc_auc(rows[:, [0, k]]) for k in range(1, rows.shape[1])]


def accuracies(rows: np.ndarray) -> list[float]:
    """Return the share of right answers at a score of one half, of each seed."""
    return [float(((rows[:, k] > 0.5) == (rows[:, 0] > 0.5)).mean()) for k in range(1, rows.shape[1])]


def draws_of(arms: Mapping[str, np.ndarray], task: str, count: int = DRAWS) -> dict[str, np.ndarray]:
    """Return arm -> its merit (mean over seeds) in each draw of images or patients; all arms see the same draws."""
    number = len(next(iter(arms.values())))
    rng = counter_rng(0, "joint bootstrap", task)
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(count):
        picked = rng.integers(number, size=number)
        for arm, rows in arms.items():
            found[arm].append(float(np.mean(merits(rows[picked], task))))
    return {arm: np.array(values) for arm, values in found.items()}


def interval(values: np.ndarray) -> list[float]:
    """Return the 2.5 and 97.5 percentiles of the finite draws."""
    return [float(v) for v in np.quantile(values[np.isfinite(values)], [0.025, 0.975])]


def summarise(folder: Path, split: str = "test", draws: int = DRAWS) -> dict[str, Any]:
    """Return rows per arm, and paired differences of joint to each other arm, per task and on average."""
    found = read_cells(folder, split)
    values: dict[str, dict[str, float]] = {}
    drawn: dict[str, dict[str, np.ndarray]] = {}
    rows: list[dict[str, Any]] = []
    for task in TASKS:
        arms = {arm: tasks[task] for arm, tasks in found.items() if task in tasks}
        if not arms:
            continue
        for arm, samples in draws_of(arms, task, draws).items():
            seeds = merits(arms[arm], task)
            values.setdefault(arm, {})[task] = float(np.mean(seeds))
            drawn.setdefault(arm, {})[task] = samples
            row = {"arm": arm, "task": task, "metric": "dice" if task == "hippocampus" else "auc", "value": float(np.mean(seeds))}
            row |= {"interval": interval(samples), "seeds": seeds, "by": "patient" if task == "hippocampus" else "image"}
            row["accuracy"] = None if task == "hippocampus" else float(np.mean(accuracies(arms[arm])))
            rows.append(row)
    return {"rows": rows, "differences": differences(values, drawn), "published": PUBLISHED}


def differences(values: Mapping[str, Mapping[str, float]], drawn: Mapping[str, Mapping[str, np.ndarray]]) -> list[dict[str, Any]]:
    """Return joint minus each other arm, per task and the mean over the tasks that both have; `better single` is the better of intra and inter."""
    if "joint" not in values:
        return []
    peers = {arm: (values[arm], drawn[arm]) for arm in values if arm != "joint"}
    singles = [arm for arm in ("intra", "inter") if arm in values and set(values[arm]) == set(values["joint"])]
    if len(singles) == 2:
        best = max(singles, key=lambda arm: float(np.mean(list(values[arm].values()))))
        peers["better single"] = peers[best]
    rows = []
    for arm, (theirs, samples) in peers.items():
        shared = [task for task in TASKS if task in theirs and task in values["joint"]]
        apart = {task: drawn["joint"][task] - samples[task] for task in shared}
        for task in shared:
            row = {"joint minus": arm, "task": task, "difference": values["joint"][task] - theirs[task]}
            rows.append({**row, "interval": interval(apart[task])})
        mean = float(np.mean([values["joint"][task] - theirs[task] for task in shared]))
        rows.append(
            {"joint minus": arm, "task": "mean", "difference": mean, "interval": interval(np.mean(list(apart.values()), axis=0))}
        )
    return rows


def last_metrics(run: Path) -> dict[str, Any]:
    """Return the status of a run, seconds per step, and the mean of its metrics over the last tenth of the steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = max(line["step"] for line in lines)
    tail = [line for line in lines if line["step"] > 0.9 * last]
    names = sorted({name for line in tail for name in line if name not in ("step", "lr")})
    means = {name: [line[name] for line in tail if line.get(name) is not None] for name in names}
    facts = json.loads((run / "run.json").read_text())
    return {
        "status": facts["status"],
        "recipe_hash": facts["recipe_hash"],
        "items": facts["items"],
        "steps": last,
        **{name: float(np.mean(v)) for name, v in means.items() if v},
    }


def copy_cells(source: Path, target: Path, again: bool = False) -> None:
    """Copy what `target` lacks of cells, or everything `again`, with scores of six digits."""
    for path in sorted(source.glob("*/*.json")):
        copy = target / path.parent.name / path.name
        if again or not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(copy, (json.dumps(rounded(json.loads(path.read_text()), 6)) + "\n").encode())


def collect(folder: Path, split: str, out: Path, draws: int = DRAWS) -> dict[str, Any]:
    """Write `joint.json` (`joint_val.json` for the validation split) and print the tables."""
    name = "joint" if split == "test" else f"joint_{split}"
    summary = summarise(folder, split, draws)
    data = folder / "data" / "data.json"
    cells = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("cells/*/facts.json"))}
    content = rounded(
        {
            "benchmark": name,
            "when": now(),
            "split": split,
            **summary,
            "runs": cells,
            "data": json.loads(data.read_text()) if data.exists() else None,
            **{key: facts_of_machine()[key] for key in ("hardware", "versions", "git")},
        }
    )
    print(markdown([{**row, "interval": _span(row["interval"]), "seeds": _list(row["seeds"])} for row in content["rows"]]) + "\n")
    print(markdown([{**row, "interval": _span(row["interval"])} for row in content["differences"]]))
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / f"{name}.json", (json.dumps(content, indent=1) + "\n").encode())
    copy_cells(folder / "cells", out / "joint", again=True)
    return dict(content)


def _span(values: Sequence[float]) -> str:
    return f"{values[0]:.3f} to {values[1]:.3f}"


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shared", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("runs/joint"))
    parser.add_argument("--arms", nargs="+", choices=list(PLANS), default=list(PLANS))
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--overrides", nargs="*", default=[], help="changes to all recipes, for trials")
    parser.add_argument("--collect", action="store_true")
    parser.add_argument("--restore", action="store_true", help="take the cells in OUT/joint as computed")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.restore:
        if options.overrides:
            parser.error("--restore takes cells of the committed recipes; leave --overrides out")
        copy_cells(options.out / "joint", options.folder / "cells")
    if not options.collect:
        begin = time.perf_counter()
        wanted = [cell for cell in cells(options.seeds) if cell[0] in options.arms]
        compute(options.shared.resolve(), options.folder, wanted, split=options.split, overrides=options.overrides)
        print(f"{len(wanted)} cells, {time.perf_counter() - begin:.0f} s", flush=True)
    return collect(options.folder, options.split, options.out)


if __name__ == "__main__":
    main()
