"""What a user can do, as plain functions; the command line prints around them. Nothing here prints."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medssl import build
from medssl.archive import index as indexing
from medssl.archive.index import IndexSummary, ScanOptions
from medssl.archive.scanning.cluster import executor_of
from medssl.cards.named import card_facts
from medssl.cards.schema import find_card, load_card
from medssl.domains.pixel_pass import PixelSummary, look_at_pixels
from medssl.errors import RequestError
from medssl.leakage import refuse_pretraining_images
from medssl.pretraining import RunResult, cache, pretrain
from medssl.probe_tasks import evaluate
from medssl.recipe import (
    TARGET_TASKS,
    FinetuneBagsRecipe,
)
from medssl.recipe_checks import load_recipe

__all__ = [
    "IndexResult",
    "RunResult",
    "cache",
    "evaluate",
    "finetune",
    "index",
    "label_curve",
    "list_runs",
    "load_recipe",
    "pretrain",
]
Progress = Callable[[int, int], None]
Note = Callable[[str], None]
StepProgress = Callable[[int, int, Mapping[str, float]], None]


@dataclass
class IndexResult(IndexSummary):
    """Outcome of `index`: what `IndexSummary` says, and what is known of the pixels.

    Args:
        pixels: What `pixels=True` found; None when nobody asked.
    """

    pixels: PixelSummary | None = None


def index(
    sources: Path | str | Sequence[Path | str],
    out: Path | str,
    *,
    site: str = "unknown",
    modality: str = "unknown",
    splits: Path | str | None = None,
    key_file: Path | str | None = None,
    workers: int | None = None,
    dask: str | None = None,
    options: ScanOptions | None = None,
    pixels: bool = False,
    on_progress: Progress | None = None,
    on_pixels: Progress | None = None,
) -> IndexResult:
    """Index the images under some folders, and look at their pixels if asked; running it again does what is new or changed.

    Args:
        sources: Folders or files, one or several.
        out: Folder of the index; made when absent.
        site: Your name for where the images come from.
        modality: MR, CT, CR, DX, US, SM or GM, for files that do not say (NIfTI, NRRD, MHA, pictures, videos).
        splits: CSV with the columns `file,split` and optionally `patient`.
        key_file: Your id key, mode 0600; None uses `out`/private/id.key, made when absent.
        workers: Processes, short form of `options.workers`.
        dask: Address of a Dask scheduler whose workers see the same paths; takes the place of `options.executor`.
        options: How the sources are scanned: a list of changed paths, pruning, `settle_s`, `limit_s`, `max_rate`.
        pixels: Read every usable series too: hashes, near-duplicates, blank or saturated images, text in them (docs/archive.md).
        on_progress: Called with (done, total) files.
        on_pixels: Called with (done, total) series.

    Raises:
        RequestError: A source, table, key or option cannot be used, no scheduler answers, or another process writes to `out`.
        StoreError: Writing failed; run again to go on.
    """
    several = [sources] if isinstance(sources, str | Path) else sources
    options = options or ScanOptions()
    if workers is not None:
        options = replace(options, workers=workers)
    with executor_of(dask) as executor:
        if executor is not None:
            options = replace(options, executor=executor)
        summary = indexing.index(
            [Path(source) for source in several],
            Path(out),
            site=site,
            modality=modality,
            splits=None if splits is None else Path(splits),
            key_file=None if key_file is None else Path(key_file),
            options=options,
            on_progress=on_progress,
        )
        looked = None
        if pixels:
            looked = look_at_pixels(
                Path(out), workers=options.workers, executor=options.executor, limit_s=options.limit_s, on_progress=on_pixels
            )
    return IndexResult(**vars(summary), pixels=looked)


def finetune(
    recipe: Any,
    weights: Path | str | None,
    overrides: Sequence[str] = (),
    *,
    seed: int = 0,
    twin: bool = False,
    on_step: StepProgress | None = None,
) -> dict[str, Any]:
    """Fine-tune for segmentation, classes, numbers or boxes, and the matched scratch twin when asked.

    Args:
        recipe: YAML path, `FinetuneRecipe`, `FinetuneTargetsRecipe`, `FinetuneBagsRecipe` or `FinetuneBoxesRecipe`.
        weights: Run folder or safetensors file; None or "scratch" trains from scratch.
        overrides: `key=value` assignments.
        seed: Seed of start weights and draws.
        twin: Also train from scratch with everything else equal, and report the paired difference.
        on_step: Progress.

    Returns:
        The summary of a one-cell label curve: `rows` and `differences`; details lie in `out/cells/`.
    """
    return label_curve(recipe, weights, overrides, counts=None, seeds=[seed], twin=twin, on_step=on_step)


def label_curve(
    recipe: Any,
    weights: Path | str | None,
    overrides: Sequence[str] = (),
    *,
    counts: Sequence[int] | None,
    seeds: Sequence[int],
    twin: bool = True,
    self_configuring: bool = False,
    on_cell: Any = None,
    on_step: StepProgress | None = None,
) -> dict[str, Any]:
    """Compute label-curve cells (labels x seed x arm) that are missing, then summarise; see `evaluation.label_curve`.

    Args:
        recipe: YAML path or `FinetuneRecipe`.
        weights: Run folder or safetensors file; None or "scratch" trains from scratch.
        overrides: `key=value` assignments.
        counts: Numbers of labelled volumes; None takes the recipe's `labels`.
        seeds: Seeds.
        twin: Also train the scratch twin of every cell.
        self_configuring: Of segmentation: in place of weights and twin the supervised baseline that plans network, voxel size and crop from the
            training cases of each cell (`evaluation.self_configuring`). Give it a folder of its own; weights are not looked at.
        on_cell: Called with (cells done, cells in all, cell, result).
        on_step: Progress within a cell.
    """
    from medssl.evaluation import label_curve as curve
    from medssl.evaluation import self_configuring as planned
    from medssl.evaluation.cohort import Cohort
    from medssl.evaluation.finetune import open_weights

    recipe = load_recipe(recipe, overrides, kind="finetune")
    if self_configuring and recipe.task != "segmentation":
        raise RequestError(
            f"{planned.ARM} network: the recipe is of {recipe.task}; its rules are those of segmentation; leave it out"
        )
    if isinstance(recipe, FinetuneBagsRecipe):
        from medssl.bag_tasks import bag_curve, refuse_weights

        refuse_weights(weights)
        return bag_curve(recipe, counts=counts, seeds=seeds, on_cell=on_cell, on_step=on_step)
    if recipe.task in TARGET_TASKS or recipe.task == "detection":
        from medssl.box_tasks import BoxRoad
        from medssl.finetune_cells import source_curve
        from medssl.target_tasks import TargetRoad

        road: Any = BoxRoad if recipe.task == "detection" else TargetRoad
        return source_curve(
            recipe, weights, open_road=road, counts=counts, seeds=seeds, twin=twin, on_cell=on_cell, on_step=on_step
        )
    settings = build.finetune_settings(recipe)
    cohort = Cohort.load(recipe.cohort.path, every=recipe.folds is not None)
    if recipe.cohort.card is not None:
        cohort = replace(cohort, card=card_facts(load_card(find_card(recipe.cohort.card))))
    arms: dict[str, Any] = {}
    leakage = curve.NO_WEIGHTS
    if self_configuring:
        settings, arms[planned.ARM] = planned.starting_point(settings), None
    elif weights is not None and str(weights) != "scratch":
        leakage = refuse_pretraining_images(weights, cohort, every=recipe.folds is not None)
        arms["pretrained"] = open_weights(weights, transfer=settings.transfer)
    if (twin and not self_configuring) or not arms:
        arms["scratch"] = None
    if counts is None and recipe.labels:
        counts = [recipe.labels]
    return curve.label_curve(
        cohort,
        settings,
        Path(recipe.out),
        arms=arms,
        counts=counts,
        seeds=seeds,
        folds=recipe.folds,
        leakage_check=leakage,
        configure=planned.configure if self_configuring else None,
        on_cell=on_cell,
        on_step=on_step,
    )


def list_runs(folder: Path | str) -> list[dict[str, Any]]:
    """Return one row per run folder below a folder, newest first."""
    rows = []
    for path in Path(folder).rglob("run.json"):
        facts = json.loads(path.read_text())
        last = _last_metrics(path.parent / "metrics.jsonl")
        rows.append(
            {
                "run": str(path.parent),
                "kind": facts.get("kind", ""),
                "status": facts.get("status", ""),
                "started": facts.get("started", ""),
                "step": last.get("step"),
                "loss": last.get("loss"),
                "seed": facts.get("seed"),
            }
        )
    return sorted(rows, key=lambda row: str(row["started"]), reverse=True)


def _last_metrics(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines() if '"loss"' in line]
    return lines[-1] if lines else {}
