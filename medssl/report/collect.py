"""Find and read what runs left in a folder; whatever is missing stays empty, whatever is broken is named."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from medssl.errors import RequestError
from medssl.report.clip_figures import ClipStrip, read_clips, read_regression
from medssl.report.figures import PICTURE, Cut, busiest_slices, cut_volume, structure_weight

Json = dict[str, Any]

_DEPTH = 5
# Voxels, checkpoints and owner-only folders: nothing there is for a report.
_SKIP = {"private", "checkpoints", "images", "labels", "store", "embeddings", "parts"}
_LIMIT_BYTES = 512 * 2**20  # of arrays read from one figures file


@dataclass(frozen=True)
class PicturedCase:
    """One test case of a fine-tuning run, cut in up to three planes.

    Args:
        cuts: Plane -> slice with the maps `label` and `prediction`.
        dice: Mean Dice over the structures of the whole case, None when unknown.
    """

    cuts: dict[str, Cut]
    dice: float | None


@dataclass(frozen=True)
class Segmentation:
    """Pictures of one arm.

    Args:
        arm: `scratch`, or the name of the weights.
        group: Number of labels and seed of the run; arms are compared inside a group.
        structures: Names of the label values from 1.
        cases: In file order.
    """

    arm: str
    group: tuple[str, ...]
    structures: list[str]
    cases: list[PicturedCase]


@dataclass
class Leftovers:
    """What one run or demo folder holds for a report.

    Args:
        root: The folder.
        run: `run.json`, empty when absent.
        manifest: Weights manifest of the default part.
        metrics: Lines of `metrics.jsonl` in order.
        results: Fine-tuning results (`results.json`).
        evaluations: Rows of all `evaluate.json`.
        curves: Label curves (`summary.json` with `rows` of labels and Dice), each beside `curve.jsonl`.
        demo: `demo.json`.
        archives: Index summaries (`summary.json` with `n_files_seen`).
        caches: Cache summaries (`written` and `failed`).
        reconstructions: Arrays of `figures/reconstruction.npz`.
        segmentations: Pictures of `figures/segmentation.npz`, one entry per arm and file.
        clips: Clips of `figures/clips.npz`.
        regressions: Targets and predictions of `figures/regression.npz`, each under the name of its folder.
        faults: What was there and could not be read, one sentence each.
        notes: Choices made while reading, one sentence each.
    """

    root: Path
    run: Json = field(default_factory=dict)
    manifest: Json = field(default_factory=dict)
    metrics: list[Json] = field(default_factory=list)
    results: list[Json] = field(default_factory=list)
    evaluations: list[Json] = field(default_factory=list)
    curves: list[Json] = field(default_factory=list)
    demo: Json = field(default_factory=dict)
    archives: list[Json] = field(default_factory=list)
    caches: list[Json] = field(default_factory=list)
    reconstructions: list[dict[str, np.ndarray]] = field(default_factory=list)
    segmentations: list[Segmentation] = field(default_factory=list)
    clips: list[ClipStrip] = field(default_factory=list)
    regressions: list[tuple[str, np.ndarray, np.ndarray]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def only_evaluated(self) -> bool:
        """Whether evaluations are there, and no run, fine-tuning, demo or archive."""
        others = (self.run, self.metrics, self.results, self.curves, self.demo, self.archives)
        return bool(self.evaluations) and not any(others)


def holds_nothing(found: Leftovers) -> bool:
    """Return whether a folder holds nothing that medssl wrote, a folder of images for instance."""
    return not any(getattr(found, item.name) for item in fields(found) if item.name != "root")


def collect(root: Path, *, with_images: bool = True) -> Leftovers:
    """Read a run folder, an archive, or a folder that holds several of them.

    Args:
        root: Folder to look through, five levels deep; symbolic links are not followed.
        with_images: Whether to read figures at all.

    Raises:
        RequestError: It is no folder.
    """
    if not root.is_dir():
        raise RequestError(f"{root}: not a folder; give the run folder, archive or demo folder that a report is for")
    found = Leftovers(root)
    paths = sorted(_walk(root), key=lambda path: (len(path.parts), str(path)))
    # A demo folder may hold several runs; the one with pretraining metrics is what the report is about.
    run_files = [path for path in paths if path.name == "run.json"]
    with_metrics = [path for path in run_files if (path.parent / "metrics.jsonl").exists()]
    run_file = next(iter(with_metrics or run_files), None)
    if len(with_metrics) > 1:
        found.notes.append(f"{len(with_metrics)} runs found; curves and settings are those of the first.")
    run_folder = run_file.parent if run_file else root
    if run_file:
        found.run = _json(run_file, found) or {}
    if (run_folder / "metrics.jsonl").is_file():
        found.metrics = _json_lines(run_folder / "metrics.jsonl", found)
    found.manifest = _manifest(run_folder, found)
    for path in paths:
        _sort_in(path, found, with_images)
    return found


def _walk(folder: Path, depth: int = _DEPTH) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.is_symlink():
                continue
            if entry.is_dir() and depth > 0 and entry.name not in _SKIP:
                yield from _walk(Path(entry.path), depth - 1)
            elif entry.is_file() and entry.name.endswith((".json", ".jsonl", ".npz")):
                yield Path(entry.path)


def _sort_in(path: Path, found: Leftovers, with_images: bool) -> None:
    """Read one file by its name and put it where it belongs."""
    if path.name == "results.json":
        if content := _json(path, found):
            found.results.append(content)
    elif path.name == "evaluate.json":
        content = _json(path, found)
        if content:
            rows = _rows(content.get("rows"), path, found)
            found.evaluations += [{"target": content.get("target"), "forced": content.get("forced"), **row} for row in rows]
            found.notes += [str(note) for note in _as_list(content.get("notes"))]
    elif path.name == "demo.json":
        found.demo = _json(path, found) or found.demo
    elif path.name == "summary.json":
        content = _json(path, found)
        if content and "n_files_seen" in content:
            found.archives.append(content)
        elif content and "written" in content and "failed" in content:
            found.caches.append(content)
        elif content and "rows" in content:
            rows, differences = (_rows(content.get(key), path, found) for key in ("rows", "differences"))
            found.curves.append({**content, "name": path.parent.name, "rows": rows, "differences": differences})
    elif with_images and path.name == "reconstruction.npz":
        arrays = _arrays(path, found)
        if arrays and _one_shape(arrays, ("input", "output", "mask"), path, found):
            found.reconstructions.append(arrays)
    elif with_images and path.name == "segmentation.npz":
        arrays = _arrays(path, found)
        if arrays and _one_shape(arrays, ("image", "label", "prediction"), path, found):
            found.segmentations.append(_pictures(arrays, _result_beside(path, found), path))
    elif with_images and path.name in ("clips.npz", "regression.npz") and (arrays := _arrays(path, found)):
        _of_video(path, arrays, found)


def _of_video(path: Path, arrays: dict[str, np.ndarray], found: Leftovers) -> None:
    """Put what a video run left where it belongs; note a fault when it is not what it should be."""
    clips = read_clips(arrays) if path.name == "clips.npz" else None
    pairs = read_regression(arrays) if path.name == "regression.npz" else None
    for wrong in (clips, pairs):
        if isinstance(wrong, str):
            found.faults.append(f"{_shown(path, found)}: {wrong}; left out.")
    if isinstance(clips, list):
        found.clips += clips
    if isinstance(pairs, tuple):
        found.regressions.append((path.parent.parent.name, *pairs))


def _shown(path: Path, found: Leftovers) -> str:
    """Name a file inside the folder without saying where the folder lies."""
    return str(path.relative_to(found.root))


def _json(path: Path, found: Leftovers) -> Json | None:
    """Return the object in a file, or None with a fault noted."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as err:
        found.faults.append(f"{_shown(path, found)}: not valid JSON (line {err.lineno}, column {err.colno}); left out.")
        return None
    except (OSError, UnicodeDecodeError, RecursionError) as err:
        found.faults.append(f"{_shown(path, found)}: cannot be read ({type(err).__name__}); left out.")
        return None
    if not isinstance(content, dict):
        found.faults.append(f"{_shown(path, found)}: holds a {type(content).__name__}, expected an object; left out.")
        return None
    return content


def _json_lines(path: Path, found: Leftovers) -> list[Json]:
    """Return the objects of a JSON-lines file; lines that cannot be read are counted in one fault."""
    rows, broken = [], []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as err:
        found.faults.append(f"{_shown(path, found)}: cannot be read ({type(err).__name__}); left out.")
        return []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            broken.append(number)
    if broken:
        why = "the last line is cut short" if broken == [len(lines)] else f"the first is line {broken[0]}"
        found.faults.append(f"{_shown(path, found)}: {len(broken)} of {len(lines)} lines are not JSON objects ({why}); left out.")
    return rows


def _rows(value: Any, path: Path, found: Leftovers) -> list[Json]:
    """Return the objects of a list; says so when it is something else."""
    rows = [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
    if value is not None and (not isinstance(value, list) or len(rows) < len(value)):
        found.faults.append(f"{_shown(path, found)}: rows are expected to be a list of objects; others were left out.")
    return rows


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _manifest(run_folder: Path, found: Leftovers) -> Json:
    """Return the manifest of the default part of the last weights."""
    index = run_folder / "weights" / "index.json"
    default = (_json(index, found) or {}).get("default", "encoder") if index.is_file() else "encoder"
    path = run_folder / "weights" / "last" / f"{Path(str(default)).name}.json"
    return (_json(path, found) or {}) if path.is_file() else {}


def _result_beside(path: Path, found: Leftovers) -> Json:
    """Return the fine-tuning result that a figures file belongs to; its own faults are noted where it is read."""
    beside = path.parent.parent / "results.json"
    if not beside.is_file() or not beside.is_relative_to(found.root):
        return {}
    return _json(beside, Leftovers(found.root)) or {}


def _arrays(path: Path, found: Leftovers) -> dict[str, np.ndarray]:
    """Return the arrays of a figures file; none, with a fault noted, when it is broken."""
    arrays: dict[str, np.ndarray] = {}
    total = 0
    try:
        # numpy leaves a file open that it fails to read, so it is given an open one
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as content:
            for name in content.files:
                arrays[name] = content[name]
                total += arrays[name].nbytes
                if total > _LIMIT_BYTES:
                    found.faults.append(f"{_shown(path, found)}: larger than {_LIMIT_BYTES >> 20} MiB; left out.")
                    return {}
    except Exception as err:  # zip, zlib, npy header and pickle refusals have no common class
        found.faults.append(f"{_shown(path, found)}: cannot be read as arrays ({type(err).__name__}); left out.")
        return {}
    if not arrays:
        found.faults.append(f"{_shown(path, found)}: holds no arrays.")
    return arrays


def _one_shape(arrays: dict[str, np.ndarray], needed: tuple[str, ...], path: Path, found: Leftovers) -> bool:
    """Check that arrays are there as (N, X, Y, Z) of one shape; note a fault when they are not."""
    missing = [name for name in needed if name not in arrays]
    if missing:
        found.faults.append(f"{_shown(path, found)}: has no array {', '.join(missing)}; left out.")
        return False
    shape = arrays[needed[0]].shape
    if len(shape) != 4 or any(arrays[name].shape != shape for name in needed):
        shapes = ", ".join(f"{name} {arrays[name].shape}" for name in needed)
        found.faults.append(f"{_shown(path, found)}: expected equal shapes (N, X, Y, Z), found {shapes}; left out.")
        return False
    return True


def _case_dice(arrays: dict[str, np.ndarray], i: int) -> float | None:
    """Return the mean Dice of case i from `dice` (N,) or (N, S)."""
    dice = arrays.get("dice")
    if dice is None or dice.ndim == 0 or i >= len(dice) or not np.issubdtype(dice.dtype, np.number):
        return None
    finite = np.atleast_1d(dice[i])[np.isfinite(np.atleast_1d(dice[i]))]
    return float(finite.mean()) if finite.size else None


def spacing_of(arrays: dict[str, np.ndarray], i: int) -> tuple[float, float, float]:
    """Return the voxel size of case i from `spacing_mm` (N, 3) or (3,); ones where it is absent or no size."""
    spacing = np.asarray(arrays.get("spacing_mm", np.ones(3)), dtype=np.float64)
    one = spacing[i] if spacing.ndim == 2 and i < len(spacing) else spacing
    if one.shape != (3,) or not (np.isfinite(one) & (one > 0)).all():
        return 1.0, 1.0, 1.0
    return float(one[0]), float(one[1]), float(one[2])


def _pictures(arrays: dict[str, np.ndarray], result: Json, path: Path) -> Segmentation:
    """Cut `image`, `label`, `prediction` (N, X, Y, Z) of one fine-tuning run where the structures are; pictures are (N, H, W, 1)."""
    cases = []
    for i, (image, label, prediction) in enumerate(zip(arrays["image"], arrays["label"], arrays["prediction"])):
        maps, spacing = {"label": label, "prediction": prediction}, spacing_of(arrays, i)
        if bool(np.any(arrays.get("picture", False))):
            flat = {heading: found[..., 0] for heading, found in maps.items()}
            cuts = {PICTURE: Cut(image[..., 0], flat, (float(spacing[0]), float(spacing[1])))}
        else:
            cuts = cut_volume(image, maps, spacing, busiest_slices(structure_weight(label)))
        cases.append(PicturedCase(cuts, _case_dice(arrays, i)))
    by_name = next((name for name in ("pretrained", "scratch") if name in path.parts), "prediction")
    return Segmentation(
        arm=str(result.get("arm") or by_name),
        group=tuple(str(result.get(key, "")) for key in ("labels", "seed")),
        structures=[str(name) for name in arrays.get("structures", np.array([], dtype=str)).ravel()],
        cases=cases,
    )


def number(value: Any) -> float | None:
    """Return a finite float, or None for anything else (text, NaN, a boolean)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)
