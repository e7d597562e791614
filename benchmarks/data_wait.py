"""Share of step time that training spends waiting for data: shipped smoke recipes, the demo's recipe, clips of echo phantoms.

    python -m benchmarks.data_wait

Each recipe trains through `medssl.api.pretrain` on an archive of phantoms of its domain; every step is a measurement
(`metrics.jsonl`, train.log_every=1). The share is time waited over time of all steps, the first one included. The
ViT-B recipes need a GPU: benchmarks/gpu_step.py measures their share.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Check, Result, finish, parser
from medssl import api
from medssl.archive.index import index
from medssl.archive.table import Archive
from medssl.demo import choose_views
from medssl.phantoms.cohort import make_cohort
from medssl.phantoms.echo import make_echo_cohort
from medssl.recipe import read_yaml, shipped

LIMIT = 0.05
RECIPES = Path(__file__).resolve().parent / "recipes"


def chosen() -> dict[str, Path]:
    """Return the pretraining recipes that a CPU trains in minutes."""
    small = {name: path for name, path in shipped().items() if name.startswith("smoke/") or name == "demo/pretrain"}
    small |= {path.stem: path for path in sorted(RECIPES.glob("echo_*.yaml"))}
    return {name: path for name, path in small.items() if read_yaml(path).get("kind") == "pretrain"}


def domain_of(path: Path) -> str:
    """Return the domain of a recipe; the demo's, which names no data, is of bodies."""
    return str(read_yaml(path).get("data", {}).get("domain", "mri"))


def phantom_archive(folder: Path, domain: str, patients: int, size: Sequence[int]) -> Path:
    """Write and index a cohort of phantoms of a domain, once: bodies as in the demo, hearts as in `echo_runs`."""
    if domain == "ultrasound":
        cohort = make_echo_cohort(folder / "echo", patients=patients, size=(64, 64))
        modality = "US"
    else:
        x, y, z = size
        cohort = make_cohort(folder / "cohort", patients=patients, size=(x, y, z))
        modality = "MR"
    archive = folder / f"archive_{domain}"
    if not archive.exists():
        index([cohort / "images"], archive, splits=cohort / "split.csv", modality=modality)
    return archive


def overrides(name: str, path: Path, archive: Path, out: Path, steps: int) -> list[str]:
    """Return what the recipe needs to run here; the demo chooses its views from the data, and so does this."""
    sources = [f"sources.{source}" for source in read_yaml(path).get("sources", {})] or ["data"]
    common = [*(f"{source}.index={archive}" for source in sources), f"out={out}", f"train.steps={steps}", "train.log_every=1"]
    if not name.startswith("demo/"):
        return common
    size, spacing = choose_views(Archive.open(archive))
    return [*common, f"views.size={size}", f"views.spacing_mm={spacing}"]


def measure(name: str, path: Path, archive: Path, out: Path, steps: int) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Train a recipe and return its row and the steps."""
    api.pretrain(path, overrides(name, path, archive, out, steps))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "data_wait" in line]
    waits = [line["data_wait"] * line["seconds_per_step"] for line in logged]
    spent = [line["seconds_per_step"] for line in logged]
    row = {
        "recipe": name,
        "steps": len(logged),
        "median_step_ms": 1000 * statistics.median(spent),
        "median_wait_ms": 1000 * statistics.median(waits),
        "first_wait_ms": 1000 * waits[0],
        "wait_share": sum(waits) / sum(spent),
        "wait_share_without_first": sum(waits[1:]) / max(sum(spent[1:]), 1e-9),
    }
    return row, [{"seconds": s, "waited": w} for s, w in zip(spent, waits, strict=True)]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options_parser = parser(__doc__, repeats=200)
    options_parser.add_argument("--patients", type=int, default=60)
    options_parser.add_argument(
        "--size", type=int, nargs=3, default=[64, 56, 48], help="voxels of a phantom, the demo's by default"
    )
    options_parser.add_argument("--recipes", nargs="+", choices=sorted(chosen()), default=sorted(chosen()))
    options = options_parser.parse_args(argv)
    rows, checks, details = [], [], {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in options.recipes:
            path = chosen()[name]
            archive = phantom_archive(folder, domain_of(path), options.patients, options.size)
            row, details[name] = measure(name, path, archive, folder / name.replace("/", "_"), options.repeats)
            rows.append(row)
            checks.append(Check(f"{name}: share of step time waiting for data", row["wait_share"], LIMIT, at_least=False))
    notes = ["--repeats is the number of training steps here: each step is one measurement"]
    return finish(Result("data_wait", rows, checks, vars(options), notes, details), options.out)


if __name__ == "__main__":
    main()
