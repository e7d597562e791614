"""Patients and images that weights have seen in pretraining are not scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from medssl import data_sources
from medssl.recipe import (
    Recipe,
)
from medssl.training.run_folder import RunFolder
from medssl.weights import find_part

Progress = Callable[[int, int], None]
Note = Callable[[str], None]
StepProgress = Callable[[int, int, Mapping[str, float]], None]


def refuse_pretraining_patients(weights: Path | str, shelf: data_sources.Shelf) -> str:
    """Refuse an evaluation on patients that the weights have seen, as far as the run folder is at hand.

    Returns:
        What was checked, for the result.

    Raises:
        LeakageError: A patient is on both sides.
    """
    from medssl.sampling.items import read as read_items

    run = run_of(weights)
    table = run / "items.parquet"
    if not table.is_file():
        return "not checked: the weights lie outside their run folder, so their patients are not known"
    keys = set(RunFolder(run).read().get("id_keys", []))
    if keys != {shelf.archive.key_fingerprint}:
        return "not checked: pretraining and evaluation indexes were made with different id keys, so patients cannot be compared"
    seen = {item.patient_id for item in read_items(table)}
    both = seen & {row.patient_id for row in shelf.rows}
    if both:
        from medssl.errors import LeakageError

        raise LeakageError(
            f"{len(both)} of {len(shelf.rows)} selected series belong to patients that the weights were pretrained on; "
            "select others (for instance source.where=\"split = 'val'\"): numbers on seen patients flatter the weights"
        )
    return "no patient of this evaluation was pretrained on"


def refuse_pretraining_images(weights: Path | str, cohort: Any, *, every: bool = False) -> None:
    """Refuse a test set whose image files the weights were pretrained on, as far as run folder and archive are at hand.

    With `every` all labelled cases are the test set, as they are where folds are dealt.

    Files are compared by content, so that renamed copies are found.

    Raises:
        LeakageError: A test image was pretrained on.
    """
    run = run_of(weights)
    if not (run / "recipe.yaml").is_file():
        return
    from medssl.archive.table import Archive
    from medssl.errors import LeakageError
    from medssl.sampling.items import read as read_items

    recipe = Recipe.load(run / "recipe.yaml")
    seen: set[str] = set()
    items = read_items(run / "items.parquet")
    for name, section in recipe.sources.items():
        if not Path(section.index).is_dir():
            continue
        archive = Archive.open(Path(section.index))
        for item in items:
            if item.source == name:
                seen.update(archive.digests(item.series_id))
    test = [case for case in cohort.cases if case.split == "test" or (every and case.label is not None)]
    both = [case for case in test if seen & set(file_digests(case.image_files))]
    if both:
        raise LeakageError(
            f"{len(both)} of {len(test)} test images were used for pretraining (same file content); pretrain on an index whose "
            "split leaves them out (`medssl index --splits`), or choose other test cases"
        )


def run_of(weights: Path | str) -> Path:
    """Return the run folder that weights lie in (which may not exist, for an exported file)."""
    file = find_part(weights)
    return file.parent.parent.parent


def file_digests(files: Iterable[Path]) -> list[str]:
    """Return the content digests of files, as the archive computes them."""
    from medssl.archive.scanning.scan import file_digest

    return [file_digest(path) for path in files]
