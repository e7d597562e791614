"""From a validated recipe to objects: the only place that knows both sides. Parts never see a recipe."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from medssl.archive.table import Archive, SeriesRow
from medssl.cards.named import SourceCards, assign, card_facts, card_notes, index_notes, name_faults, open_references, source_notes
from medssl.cards.schema import Card
from medssl.data_sources import make_views, select_rows, source_faults, specs, view_faults
from medssl.errors import LeakageError, RecipeError, RequestError, near
from medssl.recipe import (
    KINDS,
    Component,
    EvaluateBase,
    EvaluateSegmentationRecipe,
    FinetuneBagsRecipe,
    FinetuneBoxesRecipe,
    FinetuneRecipe,
    FinetuneTargetsRecipe,
    OptimSection,
    PretrainRecipe,
    Recipe,
    SuiteRecipe,
    apply_overrides,
    read_yaml,
)
from medssl.registry import ENCODERS, argument_faults, component_faults, lookup
from medssl.seeding import derive_seed
from medssl.training.optim import OptimSettings
from medssl.training.settings import LoopSettings, Stage
from medssl.types import ViewSpec
from medssl.views.pipeline import VolumeViews
from medssl.weights import load_part

_GIVEN = ("encoder", "image_size", "spacing_mm", "view", "view_specs", "items")  # what the builder itself gives to an objective


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
    faults += rate_faults(recipe)
    return faults or fit_faults(recipe) or crop_faults(recipe) + pair_faults(recipe) or specs_faults(recipe)


def rate_faults(recipe: PretrainRecipe) -> list[str]:
    """Check that no learning rate ends above its peak: the cosine would rise."""
    sections = {"optim": recipe.optim} | {f"stages.{n}.optim": stage.optim for n, stage in enumerate(recipe.stages) if stage.optim}
    return [
        f"{path}.schedule.final_lr: {section.schedule.final_lr:g} is above {path}.lr {section.lr:g}, so the rate would rise to it; choose "
        "final_lr below lr, for instance 1e-6"
        for path, section in sections.items()
        if section.schedule.final_lr > section.lr
    ]


def fit_faults(recipe: PretrainRecipe) -> list[str]:
    """Check that the objective's encoder exists and can do what the objective needs."""
    chosen = recipe.objective.args.get("encoder", next(iter(recipe.encoders)))
    if chosen not in recipe.encoders:
        return [f'objective.encoder: no encoder named "{chosen}"{near(str(chosen), recipe.encoders)}']
    name = recipe.encoders[chosen].name
    needs = getattr(lookup("objective", recipe.objective.name), "needs", ())

    def fits(encoder: str) -> bool:
        found = lookup("encoder", encoder)
        if getattr(found, "takes_clips", False) and "takes_clips" not in needs:
            return False  # other objectives bring no clips
        return all(getattr(found, need, False) for need in needs)

    if fits(name):
        return []
    fitting = sorted(other for other in ENCODERS if fits(other))
    return [
        f"objective.name: {recipe.objective.name} cannot work on encoder {name} (it needs {', '.join(needs) or 'no clips'}); "
        f"encoders that fit: {', '.join(fitting)}"
    ]


def crop_faults(recipe: PretrainRecipe) -> list[str]:
    """Check that the patch of each encoder divides every crop, and that mask cells divide it too."""
    faults = []
    for source_name, source in recipe.sources.items():
        views = make_views(source.views)
        size, grid = (views.size, views.mask_grid) if isinstance(views, VolumeViews) else (views.size, None)
        path = "views" if len(recipe.sources) == 1 else f"sources.{source_name}.views"
        for name, encoder in recipe.encoders.items():
            target = lookup("encoder", encoder.name)
            patch = target.divisor(encoder.args)
            clips = getattr(target, "takes_clips", False) and views.spec.kind == "clip"
            shown: tuple[int, ...] = views.spec.size if clips else size  # frames of a clip come first
            place = "encoder" if len(recipe.encoders) == 1 else f"encoders.{name}"
            if any(n % p for n, p in zip(shown, patch)):
                faults.append(f"{place}: patch {patch} does not divide {path}.size {shown}; choose sizes that are multiples of it")
            if recipe.objective.name == "mae" and grid != tuple(n // p for n, p in zip(shown, patch)):
                faults.append(f"{path}.mask.cell: objective mae drops tokens, so a mask cell must be one patch: cell={list(patch)}")
        if recipe.objective.name.startswith(("mae", "alice")) and grid is None:
            faults.append(
                f"{path}.mask: required by objective {recipe.objective.name}; for instance mask: {{ratio: 0.75, cell: 16}}"
            )
    return faults


def pair_faults(recipe: PretrainRecipe) -> list[str]:
    """Check that an objective that learns from pairs of crops gets those it names.

    An objective says which pairs of a sampler it takes (`pairs`), whether two looks at one crop will do (`looks`), and whether it needs to
    know where points lie (`points`).
    """
    target = lookup("objective", recipe.objective.name)
    wanted: tuple[str, ...] = getattr(target, "pairs", ())
    faults = []
    for name, source in recipe.sources.items() if wanted else ():
        path, kind, given = (
            _source_path(recipe, name),
            source.views.get("kind", "volume"),
            source.sampler.args.get("pairs", "matched"),
        )
        looks = getattr(target, "looks", False)
        if kind == "volume" and looks and source.views.get("count") == 2:
            continue
        if kind != "pair" or given not in wanted:
            faults.append(
                f"{path}.sampler.pairs: objective {recipe.objective.name} learns from pairs: {' or '.join(wanted)}; set views.kind: pair and "
                f"sampler.pairs: {wanted[0]}{', or views.count: 2 for two looks at one crop' if looks else ''}"
            )
        elif getattr(target, "points", False) and source.views.get("points") is None:
            faults.append(
                f"{path}.views.points: required by objective {recipe.objective.name}; for instance points: {{seeds: 100, negatives: 1000}}"
            )
    return faults


def _source_path(recipe: PretrainRecipe, name: str) -> str:
    return "data" if list(recipe.sources) == ["main"] else f"sources.{name}"


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
            raw = apply_overrides(read_yaml(path / "recipe.yaml"), [*overrides, f"out={path}"])
        else:
            raw = apply_overrides(read_yaml(path), overrides)
        _check_kind(str(raw.get("kind", "pretrain")), kind)  # before its keys, which are those of another command
        recipe = Recipe.parse(raw)
    _check_kind(recipe.kind, kind)
    check(recipe)
    return recipe


def _check_kind(found: str, needed: str | None) -> None:
    if needed is None or found == needed or found not in KINDS:
        return
    runs, needs = ("evaluate --suite" if kind == "suite" else kind for kind in (found, needed))
    raise RequestError(f"this is a recipe of kind {found}; `medssl {runs}` runs it; `medssl {needs}` needs one with kind: {needed}")


def check(
    recipe: PretrainRecipe
    | FinetuneRecipe
    | FinetuneTargetsRecipe
    | FinetuneBagsRecipe
    | FinetuneBoxesRecipe
    | EvaluateBase
    | SuiteRecipe,
) -> None:
    """Raise RecipeError with every fault of a recipe; nothing has been read or written yet."""
    if isinstance(recipe, PretrainRecipe):
        faults = pretrain_faults(recipe)
    elif isinstance(recipe, EvaluateBase):
        faults = source_faults("source", recipe.source) + card_faults({"source.card": recipe.source.cards}) + head_faults(recipe)
    elif isinstance(recipe, FinetuneTargetsRecipe):
        faults = target_faults(recipe)
    elif isinstance(recipe, FinetuneBoxesRecipe):
        faults = box_faults(recipe)
    elif isinstance(recipe, FinetuneBagsRecipe):
        faults = bag_faults(recipe)
    elif isinstance(recipe, SuiteRecipe):
        faults = suite_faults(recipe)
    else:
        faults = finetune_faults(recipe)
    if faults:
        raise RecipeError(faults)


def head_faults(recipe: EvaluateBase) -> list[str]:
    """Check structures and settings of the head that draws them."""
    if not isinstance(recipe, EvaluateSegmentationRecipe):
        return []
    from medssl.evaluation.clips import HeadSettings

    faults = argument_faults("head", HeadSettings, recipe.head)
    faults += [
        f"structures.{name}: {value}; accepted: 1 or more, 0 is background"
        for name, value in recipe.structures.items()
        if value < 1
    ]
    if len(set(recipe.structures.values())) < len(recipe.structures):
        faults.append(f"structures: two names share a value in {recipe.structures}; give each structure its own")
    return faults


def suite_faults(recipe: SuiteRecipe) -> list[str]:
    """Check the source, the tiers and the corruptions of a suite."""
    from medssl.evaluation.corruptions import KINDS, LEVELS
    from medssl.evaluation.suite_rows import TIERS

    faults = source_faults("source", recipe.source) + card_faults({"source.card": recipe.source.cards})
    for path, given, known in (
        ("tiers", recipe.tiers, list(TIERS)),
        ("corruptions.kinds", recipe.corruptions.kinds, list(KINDS)),
    ):
        faults += [
            f'{path}: "{name}" is unknown{near(name, known)}; accepted: {", ".join(known)}' for name in given if name not in known
        ]
    faults += [f"corruptions.levels: {n}; accepted: 1 to {LEVELS}" for n in recipe.corruptions.levels if not 1 <= n <= LEVELS]
    for path, numbers in (("k", recipe.k), ("shots", recipe.shots)):
        faults += [f"{path}: {n}; accepted: 1 or more" for n in numbers if n < 1]
    for name in ("classification", "segmentation", "detection", "regression"):
        curve = getattr(recipe, name)
        if curve is not None:
            faults += [f"{name}.counts: {n}; accepted: 1 or more" for n in curve.counts if n < 1]
            faults += [f"{name}.fractions: {x}; accepted: above 0, at most 1" for x in curve.fractions if not 0 < x <= 1]
    for name, section in (("segmentation", recipe.segmentation), ("detection", recipe.detection)):
        if section is not None and section.recipe is None:
            faults.append(f"{name}.recipe: required; the fine-tuning recipe of that task")
    return faults


def finetune_faults(recipe: FinetuneRecipe) -> list[str]:
    """Check the settings of a fine-tuning recipe."""
    faults = card_faults({"cohort.card": [recipe.cohort.card]}) if recipe.cohort.card else []
    from medssl.evaluation.segmentation_settings import refuse_dimensions

    faults += component_faults("cohort.domain", "domain", recipe.cohort.domain)
    try:
        settings = finetune_settings(recipe)
        if not faults:
            refuse_dimensions(settings)
    except RequestError as err:
        faults.append(f"settings: {err}")
    return faults


def target_faults(recipe: FinetuneTargetsRecipe) -> list[str]:
    """Check the source and the settings of a recipe for classes or numbers."""
    faults = source_faults("source", recipe.source) + card_faults({"source.card": recipe.source.cards})
    try:
        settings = target_settings(recipe)
    except RequestError as err:
        return [*faults, f"settings: {err}"]
    if not faults:
        wrong = view_faults("source.views", {**recipe.source.views, **settings.augment})
        faults += [sentence.replace("source.views", "settings.augment", 1) for sentence in wrong]
    return faults


def bag_faults(recipe: FinetuneBagsRecipe) -> list[str]:
    """Check the settings of a recipe for bags; of those that are for images only the defaults are accepted."""
    try:
        settings = target_settings(recipe)
    except RequestError as err:
        return [f"settings: {err}"]
    given = {"augment": bool(settings.augment), "flips": bool(settings.flips), "freeze_steps": settings.freeze_steps > 0}
    return [
        f"settings.{name}: bags hold features, there are no images or encoder to change; leave it out"
        for name, set_ in given.items()
        if set_
    ]


def box_faults(recipe: FinetuneBoxesRecipe) -> list[str]:
    """Check source or cohort, and the settings, of a recipe for boxes."""
    views: Mapping[str, Any] = recipe.views
    if recipe.source is not None:
        path, views = "source.views", recipe.source.views
        faults = source_faults("source", recipe.source) + card_faults({"source.card": recipe.source.cards})
        if not faults and views.get("kind") != "image":
            faults.append(
                "source.views.kind: detection in an index is for pictures: kind: image; volumes come from a cohort with label maps"
            )
    else:
        assert recipe.cohort is not None
        path = "views"
        faults = card_faults({"cohort.card": [recipe.cohort.card]}) if recipe.cohort.card else []
        faults += component_faults("cohort.domain", "domain", recipe.cohort.domain) + view_faults("views", {"size": 16, **views})
        if not faults and views.get("kind", "volume") != "volume":
            faults.append("views.kind: a cohort holds volumes; leave it out")
        if not faults and "volume" not in getattr(lookup("domain", recipe.cohort.domain.name), "kinds", ("volume",)):
            faults.append(
                f"cohort.domain: {recipe.cohort.domain.name} reads pictures; boxes in pictures come from an index (source) and a table"
            )
    try:
        settings = box_settings(recipe)
    except RequestError as err:
        return [*faults, f"settings: {err}"]
    if not faults:
        wrong = view_faults(path, {"size": 16, **views, **settings.augment})
        faults += [sentence.replace(path, "settings.augment", 1) for sentence in wrong]
    return faults


def box_settings(recipe: FinetuneBoxesRecipe) -> Any:
    """Return the `BoxSettings` of a recipe."""
    from medssl.evaluation.finetune_boxes import BoxSettings
    from medssl.evaluation.settings import settings_of

    return settings_of(BoxSettings, {"device": "cuda" if torch.cuda.is_available() else "cpu", **recipe.settings})


def target_settings(recipe: FinetuneTargetsRecipe | FinetuneBagsRecipe) -> Any:
    """Return the `TargetSettings` of a recipe."""
    from medssl.evaluation.finetune_targets import TargetSettings

    return TargetSettings.from_dict({"device": "cuda" if torch.cuda.is_available() else "cpu", **recipe.settings})


def finetune_settings(recipe: FinetuneRecipe) -> Any:
    """Return the `FinetuneSettings` of a recipe."""
    from medssl.evaluation.segmentation_settings import FinetuneSettings

    device = "cuda" if torch.cuda.is_available() else "cpu"
    domain = {"domain": recipe.cohort.domain.name, "domain_args": recipe.cohort.domain.args}
    values = {"network": recipe.network, **domain, "device": device, "force": recipe.force, **recipe.settings}
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
    from medssl.encoders.loading import NoRandomStart, load_into

    state, manifest = load_part(path)
    description = {"name": manifest["encoder"]["name"], "args": {**manifest["encoder"]["args"], **changes}}
    with NoRandomStart() as start:
        encoder = build_encoder(description)
    load_into(encoder, state, manifest)
    if start.unfilled(encoder, state):  # a decoder that these weights do not have
        encoder = build_encoder(description)
        load_into(encoder, state, manifest)
    return encoder.eval()


def build_objective(recipe: PretrainRecipe, items: int = 0) -> tuple[Any, list[Any]]:
    """Build the encoders and the objective of a recipe, weights drawn from the recipe's seed alone.

    Returns:
        The objective and its encoders.
    """
    torch.manual_seed(derive_seed(recipe.train.seed, "init"))
    encoders = {name: build_encoder(component) for name, component in recipe.encoders.items()}
    args = dict(recipe.objective.args)
    chosen = args.pop("encoder", next(iter(encoders)))
    target = lookup("objective", recipe.objective.name)
    first = make_views(next(iter(recipe.sources.values())).views)
    given = {
        "image_size": first.size,
        "spacing_mm": first.spec.spacing_mm,
        "view": first.name,
        "view_specs": all_specs(recipe),
        "items": items,
    }
    accepted = inspect.signature(target).parameters
    objective = target(encoders[chosen], **{key: value for key, value in given.items() if key in accepted}, **args)
    return objective, list(encoders.values())


def all_specs(recipe: PretrainRecipe) -> dict[str, ViewSpec]:
    """Return what the sources deliver, by key of the batch; sources of one kind must agree (`specs_faults`)."""
    return {key: spec for source in recipe.sources.values() for key, spec in specs(make_views(source.views)).items()}


def specs_faults(recipe: PretrainRecipe) -> list[str]:
    """Check that sources of one kind make the same views: a batch key means one shape in a run."""
    faults, seen = [], dict[str, tuple[str, ViewSpec]]()
    for name, source in recipe.sources.items():
        for key, spec in specs(make_views(source.views)).items():
            other, known = seen.setdefault(key, (name, spec))
            if (known.size, known.count) != (spec.size, spec.count):
                faults.append(
                    f"sources.{name}.views: {key} is {spec.size} x {spec.count} here and {known.size} x {known.count} in "
                    f"source {other}; give sources of one kind the same size and count"
                )
    return faults


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
