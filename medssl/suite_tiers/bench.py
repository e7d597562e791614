"""What the tiers of a suite share: the labelled set with the features of weights and controls, and what a tier brings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medssl import build, data_sources, label_tables
from medssl.archive.table import SERIES_COLUMNS
from medssl.errors import RequestError
from medssl.evaluation.bootstrap import Statistic
from medssl.evaluation.clinical import OPEN_COLUMNS
from medssl.evaluation.controls import control_features
from medssl.evaluation.corruptions import Seen
from medssl.evaluation.features import Batch, embed
from medssl.evaluation.suite_rows import WEIGHTS, Row, skip
from medssl.evaluation.survival import SurvivalCases
from medssl.evaluation.target_cases import Cases
from medssl.recipe import SourceSection, SuiteRecipe

Features = dict[str, np.ndarray]
Change = Callable[[Seen, Sequence[int]], Seen]
"""Images, stacks or clips, and their places among the series -> the same of their kind."""


@dataclass
class Found:
    """What a tier brings: rows, what it skipped, and what only the owner may read.

    `again` says that something was skipped through an error that the user can correct: the tier is then not finished. `forced`
    is how the images of a recipe of its own differ from those of the pretraining, where that recipe forces it, `adapted` what was changed of
    the weights for the channels of these images. `plans` are those of networks that configure themselves, with the task and a sentence each.
    """

    rows: list[Row] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    private: dict[str, Any] = field(default_factory=dict)
    p_values: list[dict[str, Any]] = field(default_factory=list)
    again: bool = False
    forced: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    plans: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Bench:
    """The labelled set, the weights, and the features of both, computed when a tier first needs them.

    Args:
        recipe: The suite.
        weights: Where the weights lie.
        manifest: Of the weights.
        section: Source with the views of the weights.
        shelf: The cached series.
        tasks: Name -> labelled cases; `ids` are places in `series`.
        series: Series of any task, in the order of their ids.
        names: Task -> (classes in the table, public names).
        survival: Name -> cases of times and events, which other tiers leave out.
        forced: How the views differ from those of the weights, where that was forced.
    """

    recipe: SuiteRecipe
    weights: Path
    manifest: Mapping[str, Any]
    section: SourceSection
    shelf: data_sources.Shelf
    tasks: dict[str, Cases]
    series: list[str]
    names: dict[str, tuple[list[str], list[str]]]
    survival: dict[str, SurvivalCases] = field(default_factory=dict)
    forced: list[str] = field(default_factory=list)

    @property
    def all_cases(self) -> dict[str, Cases]:
        """The labelled cases of every task, survival too."""
        return {**self.tasks, **{name: own.cases for name, own in self.survival.items()}}

    @cached_property
    def device(self) -> torch.device:
        """Where encoders run."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def encoder(self) -> Any:
        """The encoder of the weights."""
        return build.load_encoder(self.weights).to(self.device)

    @cached_property
    def features(self) -> Features:
        """Features of all series: of the weights and of the controls."""
        return self.look(range(len(self.series)))

    def look(self, places: Iterable[int], change: Change | None = None) -> Features:
        """Return the features of series under every model, the images changed first where asked."""
        places = [int(place) for place in places]
        wanted = [self.series[place] for place in places]
        source = data_sources.evaluation_source("source", self.shelf, self.section, wanted)

        def batches() -> Iterator[Batch]:
            for images, ids in data_sources.images_and_ids(source, self.device, self.recipe.batch):
                yield (images if change is None else change(images, [places[n] for n in ids])), ids

        own, _ = embed(self.encoder, batches())

        def untrained() -> Any:
            return build.build_encoder(self.manifest["encoder"])

        return {WEIGHTS: own, **control_features(untrained, batches, seed=self.recipe.seed, device=self.device)}

    def of(self, task: str) -> Features:
        """Return the features of the cases of a task, in their order."""
        return {model: values[self.all_cases[task].ids] for model, values in self.features.items()}

    def column(self, name: str) -> list[str] | None:
        """Return the value of a column of the index, or of the table of labels, for every series; None where there is no such column."""
        if name in SERIES_COLUMNS:
            known = {row.series_id: getattr(row, name) for row in self.shelf.rows}
            return [_word(known[series]) for series in self.series]
        try:
            found = label_tables.read_targets(self.recipe.table, self.recipe.file_column, name, self.shelf)
        except RequestError:
            return None
        return [found.get(series, "unknown") for series in self.series]

    def public(self, column: str, values: Sequence[str]) -> list[str]:
        """Return values under the names that may be published: those of a closed list, those that the recipe lists, else group_1 ..."""
        if column in OPEN_COLUMNS:
            return list(values)
        listed = self.recipe.groups.get(column, [])
        others = sorted({value for value in values if value != "unknown" and value not in listed})
        return [v if v == "unknown" or v in listed else f"group_{others.index(v) + 1}" for v in values]

    def unseen(self, task: str) -> np.ndarray:
        """Return the rows of the validation and test cases of a task."""
        return np.flatnonzero(np.isin(self.all_cases[task].split, ("val", "test")))

    def row(self, name: str) -> list[Any]:
        """Return a column of the index for every series, as it is."""
        known = {row.series_id: getattr(row, name) for row in self.shelf.rows}
        return [known[series] for series in self.series]


def _word(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) and value else "unknown" if value in (None, "", ()) else str(value)


def join(done: Found, more: Found) -> None:
    """Add what a part found to what its tier has."""
    done.rows += more.rows
    done.skipped += more.skipped
    done.p_values += more.p_values
    done.private |= more.private
    done.again |= more.again
    done.forced += more.forced
    done.adapted += more.adapted
    done.plans += more.plans


@contextmanager
def or_skip(done: Found, task: str, what: str) -> Iterator[None]:
    """Turn the refusal of a probe into a skipped part: too few patients for one number must not cost the others."""
    try:
        yield
    except RequestError as err:
        done.skipped.append(skip(task, what, str(err)))


def finite(value: float) -> float | None:
    """Return a number, or None where it is not finite."""
    return float(value) if np.isfinite(value) else None


def mean_of(statistic: Statistic) -> Statistic:
    """Return the mean over seeds of a statistic, for rows (N, S, K)."""
    return lambda rows: float(np.mean([statistic(rows[:, seed]) for seed in range(rows.shape[1])]))
