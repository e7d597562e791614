"""Bags of tile features: what a slide is when its tiles were encoded before, one label a slide.

Feature files are those of `medssl`, TRIDENT and CLAM (`domains.slides.features`). Nothing of the tiles' encoder is trained here; what is
learnt is the head of `finetune_targets`, over an encoder that hands the features on.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from medssl.domains.slides.features import read_features, read_shape
from medssl.errors import RequestError, StoreError
from medssl.evaluation.scores import Task
from medssl.evaluation.target_cases import Cases
from medssl.seeding import counter_rng
from medssl.types import EncoderOutput

SPLITS = ("train", "val", "test")
T = TypeVar("T")


class BagEncoder(nn.Module):
    """Hands features of tiles on as tokens; it has nothing to learn.

    Args:
        dim: Width D of the features.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.embed_dim = dim

    def forward_features(self, bags: Tensor) -> EncoderOutput:
        """Return tokens of bags (B, N, D), padded with zeros, and the mean over what is not padding."""
        seen = (bags != 0).any(dim=-1, keepdim=True)
        pooled = bags.sum(dim=1) / seen.sum(dim=1).clamp_min(1)
        return EncoderOutput(tokens=bags, grid=(bags.shape[1],), pooled=pooled)


@dataclass(frozen=True)
class BagBatches:
    """Bags of slides, from their feature files; a `finetune_targets.Batches`.

    Args:
        files: Id -> feature file.
        tokens: Most tiles of a slide in a training step, drawn without replacement; all are shown when a slide is scored.
        device: Where bags go.
    """

    files: dict[int, Path]
    tokens: int
    device: torch.device

    def training(self, ids: Sequence[int], step: int, seed: int, batch: int) -> tuple[Tensor, Sequence[int]]:
        """Return bags (batch, N, D) of a step and their ids: every id once before any comes again."""
        chosen = [self._place(ids, seed, step * batch + k) for k in range(batch)]
        bags = []
        for k, number in enumerate(chosen):
            features = self._read(number)
            if len(features) > self.tokens:
                rng = counter_rng(seed, "tiles", step, k)
                features = features[np.sort(rng.choice(len(features), self.tokens, replace=False))]
            bags.append(torch.from_numpy(features))
        return nn.utils.rnn.pad_sequence(bags, batch_first=True).to(self.device), chosen

    def plain(self, ids: Sequence[int]) -> Iterator[tuple[Tensor, Sequence[int]]]:
        """Yield whole bags (1, N, D), one by one."""
        for number in ids:
            yield torch.from_numpy(self._read(number))[None].to(self.device), [number]

    def _place(self, ids: Sequence[int], seed: int, place: int) -> int:
        turn, row = divmod(place, len(ids))
        return int(ids[int(counter_rng(seed, "slides", turn).permutation(len(ids))[row])])

    def _read(self, number: int) -> np.ndarray:
        found = _opened(read_features, self.files[number], case_name(number))
        return np.asarray(found.features, dtype=np.float32)


def case_name(number: int) -> str:
    """Return what results call a slide."""
    return f"slide{number + 1:04d}"


def _opened(read: Callable[[Path], T], file: Path, name: str) -> T:
    """Read a feature file; names of slides are kept out of errors."""
    try:
        return read(file)
    except StoreError:
        raise StoreError(f"the feature file of {name} is damaged, or holds no features; write it again") from None


@dataclass(frozen=True)
class LabelledBags:
    """What a table and a folder of feature files give.

    Args:
        cases: The labelled slides that have features, in the order of the table; patients are `patient0001`, ...
        files: Id -> feature file.
        dim: Width of the features.
        made_by: Name of the tiles' encoder as the files state it, or "".
        values: What the table calls the classes, in their order; empty for numbers.
        without_features: Labelled rows that have no file, or an empty one.
    """

    cases: Cases
    files: dict[int, Path]
    dim: int
    made_by: str
    values: list[str]
    without_features: int


def labelled_bags(
    folder: Path,
    table: Path,
    *,
    task: Task,
    target: str,
    classes: Sequence[str],
    file_column: str = "file",
    split_column: str = "split",
    patient_column: str = "patient",
) -> LabelledBags:
    """Join a table of slides to feature files by name, the ending left out.

    Args:
        folder: Holds `<name>.h5`.
        table: CSV with a header. Without `patient_column` patients are unknown and intervals are by slide.
        task: `classification` or `regression`.
        target: Column of the label; rows where it is empty are left out.
        classes: The values of `target` in their order, which are then told; without them classes are the sorted values, `class_1`, ...
        file_column: Column with the name of the slide.
        split_column: Column with train, val or test.
        patient_column: Column that tells patients apart.

    Raises:
        RequestError: A column is missing, nothing matches, a label or a split cannot be read, one patient is in two splits, or features
            are not of one kind.
    """
    rows = _rows(table, [file_column, split_column, target])
    values = list(classes)
    if task == "classification" and not values:
        values = sorted({row[target] for row in rows if row[target] not in ("", None)})
    faults = []
    kept: list[tuple[Path, float, str, str]] = []
    lines: dict[Path, int] = {}
    absent = 0
    for line, row in enumerate(rows, start=2):
        if row[target] in ("", None):
            continue
        value = _value(row[target], task, values)
        if value is None or row[split_column] not in SPLITS:
            faults.append(f"row {line}: " + ("split is not train, val or test" if value is not None else _unread(target, task)))
            continue
        file = folder / f"{Path(row[file_column]).stem}.h5"
        if not file.is_file():
            absent += 1
            continue
        if file in lines:
            faults.append(f"row {line}: names the slide of row {lines[file]} again; its folder and ending do not tell them apart")
        lines.setdefault(file, line)
        kept.append((file, value, row[split_column], row.get(patient_column) or ""))
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise RequestError(f"{table.name}: {'; '.join(faults[:5])}{more}; correct these rows, or empty the cell of the label")
    if not kept:
        raise RequestError(
            f"none of the {len(rows)} rows of {table.name} has a feature file in the folder; files are named as in column "
            f"{file_column}, with .h5 for the ending"
        )
    dim, made_by, empty = _one_kind({file: lines[file] for file, *_ in kept})
    kept = [row for row in kept if row[0] not in empty]
    blank = sum(not patient for *_, patient in kept)
    if 0 < blank < len(kept):
        raise RequestError(
            f"{table.name}: column {patient_column} is empty in {blank} of {len(kept)} rows, so a patient could be in two splits unseen; "
            "fill it, or empty the label of these rows"
        )
    known = not blank
    numbers = {name: f"patient{k:04d}" for k, name in enumerate(dict.fromkeys(patient for *_, patient in kept), start=1)}
    groups = [numbers[patient] for *_, patient in kept] if known else None
    if groups is not None:
        _refuse_two_sides(groups, [split for _, _, split, _ in kept], table)
    public = list(classes) or [f"class_{number}" for number in range(1, len(values) + 1)]
    targets, splits = np.array([value for _, value, *_ in kept]), np.array([split for _, _, split, _ in kept])
    cases = Cases(np.arange(len(kept)), targets, groups, splits, public)
    return LabelledBags(cases, {k: file for k, (file, *_) in enumerate(kept)}, dim, made_by, values, absent + len(empty))


def _rows(table: Path, wanted: Sequence[str]) -> list[dict[str, str]]:
    if not table.is_file():
        raise RequestError(f"no such table: {table}; give a CSV with the columns {', '.join(wanted)}")
    with table.open(newline="") as stream:
        reader = csv.DictReader(stream)
        missing = [column for column in wanted if column not in (reader.fieldnames or [])]
        if missing:
            raise RequestError(f"{table.name} has no column {', '.join(missing)}; a table of slides has {', '.join(wanted)}")
        return list(reader)


def _value(text: str, task: Task, classes: Sequence[str]) -> float | None:
    if task == "classification":
        return float(classes.index(text)) if text in classes else None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def _unread(target: str, task: Task) -> str:
    return f"{target} is none of the classes" if task == "classification" else f"{target} is no number"


def _one_kind(files: Mapping[Path, int]) -> tuple[int, str, set[Path]]:
    """Return the width of the features, what made them, and which files are empty; `files` says which row names a file."""
    dims: dict[int, int] = {}
    makers: dict[str, int] = {}
    empty = set()
    for file, line in files.items():
        number, width, maker = _opened(read_shape, file, f"row {line}")
        if not number:
            empty.add(file)
            continue
        dims[width] = dims.get(width, 0) + 1
        makers[maker] = makers.get(maker, 0) + 1
    for what, counts in (("widths", dims), ("encoders", makers)):
        if len(counts) > 1:
            told = ", ".join(f"{name or 'not stated'} ({n} files)" for name, n in sorted(counts.items(), key=str))
            raise RequestError(
                f"the feature files are of several {what}: {told}; one head takes one kind; write them again with one"
            )
    dim = next(iter(dims), 0)
    if not dim:
        raise RequestError(f"none of the {len(files)} feature files holds a feature; encode the tiles of the slides first")
    return dim, next(iter(makers)), empty


def _refuse_two_sides(groups: Sequence[str], splits: Sequence[str], table: Path) -> None:
    sides: dict[str, set[str]] = {}
    for group, split in zip(groups, splits, strict=True):
        sides.setdefault(group, set()).add(split)
    crossing = sum(len(found) > 1 for found in sides.values())
    if crossing:
        raise RequestError(
            f"{table.name}: slides of {crossing} patients are in several splits; a patient is trained on or scored; correct the splits"
        )
