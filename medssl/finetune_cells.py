"""Fine-tuning cell by cell, whatever is learnt: what the roads of targets, boxes and bags have in common.

out/target_curve.json              what the cells have in common; a folder never mixes two settings
out/cells/<arm>_n<labels>_s<seed>/ results.json (last: it says that the cell is done), network.safetensors with its manifest; of folds _f<fold>
out/summary.json, out/table.md     rewritten after every cell
out/private/classes.csv            what class_1, class_2, ... are called in the table, where the recipe does not name the classes

A cell is one training: number of labels, seed, fold, arm (the weights or their scratch twin). `source_curve` asks a `Road` for cases, checks
everything that can be refused, then computes the cells that are missing.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from medssl import build, data_sources
from medssl.archive.table import SeriesRow
from medssl.errors import RequestError, TrainingStopped
from medssl.evaluation.cell_summary import markdown
from medssl.evaluation.folds import deals, fewest, refuse_counts
from medssl.evaluation.label_curve import SCRATCH, Cell, plan
from medssl.probe_tasks import matching_section
from medssl.recipe import FinetuneBoxesRecipe, FinetuneTargetsRecipe, SourceSection
from medssl.recipe_checks import load_recipe
from medssl.seeding import derive_seed
from medssl.training.run_folder import facts_of_machine, now
from medssl.weights import load_part, private_folder, save_part, write_atomic, write_private

SourceRecipe = FinetuneTargetsRecipe | FinetuneBoxesRecipe
OnCell = Callable[[int, int, Cell, dict[str, Any]], None]
OnStep = Callable[[int, int, Mapping[str, float]], None]
LATER = ("sampler",)
"""What the records of folders of an earlier medssl lack; there it is as the first run says that goes on with them."""


@dataclass(frozen=True)
class Arm:
    """Where an encoder comes from.

    Args:
        encoder: `{"name", "args"}`.
        weights: Where its weights lie; None is the scratch twin.
        hash: Of the weights.
        forced: How the images differ from those of the pretraining, where that was forced.
    """

    encoder: dict[str, Any]
    weights: Path | None
    hash: str | None
    forced: tuple[str, ...] = ()

    def build(self, seed: int) -> Any:
        """Build it; a scratch encoder depends on the seed alone."""
        if self.weights is not None:
            size = {"image_size": self.encoder["args"]["image_size"]} if "image_size" in self.encoder["args"] else {}
            return build.load_encoder(self.weights, **size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "finetune", "encoder"))
            return build.build_encoder(self.encoder)


class Road(Protocol):
    """What one task knows of its cells, opened before anything is written."""

    @property
    def cases(self) -> Any:
        """All labelled cases."""
        ...

    def training_rows(self, cases: Any, labels: int | None, seed: int) -> np.ndarray:
        """Return the rows of the first training cases; refuse cases that cannot be learnt from or scored."""
        ...

    def refuse(self, arms: Mapping[str, Arm], cell: Cell, cases: Any) -> None:
        """Refuse what only the network of a first cell shows."""
        ...

    def facts(self) -> dict[str, Any]:
        """Return what cells of one folder share besides recipe, views and weights; a key for it may be written."""
        ...

    def keep(self, out: Path) -> None:
        """Write what things are called in the files, for the owner alone."""
        ...

    def compute(self, folder: Path, cell: Cell, arm: Arm, cases: Any, on_step: OnStep | None) -> dict[str, Any]:
        """Train and score a cell, write its folder, and return its results."""
        ...

    def summarise(self, results: Sequence[Mapping[str, Any]], last: bool) -> dict[str, Any]:
        """Return the table of finished cells; what takes minutes may wait for the last."""
        ...


def source_curve(
    recipe: Any,
    weights: Path | str | None,
    overrides: Sequence[str] = (),
    *,
    open_road: Callable[[Any, SourceSection, Path | str | None], Road],
    counts: Sequence[int] | None,
    seeds: Sequence[int],
    twin: bool = True,
    on_cell: OnCell | None = None,
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """Compute the cells (labels x seed x arm, x fold) that are missing, then summarise.

    Args:
        recipe: YAML path, `FinetuneTargetsRecipe` or `FinetuneBoxesRecipe`.
        weights: Run folder or safetensors file; None or "scratch" trains from scratch.
        overrides: `key=value` assignments.
        open_road: (recipe, source with its views, weights or None) -> the road of the task.
        counts: Numbers of labelled training cases; None takes the recipe's `labels`, or all.
        seeds: Seeds.
        twin: Also train the scratch twin of every cell.
        on_cell: Called with (cells done, cells in all, cell, its results) after each.
        on_step: Progress within a cell.

    Returns:
        `rows` (labels, arm, seeds, n_test, metric, value, low, high, seed_means, scores), `differences` to scratch, and the facts.

    Raises:
        RequestError: Recipe, labels and weights do not go together; nothing was trained.
        LeakageError: A patient or image to be scored was pretrained on.
    """
    recipe = load_recipe(recipe, overrides, kind="finetune")
    pretrained = None if weights is None or str(weights) == SCRATCH else weights
    manifest = None if pretrained is None else load_part(pretrained)[1]
    section, forced = section_of(recipe, manifest)
    arms = arms_of(recipe, pretrained, manifest, section, twin, forced)
    road = open_road(recipe, section, pretrained)
    dealt = deals(road.cases, recipe.folds, seeds, road.training_rows)
    counts = [recipe.labels or fewest(dealt)] if counts is None else list(counts)
    cells = plan(arms, counts, seeds, recipe.folds)
    refuse_counts(dealt, counts, road.training_rows)
    road.refuse(arms, cells[0], dealt[cells[0].seed, cells[0].fold])
    out = Path(recipe.out)
    private_folder(out)
    shared = {
        "kind": "finetune",
        "task": recipe.task,
        "folds": recipe.folds,
        "classes": list(road.cases.classes),
        "views": section.views,
        "encoder": next(iter(arms.values())).encoder,
        "weights": {name: arm.hash for name, arm in arms.items()},
        "forced": forced,
        **road.facts(),
    }
    claim(out, shared)
    road.keep(out)

    def compute(folder: Path, cell: Cell) -> dict[str, Any]:
        return road.compute(folder, cell, arms[cell.arm], dealt[cell.seed, cell.fold], on_step)

    return fill(out, cells, shared, compute, road.summarise, on_cell)


def fill(
    out: Path,
    cells: Sequence[Cell],
    shared: Mapping[str, Any],
    compute: Callable[[Path, Cell], dict[str, Any]],
    summarise: Callable[[Sequence[Mapping[str, Any]], bool], dict[str, Any]],
    on_cell: OnCell | None,
) -> dict[str, Any]:
    """Compute the cells of a plan that are missing, rewrite the tables after each, and return the last summary.

    Args:
        out: Folder of all cells.
        cells: The plan.
        shared: What they have in common.
        compute: (folder, cell) -> its results, written there.
        summarise: (results, whether these are the last) -> the table.
        on_cell: See `source_curve`.
    """
    for number, cell in enumerate(cells, start=1):
        folder = out / "cells" / cell.name
        content = read_cell(folder)
        if content is None:
            try:
                content = compute(folder, cell)
            except TrainingStopped:  # what is done is a result, with its intervals
                write_summary(out, cells, shared, lambda done: summarise(done, True))
                raise
            if number < len(cells):
                write_summary(out, cells, shared, lambda done: summarise(done, False))
        if on_cell is not None:
            on_cell(number, len(cells), cell, content)
    return write_summary(out, cells, shared, lambda done: summarise(done, True))


def same_settings(settings: Mapping[str, Any], unused: Sequence[str] = ()) -> dict[str, Any]:
    """Return settings as a folder of cells records them: without the device, and without those that change no score."""
    plain: dict[str, Any] = {**json.loads(json.dumps(settings)), "device": ""}
    return {key: value for key, value in plain.items() if key not in unused}


def section_of(recipe: SourceRecipe, manifest: Mapping[str, Any] | None) -> tuple[SourceSection, list[str]]:
    """Return the source with the views of the weights, and how it differs from them where that was forced.

    Raises:
        RequestError: Views differ from those of the weights and nobody forced it, or there are none.
    """
    if recipe.source is None:
        return _section_of_cohort(recipe, manifest)
    if manifest is None:
        if "size" not in recipe.source.views:
            raise RequestError(
                "from scratch the recipe must say what the encoder sees: source.views.size and source.views.normalize"
            )
        return recipe.source, []
    return matching_section(recipe, manifest)


def _section_of_cohort(recipe: FinetuneBoxesRecipe, manifest: Mapping[str, Any] | None) -> tuple[SourceSection, list[str]]:
    """Return the views of a cohort as those of a source."""
    assert recipe.cohort is not None
    stand_in = SourceSection(index="", domain=recipe.cohort.domain, views=recipe.views)
    try:
        section, forced = section_of(recipe.model_copy(update={"source": stand_in}), manifest)
    except RequestError as err:
        raise RequestError(str(err).replace("source.views", "views")) from None
    return section.model_copy(update={"views": {"normalize": "zscore", **section.views}}), forced


def arms_of(
    recipe: SourceRecipe,
    weights: Path | str | None,
    manifest: Mapping[str, Any] | None,
    section: SourceSection,
    twin: bool,
    forced: Sequence[str] = (),
) -> dict[str, Arm]:
    """Return the arms by name: `pretrained` where there are weights, and `scratch`.

    Raises:
        RequestError: There are no weights, and the recipe names no encoder.
    """
    if manifest is None or weights is None:
        if not recipe.encoder:
            raise RequestError(
                "from scratch the recipe must name an encoder: encoder: {name: ..., ...}; weights would bring their own"
            )
        args = {key: value for key, value in recipe.encoder.items() if key != "name"}
        return {SCRATCH: Arm({"name": recipe.encoder["name"], "args": args}, None, None)}
    if chosen := manifest.get("chosen_by"):
        raise RequestError(
            f"these weights were chosen by {chosen['labels']} labelled items ({chosen['metric']}), which lie in no budget of labels; give the "
            "run folder itself, which means weights/last"
        )
    encoder = {"name": manifest["encoder"]["name"], "args": dict(manifest["encoder"]["args"])}
    if "image_size" in encoder["args"] and section.views.get("kind", "volume") == "volume":
        encoder["args"]["image_size"] = data_sources.make_views(section.views).size
    arms = {"pretrained": Arm(encoder, Path(weights), str(manifest["weights_hash"]), tuple(forced))}
    return {**arms, SCRATCH: Arm(encoder, None, None)} if twin else arms


def claim(out: Path, shared: Mapping[str, Any]) -> None:
    """Write what the cells of a folder have in common, or check it against what the finished cells have.

    Raises:
        RequestError: The folder holds cells of something else.
    """
    path = out / "target_curve.json"
    if path.is_file() and any(out.glob("cells/*/results.json")):  # without one there is nothing to be mixed
        same = json.loads(json.dumps(shared))
        known = {**{key: same[key] for key in LATER if key in same}, **json.loads(path.read_text())}
        said = ("weights", "leakage_check", "forced")  # what is said of weights and views, which are compared themselves
        changed = [key for key in same if key not in said and known.get(key) != same[key]]
        changed += [f"weights of arm {a}" for a, h in same["weights"].items() if a in known["weights"] and known["weights"][a] != h]
        if changed:
            raise RequestError(
                f"{out} holds cells computed with other {', '.join(changed)}; cells of one folder share everything but labels, seed and "
                "arm; choose another folder, or remove this one"
            )
        shared = {
            **shared,
            "weights": {**known["weights"], **shared["weights"]},
            "forced": shared.get("forced") or known.get("forced", []),
        }
    write_atomic(path, json.dumps(shared, indent=1).encode())


def read_cell(folder: Path) -> dict[str, Any] | None:
    """Return the results of a finished cell; None when it was not started, or cut short."""
    path = folder / "results.json"
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def write_cell(
    folder: Path, content: dict[str, Any], cell: Cell, part: tuple[torch.nn.Module, Mapping[str, Any]]
) -> dict[str, Any]:
    """Write network and results of a cell; the results come last and say that it is done.

    Args:
        folder: Of the cell.
        content: Its results.
        cell: The cell.
        part: The network in the state that was scored, and its manifest.
    """
    network, manifest = part
    content = {**content, "fold": cell.fold, "of_folds": cell.folds, "forced": list(manifest.get("forced", ()))}
    content |= {"when": now(), **{key: facts_of_machine()[key] for key in ("hardware", "versions", "git")}}
    found: dict[str, Any] = json.loads(json.dumps(content, default=str))
    save_part(folder, "network", network.state_dict(), dict(manifest))
    write_atomic(folder / "results.json", json.dumps(found, indent=1, allow_nan=False).encode())
    return found


def write_summary(
    out: Path, cells: Sequence[Cell], shared: Mapping[str, Any], summarised: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]
) -> dict[str, Any]:
    """Summarise the finished cells of a plan, by `summarised`, into `summary.json` and `table.md`."""
    done = [content for cell in cells if (content := read_cell(out / "cells" / cell.name)) is not None]
    summary = summarised(done)
    summary["cells"] = {"planned": len(cells), "done": len(done)}
    summary["shared"] = dict(shared)
    write_atomic(out / "summary.json", json.dumps(summary, indent=1, allow_nan=False).encode())
    write_atomic(out / "table.md", (markdown(summary) + "\n").encode())
    return summary


def keep_names(out: Path, public: Sequence[Any], names: Sequence[str]) -> None:
    """Write what a table or file of boxes calls the classes, for the owner alone."""
    text = io.StringIO()
    csv.writer(text).writerows([("class", "value"), *zip(public, names)])
    write_private(out / "private" / "classes.csv", text.getvalue().encode())


def refuse_some_unknown(rows: Sequence[SeriesRow]) -> None:
    """Refuse folds where the patients of some of the series are unknown and those of others known: dealt by series, these would be split."""
    unknown = sum("patient_unknown" in row.quality_flags for row in rows)
    if 0 < unknown < len(rows):
        raise RequestError(
            f"folds: {unknown} of {len(rows)} labelled series have no usable patient identity, so patients cannot be kept together; leave them "
            "out, for instance with source.where=not list_contains(quality_flags, 'patient_unknown')"
        )
