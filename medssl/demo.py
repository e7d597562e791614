"""The whole road in one call: phantoms (or a labelled folder) -> index -> cache -> pretrain -> evaluate -> fine-tune -> export -> report."""

from __future__ import annotations

import csv
import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from medssl import api
from medssl.archive.index import index
from medssl.archive.table import Archive
from medssl.errors import RequestError
from medssl.export.write import export_weights
from medssl.phantoms.cohort import make_cohort
from medssl.recipe import recipe_folder
from medssl.report.page import report
from medssl.weights import private_folder, write_atomic

PHANTOMS = 60
LONGEST_CROP = 32  # voxels; keeps a step well under a second on two cores
KEPT = ("demo", "archive", "pretrain", "evaluate", "finetune", "export")

Say = Callable[[str], None]
MakeProgress = Callable[[str], AbstractContextManager[Callable[..., None]]]


def run_demo(data: Path | None, out: Path, *, say: Say, progress: MakeProgress) -> dict[str, Any]:
    """Run the demo.

    Args:
        data: Folder with images/, labels/ and split.csv; None generates phantoms.
        out: Folder to write; what an earlier demo left there is replaced.
        say: Prints a line.
        progress: Makes a progress display.

    Returns:
        `summary` (of the label curve), `report` (path), `seconds` per step of the road.
    """
    started = time.perf_counter()
    seconds: dict[str, float] = {}
    prepare(out)

    def timed(name: str) -> None:
        done = time.perf_counter() - started
        seconds[name] = round(done - sum(seconds.values()), 1)

    if data is None:
        say(f"1/7 generating {PHANTOMS} labelled phantoms (NIfTI and DICOM)")
        with progress("phantoms") as update:
            cohort = make_cohort(out / "cohort", patients=PHANTOMS, on_progress=update)
    else:
        cohort = data
        say(f"1/7 using {data}")
    for name in ("images", "labels", "split.csv"):
        if not (cohort / name).exists():
            raise RequestError(
                f"{cohort} has no {name}; the demo needs a folder with images/, labels/ and split.csv (columns file, split)"
            )
    timed("data")
    say("2/7 indexing")
    with progress("index") as update:
        found = index(
            [cohort / "images"],
            out / "archive",
            splits=cohort / "split.csv",
            modality="MR",
            key_file=phantom_key(out) if data is None else None,
            on_progress=update,
        )
    say(f"    {found.n_files_seen} files seen, {found.n_files_used} used in {found.n_series} series")
    timed("index")
    size, spacing = choose_views(Archive.open(out / "archive"))
    weights = pretrain(out, size, spacing, say, progress)
    timed("pretrain")
    target = probe_target(cohort / "split.csv")
    if target:
        say(f"4/7 frozen probes of {target} on patients outside the pretraining")
        api.evaluate(
            recipe_folder() / "demo" / "evaluate.yaml",
            weights,
            [f"source.index={out / 'archive'}", f"table={cohort / 'split.csv'}", f"target={target}", f"out={out / 'evaluate'}"],
        )
    else:
        say("4/7 frozen probes skipped: split.csv has no numeric column to predict")
    timed("evaluate")
    summary = finetune(cohort, weights, out, size, spacing, say, progress)
    timed("finetune")
    say("6/7 exporting")
    for name in ("segresnet", "monai-bundle"):
        done = export_weights(weights, name, out / "export" / name)
        say(
            f"    {name}: {len(done.matched)} tensors matched, {len(done.missing)} missing, {len(done.unexpected)} unexpected, features equal"
        )
    timed("export")
    say("7/7 drawing the report")
    write_atomic(out / "demo.json", json.dumps({"timings": seconds}, indent=1).encode())
    page = report(out, out / "report.html", with_images=True)
    timed("report")
    return {"summary": summary, "report": str(page.resolve()), "seconds": seconds}


def phantom_key(out: Path) -> Path:
    """Write the id key of the phantoms: no patients, so it is no secret, and equal demos get equal ids and equal draws."""
    path = out / "phantom.key"
    path.write_text("phantoms have no patients to protect\n")
    path.chmod(0o600)
    return path


def prepare(out: Path) -> None:
    """Make room: remove what an earlier demo left, and nothing else.

    Raises:
        RequestError: The folder holds things that no demo wrote.
    """
    marker = out / "demo"
    if out.exists() and any(out.iterdir()) and not marker.is_file():
        raise RequestError(f"{out} holds other things; give an empty or new folder with --out")
    for name in KEPT[1:]:
        shutil.rmtree(out / name, ignore_errors=True)
    private_folder(out)
    marker.write_text("made by medssl demo; run it again to replace everything here\n")


def choose_views(archive: Archive) -> tuple[list[int], list[float]]:
    """Return view size (voxels, multiples of 8) and spacing (mm) that hold a typical volume in at most 32 voxels per axis."""
    rows = archive.select("kind = 'volume' and status != 'rejected'")
    spacings = np.median([row.spacing_mm for row in rows if row.spacing_mm], axis=0)
    extents = np.median([[n * s for n, s in zip(row.shape, row.spacing_mm)] for row in rows if row.spacing_mm], axis=0)
    spacing = max(float(spacings.min()), float(extents.max()) / LONGEST_CROP)
    size = [min(LONGEST_CROP, max(16, 8 * ceil(extent / spacing / 8))) for extent in extents]
    return size, [round(spacing, 2)] * 3


def pretrain(out: Path, size: Sequence[int], spacing: Sequence[float], say: Say, progress: MakeProgress) -> Path:
    """Pretrain without labels and return the run folder."""
    say(f"3/7 pretraining without labels (views of {'x'.join(map(str, size))} voxels at {spacing[0]} mm)")
    overrides = [
        f"data.index={out / 'archive'}",
        f"views.size={list(size)}",
        f"views.spacing_mm={list(spacing)}",
        f"out={out / 'pretrain'}",
    ]
    with progress("cache") as cached, progress("pretrain") as stepped:
        done = api.pretrain(recipe_folder() / "demo" / "pretrain.yaml", overrides, on_cache=cached, on_step=stepped)
    say(f"    {done.items} volumes, {len(done.failed)} could not be used; run folder {done.path}")
    return done.path


def finetune(
    cohort: Path, weights: Path, out: Path, size: Sequence[int], spacing: Sequence[float], say: Say, progress: MakeProgress
) -> dict[str, Any]:
    """Fine-tune from the weights and from scratch with few labels."""
    say("5/7 fine-tuning with few labels: from the weights, then the scratch twin")
    overrides = [
        f"cohort.path={cohort}",
        f"settings.crop={list(size)}",
        f"settings.spacing_mm={list(spacing)}",
        f"out={out / 'finetune'}",
    ]
    with progress("finetune") as stepped:
        return api.finetune(recipe_folder() / "demo" / "finetune.yaml", weights, overrides, twin=True, on_step=stepped)


def probe_target(table: Path) -> str | None:
    """Return the first column of a split table that holds a measured number: a name with a unit or a voxel count."""
    with open(table, newline="") as stream:
        columns = next(csv.reader(stream), [])
    return next((name for name in columns if name.endswith(("_ml", "_mm")) or name.startswith("vox_")), None)
