"""What clips are asked beyond one label each: the phase of the heart, the outline of a chamber, whether a clip is unlike normal ones.

The road around `evaluation.clips`: from an index and a table to arrays, and from scores to `evaluate.json`. Every table carries the untrained
encoder and raw pixels beside the weights; folds, neighbours and intervals are by patient. Labels are checked, all of them, before anything is
embedded.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from medssl import build, data_sources, label_tables, probe_tasks
from medssl.domains.label_files.frames import FrameLabels, find_frame_labels, read_frame_labels
from medssl.errors import RequestError
from medssl.evaluation.clips import (
    HeadSettings,
    PixelTokens,
    anomaly_probe,
    embed_clips,
    labels_in_view,
    phase_retrieval,
    segmentation_probe,
)
from medssl.evaluation.controls import control_features, random_init
from medssl.evaluation.features import embed
from medssl.leakage import refuse_pretraining_patients
from medssl.recipe import EvaluateAnomalyRecipe, EvaluateBase, EvaluatePhaseRecipe, EvaluateSegmentationRecipe, SourceSection
from medssl.sampling.clips import PickedFrames, known_times
from medssl.types import ClipBatch, DrawKey
from medssl.weights import load_part

Progress = Callable[[int, int], None]
Facts = dict[str, Any]
Rows = list[dict[str, Any]]
CONTROLS = ("random_init", "raw_pixels")


@dataclass
class ClipLook:
    """The clips of an evaluation source, batch by batch, and what was shown of them.

    Args:
        source: Of `data_sources.evaluation_source`, with views of clips.
        device: Where views are made.
        batch: Clips per forward pass.
    """

    source: data_sources.ImageLike
    device: torch.device
    batch: int = 4

    def __post_init__(self) -> None:
        self._shown: list[dict[str, np.ndarray]] = []

    def __iter__(self) -> Iterator[tuple[ClipBatch, list[int]]]:
        name, self._shown = self.source.view_maker.name, []
        for views in data_sources.evaluation_batches(self.source, self.device, self.batch):
            parts = {part: views[f"{name}_{part}"][:, 0].cpu().numpy() for part in ("frame", "valid", "time_s", "map", "sector")}
            self._shown.append(parts)
            yield ClipBatch.of(views, name), views.meta.ids.tolist()

    @property
    def shown(self) -> dict[str, np.ndarray]:
        """What the last pass showed.

        Returns:
            `frame` (N, T) numbers in the file, `valid` (N, T), `time_s` (N, T), `map` (N, 2, 3), `sector` (N, h, w).
        """
        found = {key: np.concatenate([one[key] for one in self._shown]) for key in self._shown[0]}
        return {**found, "sector": found["sector"][:, 0]}


@dataclass
class Bench:
    """Weights and the clips that they are asked about.

    Args:
        encoder: The frozen encoder, on its device.
        manifest: Of the weights.
        section: The source, with the views of the weights.
        shelf: The cached series.
    """

    encoder: Any
    manifest: Mapping[str, Any]
    section: SourceSection
    shelf: data_sources.Shelf

    @property
    def device(self) -> torch.device:
        """Where the encoder lies."""
        return next(self.encoder.parameters()).device  # type: ignore[no-any-return]

    @property
    def tubelet(self) -> int:
        """Frames per step of the encoder."""
        return int(self.encoder.patch_size[0])

    def source(self, series: Sequence[str]) -> data_sources.ImageLike:
        """Show the middle of these series, in this order."""
        return data_sources.evaluation_source("source", self.shelf, self.section, series)

    def encoders(self, seed: int) -> dict[str, nn.Module]:
        """Return the encoder and its controls, by their names in the table."""
        untrained = random_init(lambda: build.build_encoder(self.manifest["encoder"]), seed)
        share = float(getattr(self.encoder, "valid_share", 0.25))
        pixels = PixelTokens(self.encoder.patch_size, share=share)
        return {"encoder": self.encoder, "random_init": untrained.to(self.device), "raw_pixels": pixels.to(self.device)}

    def times_ms(self, series_id: str) -> np.ndarray:
        """Return when each frame of a cine began."""
        return known_times(self.shelf.reader.record(series_id))

    def picked(self, series: Sequence[str]) -> list[PickedFrames]:
        """Return which frames each clip shows, without reading any."""
        sampler: Any = self.source(series).sampler
        return [sampler.draw(DrawKey(0, 0, place)).views[0] for place in range(len(series))]

    def patients(self, series: Sequence[str]) -> list[str] | None:
        """Return the patient of each series, None when one is unknown."""
        rows = {row.series_id: row for row in self.shelf.rows}
        if any("patient_unknown" in rows[name].quality_flags for name in series):
            return None
        return [rows[name].patient_id for name in series]


def evaluate_clips(recipe: EvaluateBase, weights: Path | str, on_cache: Progress | None = None) -> dict[str, Any]:
    """Ask weights of clips what the recipe's task asks, beside the controls; see `probe_tasks.evaluate`.

    Raises:
        RequestError: Recipe, table, labels and weights do not go together; nothing was written to `out`.
        LeakageError: A patient was pretrained on.
    """
    started = time.perf_counter()
    _check_paths(recipe)
    encoder = build.load_encoder(weights)
    _, manifest = load_part(weights)
    section, forced = probe_tasks.matching_section(recipe, manifest)
    if section.views.get("kind") != "clip":
        raise RequestError(
            f"task {recipe.task}: asked of clips, and the weights are of encoder {manifest['encoder']['name']}, shown "  # type: ignore[attr-defined]
            f"{section.views.get('kind', 'volume')}s; give weights of video_vit"
        )
    probe_tasks.refuse_size(manifest["encoder"], section.views)
    shelf = data_sources.fill_shelf("source", section, on_progress=on_cache)
    leakage = refuse_pretraining_patients(weights, shelf)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(encoder.to(device), manifest, section, shelf)
    if isinstance(recipe, EvaluatePhaseRecipe):
        rows, facts = phase(recipe, bench)
    elif isinstance(recipe, EvaluateSegmentationRecipe):
        rows, facts = segmentation(recipe, bench)
    else:
        assert isinstance(recipe, EvaluateAnomalyRecipe)
        rows, facts = anomaly(recipe, bench)
    found = {**facts, "forced": forced, "rows": rows, "seconds": time.perf_counter() - started}
    return probe_tasks.write_evaluation(recipe, manifest, leakage, shelf, found)


def _some(series: Sequence[str], count: int = 3) -> str:
    """Name the first few series of many."""
    return ", ".join(name[:8] for name in series[:count]) + (" ..." if len(series) > count else "")


def _check_paths(recipe: EvaluateBase) -> None:
    columns = (recipe.ed, recipe.es) if isinstance(recipe, EvaluatePhaseRecipe) else (recipe.target,)  # type: ignore[attr-defined]
    label_tables.check_table(recipe.table, recipe.file_column, *columns)
    if isinstance(recipe, EvaluateSegmentationRecipe) and not Path(recipe.labels).is_dir():
        raise RequestError(f"labels: no such folder: {recipe.labels}; give the folder of the label files that {recipe.table} names")


# --- phase


def phase(recipe: EvaluatePhaseRecipe, bench: Bench) -> tuple[Rows, Facts]:
    """Find end diastole and end systole by a ridge on the steps of a clip; see `evaluation.clips.phase_retrieval`."""
    marks = {mark: read_marks(recipe, bench, column) for mark, column in (("ed", recipe.ed), ("es", recipe.es))}
    series = [row.series_id for row in bench.shelf.rows if all(row.series_id in found for found in marks.values())]
    steps: dict[str, list[list[int]]] = {"ed": [], "es": []}
    between = []
    for name, picked in zip(series, bench.picked(series)):
        for mark, found in marks.items():
            steps[mark].append(steps_of(found[name], picked, bench.times_ms(name), bench.tubelet))
        between.append(
            1000 * bench.tubelet * float(np.median(np.diff(picked.time_s[picked.valid]))) if picked.valid.sum() > 1 else 0.0
        )
    used = [n for n in range(len(series)) if steps["ed"][n] and steps["es"][n]]
    if not used:
        raise RequestError(
            f"task phase: of {len(series)} clips with marks in {recipe.ed} and {recipe.es}, none shows one of each; clips show "
            f"{bench.section.views['frames']} frames at {bench.section.views['fps']} per second of the middle: give more frames or a lower fps "
            "in source.views, or correct the table"
        )
    chosen = [series[n] for n in used]
    ed, es = ([steps[mark][n] for n in used] for mark in ("ed", "es"))
    groups, frame_ms = bench.patients(chosen), [between[n] for n in used]
    rows: Rows = []
    for name, encoder in bench.encoders(recipe.seed).items():
        features = list(step_features(bench, encoder, chosen, recipe.batch))
        rows += phase_retrieval(features, ed, es, groups, name=name, frame_ms=frame_ms, folds=recipe.folds, seed=recipe.seed)
    facts = {
        "target": f"{recipe.ed}, {recipe.es}",
        "clips": {"marked": len(series), "used": len(used)},
        "step_ms": float(np.median(frame_ms)),
    }
    return rows, facts


def step_features(bench: Bench, encoder: nn.Module, series: Sequence[str], batch: int) -> np.ndarray:
    """Return (N, t, E) features of the steps of clips; of pixels the mean grey of each place, because their mean says little."""
    look = ClipLook(bench.source(series), bench.device, batch)
    if not isinstance(encoder, PixelTokens):
        return embed_clips(encoder, look).steps
    rows = []
    for clips, ids in look:  # batch by batch, because all pixels of all clips would not fit
        found = embed_clips(encoder, [(clips, ids)], tokens=True)
        assert found.tokens is not None
        grey = found.tokens.mean(axis=4).reshape(*found.tokens.shape[:2], -1)
        grey[np.logical_not(found.token_valid).all(axis=(2, 3))] = np.nan
        rows.append(grey)
    return np.concatenate(rows)


def read_marks(recipe: EvaluatePhaseRecipe, bench: Bench, column: str) -> dict[str, list[int]]:
    """Return series_id -> frame numbers of a column of the table.

    Raises:
        RequestError: A cell is no list of numbers, or names a frame that the cine does not have. All such series are counted.
    """
    texts = label_tables.read_targets(recipe.table, recipe.file_column, column, bench.shelf)
    whole = recipe.unit == "frames"
    found: dict[str, list[int]] = {}
    unreadable, beyond = [], []
    for series_id, text in texts.items():
        numbers = _numbers(text)
        times = bench.times_ms(series_id)
        last = len(times) - 1.0 if whole else times[-1] - times[0] + _step(times)
        if numbers is None or (whole and any(number % 1 for number in numbers)):
            unreadable.append(series_id)
        elif not all(0 <= number <= last for number in numbers):
            beyond.append(series_id)
        else:
            found[series_id] = [int(n if whole else np.abs(times - times[0] - n).argmin()) for n in numbers]
    what = "frame numbers from 0" if whole else "times in ms from the first frame"
    for wrong, sentence in ((unreadable, f"no {what}"), (beyond, f"{what} that the cine does not have")):
        if wrong:
            raise RequestError(
                f"column {column}: {len(wrong)} of {len(texts)} cells hold {sentence} (series {_some(wrong)}); accepted: numbers separated by "
                f"spaces, such as 3 21 39, or nothing; correct the table, or set unit: {'ms' if whole else 'frames'}"
            )
    return found


def _numbers(text: str) -> list[float] | None:
    try:
        found = [float(part) for part in re.split(r"[\s,;]+", text.strip(" [](),;")) if part]
    except ValueError:
        return None
    return found if found and all(np.isfinite(found)) else None


def _step(times_ms: np.ndarray) -> float:
    return float(np.median(np.diff(times_ms))) if len(times_ms) > 1 else 0.0


def steps_of(frames: Sequence[int], picked: PickedFrames, times_ms: np.ndarray, tubelet: int) -> list[int]:
    """Return the steps of a clip (tubelets) that show these frames of the file; frames outside what is shown are left out.

    Args:
        frames: Frame numbers.
        picked: What the clip shows.
        times_ms: (T,) of the file.
        tubelet: Frames per step.
    """
    shown = times_ms[picked.frames[picked.valid]]
    near = max(0.5 * _step(shown), 0.5 * _step(times_ms))
    away = [np.abs(shown - times_ms[frame]) for frame in frames]
    return sorted({int(one.argmin()) // tubelet for one in away if one.min() <= near})


# --- segmentation


def segmentation(recipe: EvaluateSegmentationRecipe, bench: Bench) -> tuple[Rows, Facts]:
    """Draw structures on single frames with a head on frozen tokens; see `evaluation.clips.segmentation_probe`."""
    found = read_label_files(recipe, bench)
    series = [row.series_id for row in bench.shelf.rows if row.series_id in found]
    chosen = {}
    for name, picked in zip(series, bench.picked(series)):
        steps = labelled_steps(found[name].frames, picked, bench.tubelet)
        if steps:
            places = np.unique(np.linspace(0, len(steps) - 1, recipe.frames).round().astype(int))
            chosen[name] = [steps[int(place)] for place in places]
    if not chosen:
        raise RequestError(
            f"task segmentation: none of {len(series)} clips shows a labelled frame; clips show {bench.section.views['frames']} frames at "
            f"{bench.section.views['fps']} per second of the middle: give a higher fps or more frames in source.views"
        )
    names = list(chosen)
    values = {value: number for number, value in enumerate(recipe.structures.values(), start=1)}
    structures = dict(zip(values.values(), recipe.structures))
    rows: Rows = []
    labels: np.ndarray | None = None
    owner = [name for name in names for _ in chosen[name]]
    groups = bench.patients(owner)
    for title, encoder in bench.encoders(recipe.seed).items():
        tokens, shown, size = chosen_tokens(bench, encoder, names, chosen, recipe.batch)
        if labels is None:
            labels = _view_labels(found, names, chosen, shown, size, values, bench.tubelet)
        made, _ = segmentation_probe(
            tokens,
            labels,
            groups,
            structures,
            name=title,
            settings=HeadSettings(**recipe.head),
            seed=recipe.seed,
            device=bench.device,
        )
        rows += made
    facts = {"target": ", ".join(recipe.structures), "clips": {"labelled": len(series), "used": len(names)}, "frames": len(owner)}
    return rows, facts


def read_label_files(recipe: EvaluateSegmentationRecipe, bench: Bench) -> dict[str, FrameLabels]:
    """Return series_id -> labels of its frames, every file read and held against its cine.

    Raises:
        RequestError: Files are missing, unreadable or of another size than their cines (counted), or a structure is in none of them.
    """
    names = label_tables.read_targets(recipe.table, recipe.file_column, recipe.target, bench.shelf)
    found: dict[str, FrameLabels] = {}
    faults: dict[str, list[str]] = {}
    seen: set[int] = set()
    for series_id, name in names.items():
        path = find_frame_labels(Path(recipe.labels), name)
        if path is None:
            faults.setdefault("no such file in the folder of labels", []).append(series_id)
            continue
        shape = tuple(bench.shelf.reader.record(series_id).shape)
        try:
            labels = read_frame_labels(path, (shape[0], shape[1], shape[2]), drawn=recipe.labelled == "drawn")
        except RequestError as err:
            faults.setdefault(str(err), []).append(series_id)
            continue
        seen |= labels.values
        if len(labels.frames):
            found[series_id] = labels
    if faults:
        parts = "; ".join(f"{len(series)} clips: {fault} (series {_some(series)})" for fault, series in faults.items())
        raise RequestError(f"labels: {sum(map(len, faults.values()))} of {len(names)} label files cannot be used. {parts}")
    lacking = [name for name, value in recipe.structures.items() if value not in seen]
    if lacking:
        raise RequestError(
            f"structures: {', '.join(lacking)} is in none of {len(names)} label files, which hold {sorted(seen)}; correct its value"
        )
    return found


def labelled_steps(frames: np.ndarray, picked: PickedFrames, tubelet: int) -> list[tuple[int, int]]:
    """Return (step, place of the frame in the clip) of the steps that show a labelled frame, the first one of each."""
    labelled = np.isin(picked.frames, frames) & picked.valid
    found: dict[int, int] = {}
    whole = [all(step) for step in picked.valid[: len(picked.valid) // tubelet * tubelet].reshape(-1, tubelet)]
    for place in np.flatnonzero(labelled):
        step = int(place) // tubelet
        if step < len(whole) and whole[step]:  # a step that is half filled in is never computed
            found.setdefault(step, int(place))
    return sorted(found.items())


def chosen_tokens(
    bench: Bench, encoder: nn.Module, names: Sequence[str], chosen: Mapping[str, Sequence[tuple[int, int]]], batch: int
) -> tuple[np.ndarray, dict[str, np.ndarray], tuple[int, int]]:
    """Return the tokens (M, h, w, E) of the chosen steps of clips, what was shown (see `ClipLook.shown`), and the size of the views."""
    source = bench.source(names)
    look = ClipLook(source, bench.device, batch)
    rows = []
    for clips, ids in look:  # batch by batch, because all tokens of all clips would not fit
        found = embed_clips(encoder, [(clips, ids)], tokens=True)
        assert found.tokens is not None
        rows += [found.tokens[n, step].copy() for n, number in enumerate(ids) for step, _ in chosen[names[number]]]
    _, height, width = data_sources.make_views(bench.section.views).spec.size
    return np.stack(rows), look.shown, (height, width)


def _view_labels(
    found: Mapping[str, FrameLabels],
    names: Sequence[str],
    chosen: Mapping[str, Sequence[tuple[int, int]]],
    shown: Mapping[str, np.ndarray],
    size: tuple[int, int],
    values: Mapping[int, int],
    tubelet: int,
) -> np.ndarray:
    """Return the labels (M, h, w) of the chosen frames as the views show them: 1, 2 ... for the structures, 0 for anything else."""
    rows = []
    for n, name in enumerate(names):
        labels = found[name].read()
        numbers = shown["frame"][n, [place for _, place in chosen[name]]]
        places = np.searchsorted(found[name].frames, numbers).tolist()
        numbered = np.zeros(labels.shape, dtype=np.int64)
        for value, number in values.items():
            numbered[labels == value] = number
        rows.append(labels_in_view(numbered, places, shown["map"][n], size, shown["sector"][n]))
    return np.concatenate(rows)


# --- anomaly


def anomaly(recipe: EvaluateAnomalyRecipe, bench: Bench) -> tuple[Rows, Facts]:
    """Score the mean distance of clips to the nearest normal clips of other patients; see `evaluation.clips.anomaly_probe`."""
    if wrong := [k for k in recipe.k if k < 1]:
        raise RequestError(f"k is {wrong[0]}; accepted: 1 or more neighbours")
    texts, series, groups = probe_tasks.labelled_rows(
        bench.shelf, recipe.table, recipe.file_column, recipe.target, "classification"
    )
    normal_words = [str(word) for word in recipe.normal]
    absent = [word for word in normal_words if word not in set(texts.tolist())]
    if absent:
        raise RequestError(
            f"normal: no labelled clip has the value {', '.join(absent)} in column {recipe.target}, which holds {len(set(texts.tolist()))} "
            "different values; correct normal, or the table"
        )
    normal = np.isin(texts, normal_words)
    if normal.all():
        raise RequestError(f"column {recipe.target}: all {len(texts)} labelled clips are normal; a score needs others beside them")
    source = bench.source(series)

    def batches() -> Any:
        return data_sources.images_and_ids(source, bench.device, recipe.batch)

    features, _ = embed(bench.encoder, batches())
    controls = control_features(
        lambda: build.build_encoder(bench.manifest["encoder"]), batches, seed=recipe.seed, device=bench.device
    )
    rows: Rows = []
    for k in recipe.k:
        for name, values in {"encoder": features, **controls}.items():
            rows += anomaly_probe(values, ~normal, groups, name=name, k=k, seed=recipe.seed)
    return rows, {"target": recipe.target, "clips": {"normal": int(normal.sum()), "other": int((~normal).sum())}}
