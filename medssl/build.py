"""From a validated recipe to objects: the only place that knows both sides. Parts never see a recipe."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from medssl.archive.table import Archive, SeriesRow
from medssl.cards.named import SourceCards, assign, card_facts, card_notes, index_notes, source_notes
from medssl.data_sources import make_views, select_rows, specs
from medssl.errors import LeakageError
from medssl.recipe import (
    Component,
    FinetuneBagsRecipe,
    FinetuneBoxesRecipe,
    FinetuneRecipe,
    FinetuneTargetsRecipe,
    OptimSection,
    PretrainRecipe,
    source_path,
)
from medssl.registry import lookup
from medssl.seeding import derive_seed
from medssl.training.optim import OptimSettings
from medssl.training.settings import LoopSettings, Stage
from medssl.types import ViewSpec
from medssl.weights import load_part


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
        notes += source_notes(name, f"{source_path(recipe, name)}.card", cards[name], rows, section.domain.name)
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
