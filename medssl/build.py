"""From a validated recipe to objects: the only place that knows both sides. Parts never see a recipe."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medssl.archive.table import Archive, SeriesRow
from medssl.cards.named import SourceCards, assign, card_facts, card_notes, index_notes, name_faults, open_references, source_notes
from medssl.cards.schema import Card
from medssl.errors import LeakageError, RecipeError, RegistryError, RequestError, header_words, near
from medssl.recipe import Component, EvaluateRecipe, FinetuneRecipe, OptimSection, PretrainRecipe, SourceSection
from medssl.registry import ENCODERS, lookup
from medssl.sampling.items import Item, freeze
from medssl.sampling.samplers import SAMPLERS, CentreSampler
from medssl.sampling.source import ImageSource
from medssl.seeding import derive_seed
from medssl.store.manifest import store_key
from medssl.store.reader import StoreReader
from medssl.store.writer import CacheSummary, cache_items
from medssl.training.loop import LoopSettings, Stage
from medssl.training.optim import OptimSettings
from medssl.types import DrawKey, Views
from medssl.views.pipeline import Crop, VolumeViews
from medssl.weights import load_part

Progress = Callable[[int, int], None]
_GIVEN = ("encoder", "image_size", "spacing_mm", "view")  # what the builder itself gives to an objective


def argument_faults(path: str, target: Any, args: Mapping[str, Any], given: Iterable[str] = ()) -> list[str]:
    """Compare the arguments of a component with the signature of its constructor.

    Args:
        path: Dotted path of the component in the recipe.
        target: Class or function.
        args: What the recipe gives.
        given: What the builder gives.
    """
    parameters = inspect.signature(target).parameters
    accepted = [name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD and name not in ("self", *given)]
    faults = [f"{path}.{name}: unknown key{near(name, accepted)}" for name in args if name not in accepted]
    needed = [name for name in accepted if parameters[name].default is inspect.Parameter.empty]
    return faults + [f"{path}.{name}: required and missing" for name in needed if name not in args]


def component_faults(path: str, kind: str, component: Component, given: Iterable[str] = ()) -> list[str]:
    """Check the name and the arguments of a registered component."""
    try:
        target = lookup(kind, component.name)
    except RegistryError as err:
        return [f"{path}.name: {err}"]
    return argument_faults(path, target, component.args, given)


def view_faults(path: str, views: Mapping[str, Any]) -> list[str]:
    """Check the arguments of the views, their values included."""
    views = {"size": 16, **views} if path == "source.views" else views  # evaluation takes the size from the weights
    faults = argument_faults(path, VolumeViews, views, given=("name", "count"))
    if faults:
        return faults
    try:
        VolumeViews(**views)
    except (RequestError, TypeError, ValueError) as err:
        return [f"{path}.{err}"]
    return []


def source_faults(path: str, source: SourceSection) -> list[str]:
    """Check one source."""
    faults = component_faults(f"{path}.domain", "domain", source.domain)
    if source.sampler.name not in SAMPLERS:
        faults.append(f'{path}.sampler.name: unknown sampler "{source.sampler.name}"{near(source.sampler.name, SAMPLERS)}')
    else:
        given = ("source", "ids", "record", "box_size_mm", "batch")
        faults += argument_faults(f"{path}.sampler", SAMPLERS[source.sampler.name], source.sampler.args, given)
    return faults + view_faults(f"{path}.views", source.views)


def card_faults(named: Mapping[str, Iterable[str]]) -> list[str]:
    """Check that cards exist, are valid, and are told apart by their names.

    Args:
        named: Dotted path in the recipe -> names or files of the cards there.
    """
    cards: list[Card] = []
    faults: list[str] = []
    for path, references in named.items():
        found, wrong = open_references(path, references)
        cards += found
        faults += wrong
    return faults + name_faults(", ".join(named), cards)


def pretrain_faults(recipe: PretrainRecipe) -> list[str]:
    """Return every fault of a pretraining recipe that types alone cannot show."""
    faults = [fault for name, source in recipe.sources.items() for fault in source_faults(_source_path(recipe, name), source)]
    faults += card_faults({f"{_source_path(recipe, name)}.card": source.cards for name, source in recipe.sources.items()})
    for name, encoder in recipe.encoders.items():
        faults += component_faults(f"encoders.{name}" if len(recipe.encoders) > 1 else "encoder", "encoder", encoder)
    arguments = {key: value for key, value in recipe.objective.args.items() if key != "encoder"}  # which encoder: by name
    faults += component_faults("objective", "objective", Component(name=recipe.objective.name, **arguments), _GIVEN)
    return faults or fit_faults(recipe) or crop_faults(recipe)


def fit_faults(recipe: PretrainRecipe) -> list[str]:
    """Check that the objective's encoder exists and can do what the objective needs."""
    chosen = recipe.objective.args.get("encoder", next(iter(recipe.encoders)))
    if chosen not in recipe.encoders:
        return [f'objective.encoder: no encoder named "{chosen}"{near(str(chosen), recipe.encoders)}']
    name = recipe.encoders[chosen].name
    needs = getattr(lookup("objective", recipe.objective.name), "needs", ())
    encoder = lookup("encoder", name)
    if all(getattr(encoder, need, False) for need in needs):
        return []
    fitting = sorted(other for other in ENCODERS if all(getattr(lookup("encoder", other), need, False) for need in needs))
    return [
        f"objective.name: {recipe.objective.name} cannot work on encoder {name} (it needs {', '.join(needs)}); "
        f"encoders that fit: {', '.join(fitting)}"
    ]


def crop_faults(recipe: PretrainRecipe) -> list[str]:
    """Check that the patch of each encoder divides every crop, and that mask cells divide it too."""
    faults = []
    for source_name, source in recipe.sources.items():
        views = VolumeViews(**source.views)
        path = "views" if len(recipe.sources) == 1 else f"sources.{source_name}.views"
        for name, encoder in recipe.encoders.items():
            patch = lookup("encoder", encoder.name).divisor(encoder.args)
            place = "encoder" if len(recipe.encoders) == 1 else f"encoders.{name}"
            if any(n % p for n, p in zip(views.size, patch)):
                faults.append(
                    f"{place}: patch {patch} does not divide {path}.size {views.size}; choose sizes that are multiples of it"
                )
            if recipe.objective.name == "mae" and views.mask_grid != tuple(n // p for n, p in zip(views.size, patch)):
                faults.append(f"{path}.mask.cell: objective mae drops tokens, so a mask cell must be one patch: cell={list(patch)}")
        if recipe.objective.name.startswith("mae") and views.mask_grid is None:
            faults.append(
                f"{path}.mask: required by objective {recipe.objective.name}; for instance mask: {{ratio: 0.75, cell: 16}}"
            )
    return faults


def _source_path(recipe: PretrainRecipe, name: str) -> str:
    return "data" if list(recipe.sources) == ["main"] else f"sources.{name}"


def check(recipe: PretrainRecipe | FinetuneRecipe | EvaluateRecipe) -> None:
    """Raise RecipeError with every fault of a recipe; nothing has been read or written yet."""
    if isinstance(recipe, PretrainRecipe):
        faults = pretrain_faults(recipe)
    elif isinstance(recipe, EvaluateRecipe):
        faults = source_faults("source", recipe.source) + card_faults({"source.card": recipe.source.cards})
    else:
        faults = finetune_faults(recipe)
    if faults:
        raise RecipeError(faults)


def finetune_faults(recipe: FinetuneRecipe) -> list[str]:
    """Check the settings of a fine-tuning recipe."""
    faults = card_faults({"cohort.card": [recipe.cohort.card]}) if recipe.cohort.card else []
    try:
        finetune_settings(recipe)
    except RequestError as err:
        faults.append(f"settings: {err}")
    return faults + component_faults("cohort.domain", "domain", recipe.cohort.domain)


def finetune_settings(recipe: FinetuneRecipe) -> Any:
    """Return the `FinetuneSettings` of a recipe."""
    from medssl.evaluation.finetune import FinetuneSettings

    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = {"network": recipe.network, "domain": recipe.cohort.domain.name, "device": device, **recipe.settings}
    if recipe.encoder:
        arguments = {key: value for key, value in recipe.encoder.items() if key != "name"}
        values["encoder"] = {"name": recipe.encoder["name"], "args": arguments}
    return FinetuneSettings.from_dict(values)


def build_domain(component: Component) -> Any:
    """Build a domain."""
    return lookup("domain", component.name)(**component.args)


def build_encoder(component: Component | Mapping[str, Any]) -> Any:
    """Build an encoder from a recipe's component or a manifest's `{"name", "args"}`."""
    if isinstance(component, Component):
        return lookup("encoder", component.name)(**component.args)
    return lookup("encoder", component["name"])(**component["args"])


def load_encoder(path: Path | str, **changes: Any) -> Any:
    """Build the encoder that weights were saved from, and load them.

    Args:
        path: A `.safetensors` file or a run folder.
        changes: Encoder arguments to change; `image_size` is the one that makes sense (a position table is resized).

    Returns:
        The encoder in eval mode.

    Raises:
        WeightsError: There are no such weights, or they do not fit.
    """
    from medssl.encoders.loading import load_into

    state, manifest = load_part(path)
    args = {**manifest["encoder"]["args"], **changes}
    encoder = build_encoder({"name": manifest["encoder"]["name"], "args": args})
    load_into(encoder, state, manifest)
    return encoder.eval()


def build_objective(recipe: PretrainRecipe) -> tuple[Any, list[Any]]:
    """Build the encoders and the objective of a recipe, weights drawn from the recipe's seed alone.

    Returns:
        The objective and its encoders.
    """
    torch.manual_seed(derive_seed(recipe.train.seed, "init"))
    encoders = {name: build_encoder(component) for name, component in recipe.encoders.items()}
    views = VolumeViews(**next(iter(recipe.sources.values())).views)
    args = dict(recipe.objective.args)
    chosen = args.pop("encoder", next(iter(encoders)))
    objective = lookup("objective", recipe.objective.name)(
        encoders[chosen], image_size=views.size, spacing_mm=views.spacing_mm, view=views.name, **args
    )
    return objective, list(encoders.values())


def optim_settings(section: OptimSection) -> OptimSettings:
    """Flatten a recipe's optimiser section."""
    return OptimSettings(
        name=section.name,
        lr=section.lr,
        weight_decay=section.weight_decay,
        betas=section.betas,
        momentum=section.momentum,
        layer_decay=section.layer_decay,
        lr_scales=section.lr_scales,
        clip_grad=section.clip_grad,
        schedule=section.schedule.name,
        warmup_steps=section.schedule.warmup_steps,
        final_lr=section.schedule.final_lr,
        anneal_steps=section.schedule.anneal_steps,
    )


def build_stages(recipe: PretrainRecipe) -> list[Stage]:
    """Return the stages of a recipe for the loop."""
    return [
        Stage(
            name=stage.name,
            steps=stage.steps,
            optim=optim_settings(stage.optim or recipe.optim),
            train=tuple(stage.train),
            loss_weights=stage.loss_weights,
        )
        for stage in recipe.resolved_stages()
    ]


def loop_settings(recipe: PretrainRecipe) -> LoopSettings:
    """Return the loop's settings of a recipe."""
    train = recipe.train
    return LoopSettings(
        batch=train.batch,
        micro_batch=train.micro_batch,
        seed=train.seed,
        precision=train.precision,
        strategy=train.strategy,
        workers=train.workers,
        compile=train.compile,
        checkpoint_blocks=train.checkpoint_blocks,
        checkpoint_every=train.checkpoint_every,
        keep_checkpoints=train.keep_checkpoints,
        log_every=train.log_every,
    )


@dataclass
class Shelf:
    """The selected rows of one source, cached: what is ready to be drawn from.

    Args:
        name: Name of the source.
        archive: The opened archive.
        rows: Rows that are in the store, sorted by series_id.
        domain: The domain.
        reader: The store.
        summary: What caching did and what it could not use.
    """

    name: str
    archive: Archive
    rows: list[SeriesRow]
    domain: Any
    reader: StoreReader
    summary: CacheSummary


def store_folder(source: SourceSection, domain: Any) -> Path:
    """Return the folder of a source's store: same key, same bytes."""
    root = Path(source.store) if source.store else Path(source.index) / "store"
    return root / f"{domain.name}-{store_key(domain)}"


def select_rows(source: SourceSection, domain_name: str, archive: Archive, where: str | None = None) -> list[SeriesRow]:
    """Return the usable volumes of a source.

    Raises:
        RequestError: The selection is empty; the message counts what each condition left.
    """
    condition = where or source.where
    rows = archive.select(condition)
    usable = [r for r in rows if r.domain == domain_name and r.kind == "volume" and r.status != "rejected"]
    if not usable:
        unknown = sum(row.domain == "unknown" for row in rows)
        hint = f"{unknown} do not say what they are: index them again with --modality; " if unknown else ""
        raise RequestError(
            f"the selection is empty: {condition!r} matches {len(rows)} of {len(archive.select(None))} series in {source.index}, "
            f"none of them a usable {domain_name} volume; {hint}look with `medssl archive ls {source.index}`"
        )
    return sorted(usable, key=lambda row: row.series_id)


def fill_shelf(name: str, source: SourceSection, where: str | None = None, on_progress: Progress | None = None) -> Shelf:
    """Select the rows of a source and write what the store lacks.

    Raises:
        RequestError: No item is left; failures are counted by reason.
    """
    domain = build_domain(source.domain)
    archive = Archive.open(Path(source.index))
    rows = select_rows(source, domain.name, archive, where)
    folder = store_folder(source, domain)
    summary = cache_items(archive, rows, domain, folder, on_progress=on_progress)
    kept = [row for row in rows if row.series_id not in summary.failed]
    if not kept:
        reasons = sorted({reason for reason, _ in summary.failed.values()})
        raise RequestError(
            f"source {name}: none of {len(rows)} volumes could be cached ({', '.join(reasons)}); nothing to train on"
        )
    return Shelf(name, archive, kept, domain, StoreReader(folder), summary)


def assign_cards(recipe: PretrainRecipe) -> dict[str, SourceCards]:
    """Return the cards of every source; nothing has been written yet.

    Raises:
        RequestError: A condition is no SQL on the index, or a series meets the conditions of two cards.
    """
    return {name: assign(Archive.open(Path(section.index)), section.cards, name) for name, section in recipe.sources.items()}


def data_card_notes(recipe: PretrainRecipe, cards: Mapping[str, SourceCards]) -> list[str]:
    """Return what does not fit between the cards, the sources and the indexes of a recipe, one sentence each."""
    notes: list[str] = []
    for name, section in recipe.sources.items():
        archive = Archive.open(Path(section.index))
        rows = select_rows(section, section.domain.name, archive)
        notes += source_notes(name, f"{_source_path(recipe, name)}.card", cards[name], rows, section.domain.name)
        notes += index_notes(cards[name], archive)
    return notes


def data_card_facts(recipe: PretrainRecipe, cards: Mapping[str, SourceCards]) -> list[dict[str, Any]]:
    """Return what the weights say of every card of a recipe, in the order of their names."""
    named = {name: card for source in cards.values() for name, card in source.cards.items()}
    return [{**card_facts(named[name]), "notes": card_notes(named[name], recipe.export.licence)} for name in sorted(named)]


def freeze_items(shelves: Sequence[Shelf], sources: Mapping[str, SourceSection], cards: Mapping[str, SourceCards]) -> list[Item]:
    """Number the items of all sources; one without a card goes by the name of its index folder."""
    return freeze(
        [
            (
                shelf.name,
                cards[shelf.name].of_series.get(row.series_id, Path(sources[shelf.name].index).name),
                row.series_id,
                row.patient_id,
                row.split,
            )
            for shelf in shelves
            for row in shelf.rows
        ]
    )


def training_source(shelf: Shelf, section: SourceSection, items: Sequence[Item], batch: int) -> ImageSource:
    """Build the source that the loop draws from."""
    series = {item.id: item.series_id for item in items if item.source == shelf.name}
    views = VolumeViews(**section.views)
    sampler = SAMPLERS[section.sampler.name](
        shelf.name,
        sorted(series),
        lambda item: shelf.reader.record(series[item]),
        views.box_size_mm,
        batch=batch,
        **section.sampler.args,
    )
    return ImageSource(shelf.name, shelf.domain.name, shelf.reader, series, sampler, views, crop=Crop, weight=section.weight)


def plain_views(section: SourceSection) -> VolumeViews:
    """Return the evaluation views of a source: its size, spacing and normalisation, and nothing random."""
    keep = ("size", "spacing_mm", "normalize")
    return VolumeViews(**{key: value for key, value in section.views.items() if key in keep})


def evaluation_source(
    name: str, shelf: Shelf, section: SourceSection, series: Sequence[str], views: VolumeViews | None = None
) -> ImageSource:
    """Build a source that shows the middle of each series, in the order given."""
    numbered = dict(enumerate(series))
    views = views or plain_views(section)
    sampler = CentreSampler(name, sorted(numbered), lambda item: shelf.reader.record(numbered[item]), views.box_size_mm)
    return ImageSource(name, shelf.domain.name, shelf.reader, numbered, sampler, views, crop=Crop)


def evaluation_batches(source: ImageSource, device: torch.device, batch: int = 4, seed: int = 0) -> Iterable[Views]:
    """Yield views of all items of an evaluation source, in id order."""
    for first in range(0, len(source), batch):
        keys = [DrawKey(seed, 0, place) for place in range(first, min(first + batch, len(source)))]
        yield source.views(source.fetch(keys), device)


def images_and_ids(source: ImageSource, device: torch.device, batch: int = 4) -> Iterable[tuple[Tensor, list[int]]]:
    """Yield (B, C, *size) images and ids, as `evaluation.features.embed` takes them."""
    for views in evaluation_batches(source, device, batch):
        yield views[source.view_maker.name][:, 0], views.meta.ids.tolist()


def read_targets(table: str, file_column: str, target: str, shelf: Shelf) -> dict[str, str]:
    """Join a CSV of labels to series by the name of the image file, or of the DICOM folder.

    Args:
        table: CSV with a header.
        file_column: Column with the name.
        target: Column with the label.
        shelf: The rows to find.

    Returns:
        series_id -> label text; series without a label are left out.

    Raises:
        RequestError: A column is missing, or nothing matches.
    """
    import csv

    path = Path(table)
    if not path.is_file():
        raise RequestError(f"no such table: {table}; give a CSV with the columns {file_column} and {target}")
    with open(path, newline="") as stream:
        reader = csv.DictReader(stream)
        columns = reader.fieldnames or []
        missing = [column for column in (file_column, target) if column not in columns]
        if missing:
            raise RequestError(
                f"{path.name} has no column {', '.join(missing)}; it has {header_words(columns, (file_column, target))}"
            )
        labels = {Path(row[file_column]).name: row[target] for row in reader if row[target] not in ("", None)}
    found = {}
    for row in shelf.rows:
        files = shelf.archive.files(row.series_id)
        names = [files[0].name, files[0].parent.name] if files else []
        match = next((labels[name] for name in names if name in labels), None)
        if match is not None:
            found[row.series_id] = match
    if not found:
        raise RequestError(
            f"none of the {len(shelf.rows)} selected series is named in column {file_column} of {path.name}; "
            "names are compared with the image file's name, or the DICOM folder's"
        )
    return found


def refuse_leakage(train: Sequence[SeriesRow], held_out: Sequence[SeriesRow], what: str) -> None:
    """Raise when a patient is on both sides.

    Raises:
        LeakageError: With the number of patients, never who they are.
    """
    both = {row.patient_id for row in train} & {row.patient_id for row in held_out}
    if both:
        raise LeakageError(
            f"{what}: {len(both)} of {len({row.patient_id for row in held_out})} patients are in the pretraining data too; "
            "select them apart (for instance where: split = 'val'), or the numbers would flatter the weights"
        )
