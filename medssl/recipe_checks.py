"""Loading a recipe and finding its faults before anything is read or written: all of them are named at once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medssl.build import box_settings, finetune_settings, target_settings
from medssl.cards.named import name_faults, open_references
from medssl.cards.schema import Card
from medssl.data_sources import make_views, source_faults, specs, view_faults, views_path
from medssl.errors import RecipeError, RequestError, near
from medssl.recipe import (
    KINDS,
    Component,
    EvaluateBase,
    EvaluateSegmentationRecipe,
    FinetuneBagsRecipe,
    FinetuneBoxesRecipe,
    FinetuneRecipe,
    FinetuneTargetsRecipe,
    PretrainRecipe,
    Recipe,
    SuiteRecipe,
    apply_overrides,
    read_yaml,
    source_path,
    with_placeholders,
)
from medssl.registry import ENCODERS, argument_faults, component_faults, lookup
from medssl.types import ViewSpec
from medssl.views.pipeline import VolumeViews
from medssl.yaml_models import REQUIRED_MARK

_GIVEN = ("encoder", "image_size", "spacing_mm", "view", "view_specs", "items")  # what the builder itself gives to an objective


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
        recipe = parse(raw)
    _check_kind(recipe.kind, kind)
    check(recipe)
    return recipe


def parse(raw: Mapping[str, Any]) -> Any:
    """Validate a dictionary as `Recipe.parse` does; with the faults of its keys come those inside components and views.

    Raises:
        RecipeError: The recipe has faults.
    """
    try:
        return Recipe.parse(raw)
    except RecipeError as err:
        raise RecipeError([*err.faults, *_faults_beside(raw, err.faults)]) from None


def _faults_beside(raw: Mapping[str, Any], faults: Sequence[str]) -> list[str]:
    """Return faults inside the parts of a recipe once the keys named by other faults are taken out; none if it still has no right form."""
    rest: dict[str, Any] = json.loads(json.dumps(raw))
    for fault in faults:
        *parents, last = fault.partition(":")[0].split(".")
        node: Any = rest
        for name in parents:
            node = node.get(name) if isinstance(node, dict) else None
        if isinstance(node, dict) and node.get(last) != REQUIRED_MARK:
            node.pop(last, None)
    try:
        return part_faults(Recipe.parse(with_placeholders(rest)))
    except RecipeError:
        return []


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


def part_faults(recipe: Any) -> list[str]:
    """Return the faults inside components and views of a recipe of any kind, each part looked at for itself."""
    if not isinstance(recipe, PretrainRecipe):
        source, cohort = getattr(recipe, "source", None), getattr(recipe, "cohort", None)
        faults = source_faults("source", source) if source is not None else []
        return faults + (component_faults("cohort.domain", "domain", cohort.domain) if cohort is not None else [])
    faults = [fault for name, source in recipe.sources.items() for fault in source_faults(source_path(recipe, name), source)]
    for name, encoder in recipe.encoders.items():
        faults += component_faults(f"encoders.{name}" if len(recipe.encoders) > 1 else "encoder", "encoder", encoder)
    arguments = {key: value for key, value in recipe.objective.args.items() if key != "encoder"}  # which encoder: by name
    return faults + component_faults("objective", "objective", Component(name=recipe.objective.name, **arguments), _GIVEN)


def pretrain_faults(recipe: PretrainRecipe) -> list[str]:
    """Return every fault of a pretraining recipe that types alone cannot show."""
    faults = part_faults(recipe) + rate_faults(recipe)
    faults += card_faults({f"{source_path(recipe, name)}.card": source.cards for name, source in recipe.sources.items()})
    return faults or fit_faults(recipe) or crop_faults(recipe) + pair_faults(recipe) or specs_faults(recipe)


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
        path = views_path(source_path(recipe, source_name))
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
            source_path(recipe, name),
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
                f"{views_path(path)}.points: required by objective {recipe.objective.name}; for instance points: {{seeds: 100, negatives: 1000}}"
            )
    return faults


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
