"""`medssl membership`: the membership-inference AUC of a run's encoder, from its own training images and held-out ones of the index."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medssl import build, data_sources
from medssl.archive.table import SeriesRow
from medssl.errors import RequestError
from medssl.evaluation.features import embed
from medssl.evaluation.membership import membership_auc, view_similarity
from medssl.leakage import run_of
from medssl.recipe import PretrainRecipe, SourceSection
from medssl.recipe_checks import load_recipe
from medssl.sampling.items import read as read_items
from medssl.seeding import counter_rng
from medssl.training.run_folder import RunFolder, now
from medssl.weights import read_manifest, write_atomic

HELD_OUT = "split in ('val', 'test')"


def membership(
    weights: Path | str,
    *,
    held_out: str | None = None,
    source: str | None = None,
    images: int = 200,
    views: int = 8,
    seed: int = 0,
    out: Path | str | None = None,
) -> dict[str, Any]:
    """Measure how well training images can be told from others by the encoder of a run.

    Every image is shown as its centre, in random views as in pretraining; see `medssl.evaluation.membership` for score and interval.

    Args:
        weights: Run folder: its recipe names index and views, its items the training images.
        held_out: SQL condition for images of the same index that were not trained on; patients of the run are left out of it. None takes
            `HELD_OUT`, where the recipe selects by split alone.
        source: Source of the recipe; None takes the first.
        images: Images per side at most, drawn at random.
        views: Views of each image, 2 or more.
        seed: Seed of images, views and bootstrap.
        out: JSON file to write; it holds numbers, no patients.

    Returns:
        As `membership_auc`, and `weights_hash`, `views`, `held_out`, `source`, `left_out` (series of patients of the run).

    Raises:
        RequestError: The weights lie outside their run, there is no such source, too few patients on a side, or the recipe selects its
            images by more than a split and `held_out` is None.
    """
    run = RunFolder(run_of(weights))
    if not run.items.is_file():
        raise RequestError(f"{weights} lies outside its run folder, so its training images are not known; give the run folder")
    recipe: PretrainRecipe = load_recipe(run.path / "recipe.yaml", kind="pretrain")
    name = source or next(iter(recipe.sources))
    if name not in recipe.sources:
        raise RequestError(f'membership: the recipe has no source "{name}"; it has {", ".join(recipe.sources)}')
    section = recipe.sources[name]
    trained = [item for item in read_items(run.items)]
    series = {item.series_id for item in trained if item.source == name}
    patients = {item.patient_id for item in trained}
    encoder = build.load_encoder(weights)
    inside = data_sources.fill_shelf(name, section)
    held_out = held_out or default_held_out(section)
    outside = data_sources.fill_shelf(name, section, held_out)
    members = [row for row in inside.rows if row.series_id in series]
    others = [row for row in outside.rows if row.patient_id not in patients]
    if not members or not others:
        raise RequestError(
            f"membership: {len(members)} training and {len(others)} held-out images ({held_out!r}, without patients of the run); both are "
            "needed: hold patients back by `medssl archive split` before pretraining, or name others with --held-out"
        )
    sides = [
        _scores(encoder, shelf, section, _some(rows, images, seed), views, seed)
        for shelf, rows in ((inside, members), (outside, others))
    ]
    result = {
        **membership_auc(*sides, seed=seed),
        "weights_hash": read_manifest(weights)["weights_hash"],
        "views": views,
        "held_out": held_out,
        "source": name,
        "left_out": len(outside.rows) - len(others),
        "when": now(),
    }
    if out is not None:
        write_atomic(Path(out), (json.dumps(result, indent=1) + "\n").encode())
    return result


def default_held_out(section: SourceSection) -> str:
    """Return `HELD_OUT`; another selection would compare images of another kind, and measure that.

    Raises:
        RequestError: The source selects by more than a split.
    """
    if re.fullmatch(r"\s*split\s*(=|!=|<>|(not\s+)?in\b)\s*[^=<>]*", section.where, re.IGNORECASE):
        return HELD_OUT
    raise RequestError(
        f"membership: the recipe selects its images where {section.where}; images of other kinds would be told apart by their content: give "
        "--held-out with the same conditions and the other splits"
    )


def _some(rows: Sequence[SeriesRow], count: int, seed: int) -> list[SeriesRow]:
    ordered = sorted(rows, key=lambda row: row.series_id)
    chosen = counter_rng(seed, "membership", "images").permutation(len(ordered))[:count]
    return [ordered[i] for i in sorted(chosen)]


def _scores(
    encoder: Any, shelf: data_sources.Shelf, section: SourceSection, rows: Sequence[SeriesRow], views: int, seed: int
) -> list[tuple[str, float]]:
    """Return (patient, score) of images."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    maker = data_sources.make_views(section.views)
    source = data_sources.evaluation_source(shelf.name, shelf, section, [row.series_id for row in rows], maker)
    encoder = encoder.to(device)

    def batches(draw: int) -> Any:
        for shown in data_sources.evaluation_batches(source, device, seed=draw):
            yield data_sources.first_view(shown, source.view_maker.name), shown.meta.ids.tolist()

    features = np.stack([embed(encoder, batches(seed * views + draw))[0] for draw in range(views)])
    return list(zip((row.patient_id for row in rows), view_similarity(features).tolist(), strict=True))
