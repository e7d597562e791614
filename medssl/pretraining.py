"""Pretraining from a recipe: stores, sources, objective, monitors and probes around the loop of `training`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from medssl import build, data_sources, label_tables
from medssl.cards.named import SourceCards
from medssl.data_sources import ImageLike
from medssl.errors import RequestError
from medssl.evaluation.features import embed
from medssl.evaluation.knn import knn_probe
from medssl.evaluation.linear_probe import linear_probe
from medssl.evaluation.scores import METRICS
from medssl.probe_tasks import labelled_rows, save_npz
from medssl.recipe import (
    PretrainRecipe,
    ProbeSection,
    Recipe,
)
from medssl.recipe_checks import load_recipe
from medssl.sampling.items import Item, items_hash
from medssl.sampling.items import write as write_items
from medssl.training import distributed
from medssl.training.event_file import EventFile
from medssl.training.loop import Callback, train
from medssl.training.monitors import CollapseMonitor, feature_monitors
from medssl.training.run_folder import RunFolder, facts_of_machine, now
from medssl.types import DrawKey, Views

Progress = Callable[[int, int], None]
Note = Callable[[str], None]
StepProgress = Callable[[int, int, Mapping[str, float]], None]


@dataclass(frozen=True)
class RunResult:
    """Outcome of `pretrain`.

    Args:
        path: The run folder.
        status: `finished` or `interrupted`.
        items: Items trained on: volumes, pictures or clips.
        failed: series_id -> (reason, message) of items that could not be used.
    """

    path: Path
    status: str
    items: int
    failed: Mapping[str, tuple[str, str]]


def cache(recipe: Any, overrides: Sequence[str] = (), on_progress: Progress | None = None) -> dict[str, Any]:
    """Write the stores that a recipe needs; what is there already is left alone.

    Returns:
        Per source: written, present, failed {series_id: (reason, message)}, store.
    """
    recipe = load_recipe(recipe, overrides)
    single = getattr(recipe, "source", None)
    sources = {"source": single} if single is not None else getattr(recipe, "sources", {})
    if not sources:
        raise RequestError("this recipe needs no store: cohorts and bags are read directly")
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
    joined_before = distributed.joined()
    try:
        return _pretrain(recipe, resume, on_note, on_cache, on_step)
    finally:
        if not joined_before:
            distributed.stop()  # here, where no frame of a run that went well holds the model any more


def _pretrain(
    recipe: PretrainRecipe, resume: bool, on_note: Note | None, on_cache: Progress | None, on_step: StepProgress | None
) -> RunResult:
    settings = build.loop_settings(recipe)
    settings.micro_steps(distributed.environment()[1])
    run = RunFolder(recipe.out)
    _check_out(run.path)
    if run.exists():
        _check_resume(run, recipe, resume)
    cards = build.assign_cards(recipe)
    for probe in recipe.probes.values():
        label_tables.check_table(probe.table, probe.file_column, probe.target)
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
    with run.held() if world.is_main else nullcontext(), _tensorboard(run, recipe, world) as board:
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


def _check_out(out: Path) -> None:
    """Refuse a run folder that cannot be written, before the store is filled for hours."""
    # os.path.exists is False below a closed folder, where Path.exists raises
    nearest = next(folder for folder in (out, *out.parents) if os.path.exists(folder))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise RequestError(
            f"out: {out} cannot be written, because {nearest} is no folder that you may write to; give another with out=PATH"
        )


def _check_resume(run: RunFolder, recipe: PretrainRecipe, resume: bool) -> None:
    if not resume:
        raise RequestError(f"{run.path} already holds a run; continue it with --resume, or give another folder with out=PATH")
    before = Recipe.load(run.path / "recipe.yaml")
    if Recipe.hash(before) != Recipe.hash(recipe):
        raise RequestError(
            f"the recipe differs from the one in {run.path}/recipe.yaml ({', '.join(Recipe.differences(before, recipe))}), and a resumed run "
            f"must be the same run; use `medssl pretrain {run.path} --resume`, or start a new run with out=PATH"
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
