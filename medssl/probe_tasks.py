"""Frozen probes of weights on a labelled table, beside their controls, and what every evaluation of weights shares."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medssl import build, data_sources, label_tables
from medssl.cards.named import assign, card_facts
from medssl.errors import RequestError
from medssl.evaluation.clips import motion
from medssl.evaluation.controls import control_features
from medssl.evaluation.features import embed, pooled, probe_table
from medssl.evaluation.knn import knn_probe
from medssl.evaluation.linear_probe import linear_predict
from medssl.evaluation.pretrained_views import RESAMPLED, refuse_unlike, unlike_views
from medssl.leakage import refuse_pretraining_patients
from medssl.recipe import (
    EvaluateBase,
    EvaluateRecipe,
    FinetuneBoxesRecipe,
    FinetuneTargetsRecipe,
    SourceSection,
    SuiteRecipe,
)
from medssl.recipe_checks import load_recipe
from medssl.registry import lookup
from medssl.training.run_folder import facts_of_machine
from medssl.weights import load_part, private_folder, write_atomic

Progress = Callable[[int, int], None]
Note = Callable[[str], None]
StepProgress = Callable[[int, int, Mapping[str, float]], None]


def evaluate(recipe: Any, weights: Path | str, overrides: Sequence[str] = (), on_cache: Progress | None = None) -> dict[str, Any]:
    """Probe frozen features of weights on a labelled table, beside the controls.

    Args:
        recipe: YAML path or loaded recipe; its task may be one of `clip_tasks`.
        weights: Run folder or safetensors file.
        overrides: `key=value` assignments.
        on_cache: Progress of filling the store.

    Returns:
        What `evaluate.json` in `out` holds: `rows` {name, probe, metric, value, low, high, n_images, n_patients, by}, and the facts.

    Raises:
        RequestError: Recipe, table and weights do not go together, or the views are not those of the weights and nobody forced it;
            nothing was written to `out`.
        LeakageError: A patient was pretrained on.
    """
    recipe = load_recipe(recipe, overrides, kind="evaluate")
    if not isinstance(recipe, EvaluateRecipe):
        from medssl.clip_tasks import evaluate_clips

        return evaluate_clips(recipe, weights, on_cache)
    started = time.perf_counter()
    label_tables.check_table(recipe.table, recipe.file_column, recipe.target)
    encoder = build.load_encoder(weights)
    _, manifest = load_part(weights)
    section, forced = matching_section(recipe, manifest)
    refuse_size(manifest["encoder"], section.views)
    if recipe.readout == "motion" and section.views.get("kind") != "clip":
        raise RequestError("readout: motion reads changes over time off clips, and these are none; set readout: pooled")
    readout = motion if recipe.readout == "motion" else pooled
    shelf = data_sources.fill_shelf("source", section, on_progress=on_cache)
    leakage = refuse_pretraining_patients(weights, shelf)
    targets, series, groups = labelled_rows(shelf, recipe.table, recipe.file_column, recipe.target, recipe.task)
    source = data_sources.evaluation_source("source", shelf, section, series)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def batches() -> Any:
        return data_sources.images_and_ids(source, device, recipe.batch)

    def untrained() -> Any:
        return build.build_encoder(manifest["encoder"])

    features, _ = embed(encoder.to(device), batches(), readout)
    controls = control_features(untrained, batches, seed=recipe.seed, device=device, readout=readout)
    rows = probe_table(features, controls, targets, groups, task=recipe.task, k=recipe.k[0], seed=recipe.seed)
    for k in recipe.k[1:]:
        for name, values in {"encoder": features, **controls}.items():
            rows += knn_probe(values, targets, groups, task=recipe.task, name=name, k=k, seed=recipe.seed)
    seconds = time.perf_counter() - started
    found = {"target": recipe.target, "readout": recipe.readout, "forced": forced, "rows": rows, "seconds": seconds}
    result = write_evaluation(recipe, manifest, leakage, shelf, found)
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


def matching_section(
    recipe: EvaluateBase | FinetuneTargetsRecipe | FinetuneBoxesRecipe | SuiteRecipe, manifest: Mapping[str, Any]
) -> tuple[SourceSection, list[str]]:
    """Return `evaluation_section`, and how its views differ from those of the weights where that was forced.

    Raises:
        RequestError: They differ and nobody forced it, or there are none.
    """
    section = evaluation_section(recipe, manifest)
    return section, refuse_unlike(unlike_views(manifest, section.views), recipe.force, "source.views")


def refuse_size(encoder: Mapping[str, Any], views: Mapping[str, Any]) -> None:
    """Refuse views of a size that an encoder does not take: items of any size are cut, padded or resized to it.

    Args:
        encoder: `{"name", "args"}`.
        views: A `views` section with its size.

    Raises:
        RequestError: The patch does not divide the size.
    """
    target = lookup("encoder", encoder["name"])
    maker: Any = data_sources.make_views(views)
    size, patch = tuple(maker.size), tuple(target.divisor(encoder["args"]))
    if getattr(target, "takes_clips", False):  # frames come first, and a picture has none
        size = tuple(maker.spec.size) if views.get("kind") == "clip" else size
        patch = patch[-len(size) :]
    if any(n % p for n, p in zip(size, patch)):
        nearest = [max(p, round(n / p) * p) for n, p in zip(size, patch)]
        raise RequestError(
            f"source.views.size: the patch {patch} of {encoder['name']} does not divide {size}; every size must be a multiple of "
            f"it, for instance {nearest}"
        )


def evaluation_section(
    recipe: EvaluateBase | FinetuneTargetsRecipe | FinetuneBoxesRecipe | SuiteRecipe, manifest: Mapping[str, Any]
) -> SourceSection:
    """Return the recipe's source with the views of the weights where the recipe names none.

    These are size, spacing and normalisation; for an encoder of pictures alone also the kind, for one of clips the kind, the frames and
    their rate.

    Raises:
        RequestError: Clips are asked for, and the encoder takes none; or neither recipe nor weights say size and normalisation.
    """
    assert recipe.source is not None
    given = recipe.source.views
    encoder = manifest["encoder"]
    clips, images, stacks = (
        getattr(lookup("encoder", encoder["name"]), f"takes_{what}", False) for what in ("clips", "images", "stacks")
    )
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
    channels = "mean" if encoder["args"].get("in_channels", 1) == 1 else "keep"
    if images and not clips and not stacks and "kind" not in given:
        views = {"kind": "image", "channels": channels, **views}
    elif clips and given.get("kind", "clip") == "clip":
        views = {"kind": "clip", "channels": channels, **views}
        if shown := manifest.get("clip"):
            views = data_sources.with_timing(views, shown["frames"], shown["fps"])
    elif manifest.get("spacing_source") == "views" and views.get("kind", "volume") in RESAMPLED:
        views.setdefault("spacing_mm", manifest["spacing_mm"])
    return recipe.source.model_copy(update={"views": views})


def labelled_rows(
    shelf: data_sources.Shelf, table: str, file_column: str, target: str, task: str, limit: int | None = None
) -> tuple[np.ndarray, list[str], list[str] | None]:
    """Return (targets, series ids, patients) of the labelled rows of a shelf; patients is None when they are unknown."""
    found = label_tables.read_targets(table, file_column, target, shelf)
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


def save_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays to a compressed .npz atomically."""
    import io

    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_atomic(path, buffer.getvalue())
