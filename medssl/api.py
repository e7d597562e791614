"""What a user can do, as plain functions; the command line prints around them. Nothing here prints."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from medssl import build, data_sources
from medssl.archive import index as indexing
from medssl.archive.index import IndexSummary, ScanOptions
from medssl.archive.scanning.cluster import executor_of
from medssl.cards.named import SourceCards, assign, card_facts
from medssl.cards.schema import find_card, load_card
from medssl.data_sources import ImageLike
from medssl.domains.pixel_pass import PixelSummary, look_at_pixels
from medssl.errors import RequestError
from medssl.evaluation.controls import control_features
from medssl.evaluation.features import embed, probe_table
from medssl.evaluation.knn import knn_probe
from medssl.evaluation.linear_probe import linear_predict, linear_probe
from medssl.evaluation.scores import METRICS
from medssl.recipe import (
    TARGET_TASKS,
    EvaluateBase,
    EvaluateRecipe,
    FinetuneBagsRecipe,
    FinetuneBoxesRecipe,
    FinetuneTargetsRecipe,
    PretrainRecipe,
    ProbeSection,
    Recipe,
    SourceSection,
    SuiteRecipe,
)
from medssl.registry import lookup
from medssl.sampling.items import Item, items_hash
from medssl.sampling.items import write as write_items
from medssl.training import distributed
from medssl.training.event_file import EventFile
from medssl.training.loop import Callback, train
from medssl.training.monitors import CollapseMonitor, feature_monitors
from medssl.training.run_folder import RunFolder, facts_of_machine, now
from medssl.types import DrawKey, Views
from medssl.weights import find_part, load_part, private_folder, write_atomic

Progress = Callable[[int, int], None]
Note = Callable[[str], None]
StepProgress = Callable[[int, int, Mapping[str, float]], None]


@dataclass(frozen=True)
class RunResult:
    """Outcome of `pretrain`.

    Args:
        path: The run folder.
        status: `finished` or `interrupted`.
        items: Volumes trained on.
        failed: series_id -> (reason, message) of volumes that could not be used.
    """

    path: Path
    status: str
    items: int
    failed: Mapping[str, tuple[str, str]]


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


def load_recipe(recipe: Any, overrides: Sequence[str] = (), kind: str | None = None) -> Any:
    """Return a validated recipe from a path, a run folder, or a recipe object.

    Args:
        recipe: YAML path, run folder (its resolved recipe), or a loaded recipe.
        overrides: `key=value` assignments; only for paths.
        kind: Kind that the caller needs.

    Raises:
        RecipeError: The recipe has faults.
        RequestError: It is of another kind.
    """
    if isinstance(recipe, str | Path):
        path = Path(recipe)
        if path.is_dir():  # a run folder is itself, wherever it was moved to
            recipe = Recipe.load(path / "recipe.yaml", [*overrides, f"out={path}"])
        else:
            recipe = Recipe.load(path, overrides)
    if kind and recipe.kind != kind:
        command = "evaluate --suite" if kind == "suite" else kind
        hint = "; `medssl evaluate --suite` runs it" if recipe.kind == "suite" else ""
        raise RequestError(f"this is a recipe of kind {recipe.kind}{hint}; `medssl {command}` needs one with kind: {kind}")
    build.check(recipe)
    return recipe


def cache(recipe: Any, overrides: Sequence[str] = (), on_progress: Progress | None = None) -> dict[str, Any]:
    """Write the stores that a recipe needs; what is there already is left alone.

    Returns:
        Per source: written, present, failed {series_id: (reason, message)}, store.
    """
    recipe = load_recipe(recipe, overrides)
    sources = {"source": recipe.source} if isinstance(recipe, EvaluateBase) else getattr(recipe, "sources", {})
    if not sources:
        raise RequestError("this recipe needs no store: fine-tuning reads its cohort directly")
    result = {}
    for name, section in sources.items():
        shelf = data_sources.fill_shelf(name, section, on_progress=on_progress)
        done = shelf.summary
        folder = str(data_sources.store_folder(section, shelf.domain))
        result[name] = {"written": done.written, "present": done.present, "failed": done.failed, "store": folder}
    return result


def pretrain(
    recipe: Any,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    on_note: Note | None = None,
    on_cache: Progress | None = None,
    on_step: StepProgress | None = None,
) -> RunResult:
    """Pretrain an encoder; everything goes into the recipe's run folder (`out`).

    Args:
        recipe: YAML path, run folder, or loaded `PretrainRecipe`.
        overrides: `key=value` assignments.
        resume: Continue the run in `out` from its newest checkpoint; start it when there is none.
        on_note: Called on rank 0, before anything is written, with each thing that the owner should know of the data cards and of items
            that the objective leaves out.
        on_cache: Called with (volumes done, volumes in all) while the store is filled.
        on_step: Called on rank 0 with (steps done, steps in all, metrics) at every logged step.

    Raises:
        RequestError: The recipe or the data do not allow the run; nothing was written to `out`.
        TrainingStopped: A monitor stopped the run.
        StoreError: The disk is full; the last checkpoint is safe.
        CheckpointError: `--resume` met a checkpoint of another run or one cut short.
    """
    recipe = load_recipe(recipe, overrides, kind="pretrain")
    settings = build.loop_settings(recipe)
    settings.micro_steps(distributed.environment()[1])
    run = RunFolder(recipe.out)
    if run.exists():
        _check_resume(run, recipe, resume)
    cards = build.assign_cards(recipe)
    world = distributed.start()
    card_facts, notes = _data_cards(recipe, cards, run) if world.is_main else (build.data_card_facts(recipe, cards), [])
    for note in notes:
        (on_note or _silent)(note)
    shelves = _fill(recipe, world, on_cache)
    items = data_sources.freeze_items(shelves, recipe.sources, cards)
    fingerprint = items_hash(items)
    failed = {series: why for shelf in shelves for series, why in shelf.summary.failed.items()}
    probes = [build_probe(name, probe, recipe, shelves) for name, probe in recipe.probes.items()]
    # everything that may refuse the run stands before the first file of its folder
    objective, encoders = build.build_objective(recipe, len(items))
    for shelf in shelves:
        data_sources.check_items(shelf, recipe.sources[shelf.name], encoders)
    _check_batch(objective, recipe, settings.micro_steps(world.size)[1])
    left_out = _check_places(objective, recipe, shelves)
    for note in left_out if world.is_main else []:
        (on_note or _silent)(note)
    sources = {
        shelf.name: data_sources.training_source(shelf, recipe.sources[shelf.name], items, recipe.train.batch) for shelf in shelves
    }
    for source in sources.values():
        _check_specs(objective, source)
    monitor = build_monitor(recipe, shelves[0])
    if world.is_main and not run.exists():
        facts = _run_facts(recipe, items, shelves, failed, world.size)
        run.create(Recipe.dump(recipe), {**facts, "data_cards": card_facts, "data_card_notes": notes, "notes": left_out})
        write_items(items, run.items)
    distributed.barrier(world)
    objective.to(world.device)
    with _tensorboard(run, recipe, world) as board:
        status = train(
            objective,
            sources,
            stages=build.build_stages(recipe),
            settings=settings,
            run=run,
            world=world,
            encoders=encoders,
            callbacks=[*monitor, *probes],
            manifest={**manifest_facts(recipe, shelves), "data_cards": card_facts},
            items_hash=fingerprint,
            resume=resume,
            on_step=_both(board, on_step),
            embedder=build_embedder(sources, shelves, recipe),
        )
    if world.is_main and status == "finished":
        run.update(finished=now())
        if (
            distributed.choose_strategy(recipe.train.strategy, world) != "fsdp"
        ):  # a sharded objective has no whole forward on one rank
            write_reconstructions(objective, next(iter(sources.values())), run, world.device)
            write_clips(objective, next(iter(sources.values())), run, world.device)
    return RunResult(run.path, status, len(items), failed)


def _check_resume(run: RunFolder, recipe: PretrainRecipe, resume: bool) -> None:
    if not resume:
        raise RequestError(f"{run.path} already holds a run; continue it with --resume, or give another folder with out=PATH")
    before = Recipe.load(run.path / "recipe.yaml")
    if Recipe.hash(before) != Recipe.hash(recipe):
        raise RequestError(
            f"the recipe differs from the one in {run.path}/recipe.yaml, and a resumed run must be the same run; "
            f"use `medssl pretrain {run.path} --resume`, or start a new run with out=PATH"
        )


def _silent(_note: str) -> None:
    pass


def _data_cards(recipe: PretrainRecipe, cards: Mapping[str, SourceCards], run: RunFolder) -> tuple[list[dict[str, Any]], list[str]]:
    """Return what run.json and the weights say of the data cards, and the notes on them.

    A resumed run keeps the cards that it began with: what it says must not depend on where it was interrupted.
    """
    facts = build.data_card_facts(recipe, cards)
    notes = build.data_card_notes(recipe, cards) + [note for card in facts for note in card["notes"]]
    if not run.exists():
        return facts, notes
    before: list[dict[str, Any]] = run.read().get("data_cards", facts)
    hashes = {card["name"]: card["card_hash"] for card in before}
    changed = [card["name"] for card in facts if hashes.get(card["name"]) != card["card_hash"]]
    notes += [f"card {name} was changed since the run began; run.json and weights keep what it was then" for name in changed]
    return before, notes


def _fill(recipe: PretrainRecipe, world: distributed.World, on_cache: Progress | None) -> list[data_sources.Shelf]:
    """Fill the stores on rank 0 first; the others then find everything present."""
    progress = on_cache if world.is_main else None
    if not world.is_main:
        distributed.barrier(world)
    shelves = [data_sources.fill_shelf(name, section, on_progress=progress) for name, section in recipe.sources.items()]
    if world.is_main:
        distributed.barrier(world)
    return shelves


def _check_batch(objective: Any, recipe: PretrainRecipe, micro: int) -> None:
    least = getattr(objective, "smallest_batch", 1)
    if micro < least:
        raise RequestError(
            f"objective {recipe.objective.name} compares the items of a forward pass with each other and needs {least} or more on each "
            f"process; here it gets {micro}: raise train.batch or train.micro_batch, or start fewer processes"
        )


def _check_places(objective: Any, recipe: PretrainRecipe, shelves: Sequence[data_sources.Shelf]) -> list[str]:
    """Ask an objective that goes by the place of slices in volumes what it makes of items that are single pictures."""
    if not hasattr(objective, "check_places"):
        return []
    found = {shelf.name: data_sources.without_place(shelf, recipe.sources[shelf.name]) for shelf in shelves}
    notes: list[str] = objective.check_places(found)
    return notes


def _check_specs(objective: Any, source: ImageLike) -> None:
    for name, spec in data_sources.specs(source.view_maker).items():
        wanted = objective.view_specs.get(name)
        if wanted is None or tuple(wanted.size) != tuple(spec.size):
            raise RequestError(
                f"source {source.name} makes views {name} of {spec.size}, the objective wants "
                f"{ {name: s.size for name, s in objective.view_specs.items()} }; give all sources of a kind the same views"
            )


def _run_facts(
    recipe: PretrainRecipe, items: Sequence[Item], shelves: Sequence[data_sources.Shelf], failed: Mapping[str, Any], world_size: int
) -> dict[str, Any]:
    reasons: dict[str, int] = {}
    for reason, _ in failed.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    return {
        **facts_of_machine(),
        "kind": "pretrain",
        "recipe_hash": Recipe.hash(recipe),
        "seed": recipe.train.seed,
        "world_size": world_size,
        "items": {"used": len(items), "patients": len({item.patient_id for item in items}), "failed": reasons},
        "items_hash": items_hash(items),
        "id_keys": sorted({shelf.archive.key_fingerprint for shelf in shelves}),
    }


def manifest_facts(recipe: PretrainRecipe, shelves: Sequence[data_sources.Shelf]) -> dict[str, Any]:
    """Return what every weights manifest says about the run, besides the encoder itself and the data cards."""
    section = next(iter(recipe.sources.values()))
    views = data_sources.make_views(section.views)
    given = getattr(views, "spacing_mm", None)
    records = [shelf.reader.record(row.series_id) for shelf in shelves for row in shelf.rows]
    spacings = [record.spacing_mm for record in records if record.kind == "volume"]
    median = [float(v) for v in np.median(np.asarray(spacings), axis=0)] if spacings else None
    facts = facts_of_machine()
    return {
        "spacing_mm": list(given) if given else median,
        "spacing_source": "views" if given else "median of the items",
        "image_size": list(views.size),
        "intensity": {"normalize": section.views.get("normalize", "zscore")},
        "views": {name: dict(source.views) for name, source in recipe.sources.items()},
        "domains": sorted({shelf.domain.name for shelf in shelves}),
        "licence": recipe.export.licence,
        "objective": recipe.objective.name,
        "recipe_hash": Recipe.hash(recipe),
        "versions": facts["versions"],
        "git": facts["git"],
        "run": {"seed": recipe.train.seed, "steps": sum(stage.steps for stage in recipe.resolved_stages())},
    }


def embedding_part(parts: Mapping[str, nn.Module]) -> nn.Module | None:
    """Return the part that monitors and probes embed with: the encoder, or all of a slice-volume encoder."""
    return parts.get("encoder", parts.get("joint"))


def build_monitor(recipe: PretrainRecipe, shelf: data_sources.Shelf) -> list[Callback]:
    """Return the collapse monitor: features of the middle of the first items, seen twice (plain and augmented)."""
    count = min(recipe.train.monitor_items, len(shelf.rows))
    if count < 2:
        return []
    section = recipe.sources[shelf.name]
    series = [row.series_id for row in shelf.rows[:count]]
    plain = data_sources.evaluation_source("monitor", shelf, section, series)
    augmented_views = data_sources.make_views({key: value for key, value in section.views.items() if key not in ("mask", "local")})
    augmented = data_sources.evaluation_source("monitor", shelf, section, series, augmented_views)
    collapse = CollapseMonitor()

    def look(step: int, parts: Mapping[str, nn.Module]) -> Mapping[str, float]:
        encoder = embedding_part(parts)
        if encoder is None:
            return {}
        device = next(encoder.parameters()).device
        first, _ = embed(encoder, data_sources.images_and_ids(plain, device))
        second, _ = embed(encoder, data_sources.images_and_ids(augmented, device))
        metrics = feature_monitors(torch.from_numpy(first), torch.from_numpy(second))
        collapse.check(metrics, step)
        return metrics

    return [Callback(recipe.train.monitor_every, look)]


def build_probe(name: str, probe: ProbeSection, recipe: PretrainRecipe, shelves: Sequence[data_sources.Shelf]) -> Callback:
    """Return a live probe on `val` patients that no source trains on; their labels reach neither loss nor schedule.

    The first probe of a recipe chooses `weights/best` by its linear score (R2 or balanced accuracy).

    Raises:
        LeakageError: A probe patient is in the pretraining data.
        RequestError: There are too few labelled items.
    """
    source_name, section = next(iter(recipe.sources.items()))
    shelf = data_sources.fill_shelf(f"probe {name}", section, where=probe.where)
    for trained in shelves:
        build.refuse_leakage(trained.rows, shelf.rows, f"probe {name}")
    targets, series, groups = labelled_rows(shelf, probe.table, probe.file_column, probe.target, probe.task, probe.max_items)
    source = data_sources.evaluation_source(source_name, shelf, section, series)

    def look(_step: int, parts: Mapping[str, nn.Module]) -> Mapping[str, float]:
        encoder = embedding_part(parts)
        assert encoder is not None
        features, _ = embed(encoder, data_sources.images_and_ids(source, next(encoder.parameters()).device))
        rows = linear_probe(features, targets, groups, task=probe.task, draws=1) + knn_probe(
            features, targets, groups, task=probe.task, k=probe.k, draws=1
        )
        return {f"probe/{name}/{row['probe']}_{row['metric']}": row["value"] for row in rows if row["value"] is not None}

    best_by = f"probe/{name}/linear_{next(iter(METRICS[probe.task]))}" if name == next(iter(recipe.probes)) else None
    return Callback(probe.every, look, best_by=best_by, labels=len(series))


def labelled_rows(
    shelf: data_sources.Shelf, table: str, file_column: str, target: str, task: str, limit: int | None = None
) -> tuple[np.ndarray, list[str], list[str] | None]:
    """Return (targets, series ids, patients) of the labelled rows of a shelf; patients is None when they are unknown."""
    found = data_sources.read_targets(table, file_column, target, shelf)
    rows = [row for row in shelf.rows if row.series_id in found][:limit]
    texts = [found[row.series_id] for row in rows]
    if task == "regression":
        try:
            targets = np.asarray([float(text) for text in texts])
        except ValueError as err:
            raise RequestError(f"column {target} holds text, and regression needs numbers; set task: classification") from err
    else:
        targets = np.asarray(texts)
    patients = [row.patient_id for row in rows]
    known = not any("patient_unknown" in row.quality_flags for row in rows)
    return targets, [row.series_id for row in rows], patients if known else None


def build_embedder(sources: Mapping[str, ImageLike], shelves: Sequence[data_sources.Shelf], recipe: PretrainRecipe) -> Any:
    """Return ({part: module}, source name) -> (ids, features), for objectives that look at all items once an epoch."""
    by_name = {shelf.name: shelf for shelf in shelves}

    def embedder(parts: Mapping[str, nn.Module], name: str) -> tuple[torch.Tensor, torch.Tensor]:
        ids = sorted(sources[name].series)
        series = [sources[name].series[item] for item in ids]
        source = data_sources.evaluation_source(name, by_name[name], recipe.sources[name], series)
        encoder = embedding_part(parts)
        assert encoder is not None
        features, _ = embed(encoder, data_sources.images_and_ids(source, next(encoder.parameters()).device))
        return torch.tensor(ids), torch.from_numpy(features)

    return embedder


class _Board:
    """TensorBoard file that is closed whatever happens; a no-op on other ranks."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.events: EventFile | None = None

    def __enter__(self) -> _Board:
        if self.folder is not None:
            self.events = EventFile(self.folder)
        return self

    def __exit__(self, *_: object) -> None:
        if self.events is not None:
            self.events.close()

    def __call__(self, done: int, _total: int, metrics: Mapping[str, float]) -> None:
        if self.events is not None:
            self.events.scalars(done, metrics)


def _tensorboard(run: RunFolder, recipe: PretrainRecipe, world: distributed.World) -> _Board:
    return _Board(run.path / "tensorboard" if recipe.train.tensorboard and world.is_main else None)


def _both(board: _Board, on_step: StepProgress | None) -> StepProgress:
    def call(done: int, total: int, metrics: Mapping[str, float]) -> None:
        board(done, total, metrics)
        if on_step:
            on_step(done, total, metrics)

    return call


def write_reconstructions(objective: Any, source: ImageLike, run: RunFolder, device: torch.device, count: int = 3) -> None:
    """Leave a few reconstructions in figures/reconstruction.npz for the report, when the objective can make them."""
    if not hasattr(objective, "reconstruct"):
        return

    views = views_of_no_step(source, run, device, count)
    objective.eval()
    pictures = {name: value.float().cpu().numpy() for name, value in objective.reconstruct(views).items()}
    arrays = {name: pictures[name][:, 0].astype(np.float32) for name in ("input", "masked", "output")}
    arrays["mask"] = pictures["mask"] > 0
    arrays["spacing_mm"] = views.meta.spacing_mm[source.view_maker.name][:, 0].numpy()
    save_npz(run.figures / "reconstruction.npz", arrays)


def write_clips(objective: Any, source: ImageLike, run: RunFolder, device: torch.device, count: int = 3) -> None:
    """Leave a few clips with their prototypes in figures/clips.npz for the report, when the objective assigns any."""
    if not hasattr(objective, "assignments") or objective.prototypes is None:
        return
    views = views_of_no_step(source, run, device, count)
    objective.eval()
    found = {name: value.cpu().numpy() for name, value in objective.assignments(views).items()}
    name = source.view_maker.name
    frames = found["input"].astype(np.float32).mean(axis=1)
    tubelet = frames.shape[1] // found["mask"].shape[1]
    arrays = {
        "frames": frames,
        "sector": views[f"{name}_sector"][:, :, 0].flatten(0, 1).cpu().numpy(),
        "time_s": views[f"{name}_time_s"].flatten(0, 1).cpu().numpy(),
        "hidden": found["mask"][:, 0],  # tubes: alike at all times
        **{f"{branch}_prototypes": found[branch].repeat(tubelet, axis=1) for branch in ("video", "frame")},
    }
    save_npz(run.figures / "clips.npz", arrays)


def views_of_no_step(source: ImageLike, run: RunFolder, device: torch.device, count: int) -> Views:
    """Return training views of a step that no run reaches, for pictures."""
    keys = [DrawKey(source_seed(run), 10**9, place) for place in range(count)]
    return source.views(source.fetch(keys), device)


def source_seed(run: RunFolder) -> int:
    """Return the seed in run.json."""
    return int(run.read().get("seed", 0))


def save_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays to a compressed .npz atomically."""
    import io

    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_atomic(path, buffer.getvalue())


def evaluate(recipe: Any, weights: Path | str, overrides: Sequence[str] = (), on_cache: Progress | None = None) -> dict[str, Any]:
    """Probe frozen features of weights on a labelled table, beside the controls.

    Args:
        recipe: YAML path or loaded recipe; its task may be one of `clip_tasks`.
        weights: Run folder or safetensors file.
        overrides: `key=value` assignments.
        on_cache: Progress of filling the store.

    Returns:
        What `evaluate.json` in `out` holds: `rows` {name, probe, metric, value, low, high, n_images, n_patients, by}, and the facts.
    """
    recipe = load_recipe(recipe, overrides, kind="evaluate")
    if not isinstance(recipe, EvaluateRecipe):
        from medssl.clip_tasks import evaluate_clips

        return evaluate_clips(recipe, weights, on_cache)
    started = time.perf_counter()
    encoder = build.load_encoder(weights)
    _, manifest = load_part(weights)
    section = evaluation_section(recipe, manifest)
    shelf = data_sources.fill_shelf("source", section, on_progress=on_cache)
    leakage = refuse_pretraining_patients(weights, shelf)
    targets, series, groups = labelled_rows(shelf, recipe.table, recipe.file_column, recipe.target, recipe.task)
    source = data_sources.evaluation_source("source", shelf, section, series)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def batches() -> Any:
        return data_sources.images_and_ids(source, device, recipe.batch)

    features, _ = embed(encoder.to(device), batches())
    controls = control_features(lambda: build.build_encoder(manifest["encoder"]), batches, seed=recipe.seed, device=device)
    rows = probe_table(features, controls, targets, groups, task=recipe.task, k=recipe.k[0], seed=recipe.seed)
    for k in recipe.k[1:]:
        for name, values in {"encoder": features, **controls}.items():
            rows += knn_probe(values, targets, groups, task=recipe.task, name=name, k=k, seed=recipe.seed)
    seconds = time.perf_counter() - started
    result = write_evaluation(recipe, manifest, leakage, shelf, {"target": recipe.target, "rows": rows, "seconds": seconds})
    if recipe.task == "regression":
        predicted = linear_predict(features, targets, groups, task="regression", seed=recipe.seed)
        private_folder(Path(recipe.out) / "figures")
        save_npz(Path(recipe.out) / "figures" / "regression.npz", {"target": targets, "predicted": predicted})
    return result


def write_evaluation(
    recipe: Any, manifest: Mapping[str, Any], leakage: str, shelf: data_sources.Shelf, found: Mapping[str, Any]
) -> dict[str, Any]:
    """Write `evaluate.json` into the `out` of a recipe and return it: what was found, and the facts of weights and data."""
    result = {
        "kind": "evaluate",
        "task": recipe.task,
        "seed": recipe.seed,
        "weights_hash": manifest["weights_hash"],
        "leakage_check": leakage,
        "data_cards": {"weights": manifest.get("data_cards", []), "evaluation": evaluation_cards(recipe, shelf)},
        **found,
        **facts_of_machine(),
    }
    private_folder(Path(recipe.out))
    write_atomic(Path(recipe.out) / "evaluate.json", json.dumps(result, indent=1).encode())
    return result


def evaluation_cards(recipe: EvaluateBase, shelf: data_sources.Shelf) -> list[dict[str, str]]:
    """Return the facts of the cards that evaluated series are of."""
    cards = assign(shelf.archive, recipe.source.cards, shelf.name)
    seen = {cards.of_series.get(row.series_id) for row in shelf.rows}
    return [card_facts(card) for name, card in sorted(cards.cards.items()) if name in seen]


def evaluation_section(
    recipe: EvaluateBase | FinetuneTargetsRecipe | FinetuneBoxesRecipe | SuiteRecipe, manifest: Mapping[str, Any]
) -> SourceSection:
    """Return the recipe's source with the views of the weights where the recipe names none.

    These are size, spacing and normalisation; for an encoder of clips also the kind, the frames and their rate.

    Raises:
        RequestError: Clips are asked for, and the encoder takes none; or neither recipe nor weights say size and normalisation.
    """
    assert recipe.source is not None
    given = recipe.source.views
    encoder = manifest["encoder"]
    clips = getattr(lookup("encoder", encoder["name"]), "takes_clips", False)
    if given.get("kind") == "clip" and not clips:
        raise RequestError(
            f"source.views.kind: clip, and the weights are of encoder {encoder['name']}, which takes no clips; choose kind: image or stack "
            "where it takes those, or weights of video_vit"
        )
    known = {"size": manifest.get("image_size"), "normalize": dict(manifest.get("intensity") or {}).get("normalize")}
    lacking = [f"source.views.{key}" for key, value in known.items() if value is None and key not in given]
    if lacking:
        raise RequestError(
            f"the weights do not say how their images were prepared (imported weights may not); give {' and '.join(lacking)} in the recipe"
        )
    views = {**known, **given}
    if clips and given.get("kind", "clip") == "clip":
        views = {"kind": "clip", "channels": "mean" if encoder["args"]["in_channels"] == 1 else "keep", **views}
        if shown := manifest.get("clip"):
            views = data_sources.with_timing(views, shown["frames"], shown["fps"])
    elif manifest.get("spacing_source") == "views":
        views.setdefault("spacing_mm", manifest["spacing_mm"])
    return recipe.source.model_copy(update={"views": views})


def refuse_pretraining_patients(weights: Path | str, shelf: data_sources.Shelf) -> str:
    """Refuse an evaluation on patients that the weights have seen, as far as the run folder is at hand.

    Returns:
        What was checked, for the result.

    Raises:
        LeakageError: A patient is on both sides.
    """
    from medssl.sampling.items import read as read_items

    run = run_of(weights)
    table = run / "items.parquet"
    if not table.is_file():
        return "not checked: the weights lie outside their run folder, so their patients are not known"
    keys = set(RunFolder(run).read().get("id_keys", []))
    if keys != {shelf.archive.key_fingerprint}:
        return "not checked: pretraining and evaluation indexes were made with different id keys, so patients cannot be compared"
    seen = {item.patient_id for item in read_items(table)}
    both = seen & {row.patient_id for row in shelf.rows}
    if both:
        from medssl.errors import LeakageError

        raise LeakageError(
            f"{len(both)} of {len(shelf.rows)} selected series belong to patients that the weights were pretrained on; "
            "select others (for instance source.where=\"split = 'val'\"): numbers on seen patients flatter the weights"
        )
    return "no patient of this evaluation was pretrained on"


def run_of(weights: Path | str) -> Path:
    """Return the run folder that weights lie in (which may not exist, for an exported file)."""
    file = find_part(weights)
    return file.parent.parent.parent


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
        on_cell: Called with (cells done, cells in all, cell, result).
        on_step: Progress within a cell.
    """
    from medssl.evaluation import label_curve as curve
    from medssl.evaluation.cohort import Cohort
    from medssl.evaluation.finetune import open_weights

    recipe = load_recipe(recipe, overrides, kind="finetune")
    if isinstance(recipe, FinetuneBagsRecipe):
        from medssl.bag_tasks import bag_curve, refuse_weights

        refuse_weights(weights)
        return bag_curve(recipe, counts=counts, seeds=seeds, on_cell=on_cell, on_step=on_step)
    if recipe.task in TARGET_TASKS:
        from medssl.target_tasks import target_curve

        return target_curve(recipe, weights, counts=counts, seeds=seeds, twin=twin, on_cell=on_cell, on_step=on_step)
    if recipe.task == "detection":
        from medssl.box_tasks import box_curve

        return box_curve(recipe, weights, counts=counts, seeds=seeds, twin=twin, on_cell=on_cell, on_step=on_step)
    settings = build.finetune_settings(recipe)
    cohort = Cohort.load(recipe.cohort.path)
    if recipe.cohort.card is not None:
        cohort = replace(cohort, card=card_facts(load_card(find_card(recipe.cohort.card))))
    arms: dict[str, Any] = {}
    if weights is not None and str(weights) != "scratch":
        refuse_pretraining_images(weights, cohort)
        arms["pretrained"] = open_weights(weights, transfer=settings.transfer)
    if twin or not arms:
        arms["scratch"] = None
    private_folder(Path(recipe.out))
    if counts is None:
        counts = [recipe.labels or len(cohort.split("train"))]
    return curve.label_curve(
        cohort, settings, Path(recipe.out), arms=arms, counts=counts, seeds=seeds, on_cell=on_cell, on_step=on_step
    )


def refuse_pretraining_images(weights: Path | str, cohort: Any) -> None:
    """Refuse a test set whose image files the weights were pretrained on, as far as run folder and archive are at hand.

    Files are compared by content, so that renamed copies are found.

    Raises:
        LeakageError: A test image was pretrained on.
    """
    run = run_of(weights)
    if not (run / "recipe.yaml").is_file():
        return
    from medssl.archive.table import Archive
    from medssl.errors import LeakageError
    from medssl.sampling.items import read as read_items

    recipe = Recipe.load(run / "recipe.yaml")
    seen: set[str] = set()
    items = read_items(run / "items.parquet")
    for name, section in recipe.sources.items():
        if not Path(section.index).is_dir():
            continue
        archive = Archive.open(Path(section.index))
        for item in items:
            if item.source == name:
                seen.update(archive.digests(item.series_id))
    test = [case for case in cohort.cases if case.split == "test"]
    both = [case for case in test if seen & set(file_digests(case.image))]
    if both:
        raise LeakageError(
            f"{len(both)} of {len(test)} test images were used for pretraining (same file content); pretrain on an index whose "
            "split leaves them out (`medssl index --splits`), or choose other test cases"
        )


def file_digests(image: Path) -> list[str]:
    """Return the content digests of an image file, or of all files of a DICOM folder, as the archive computes them."""
    from medssl.archive.scanning.scan import file_digest

    files = sorted(path for path in image.iterdir() if path.is_file()) if image.is_dir() else [image]
    return [file_digest(path) for path in files]


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


__all__ = [
    "RunResult",
    "cache",
    "evaluate",
    "finetune",
    "label_curve",
    "list_runs",
    "load_recipe",
    "pretrain",
]
