"""Patients and images that weights have seen in pretraining are not scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from medssl import data_sources
from medssl.archive.table import Archive
from medssl.errors import LeakageError
from medssl.recipe import Recipe
from medssl.sampling.items import read as read_items
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
        raise LeakageError(
            f"{len(both)} of {len(shelf.rows)} selected series belong to patients that the weights were pretrained on; "
            "select others (for instance source.where=\"split = 'val'\"): numbers on seen patients flatter the weights"
        )
    return "no patient of this evaluation was pretrained on"


def refuse_pretraining_images(weights: Path | str, cohort: Any, *, every: bool = False) -> str:
    """Refuse a test set whose images or patients the weights were pretrained on, as far as run folder and archive are at hand.

    Files are compared by content, so that renamed copies are found. An image that is in the archive of the pretraining is of a patient there:
    it is refused if any series of that patient was used.

    Args:
        weights: Run folder, or a file in one.
        cohort: Labelled cohort, see `evaluation.cohort.Cohort`.
        every: All labelled cases are the test set, as they are where folds are dealt.

    Returns:
        What was checked, for the result.

    Raises:
        LeakageError: A test image, or another image of its patient, was pretrained on.
    """
    run = run_of(weights)
    if not (run / "recipe.yaml").is_file() or not (run / "items.parquet").is_file():
        return "not checked: the weights lie outside their run folder, so their images are not known"
    images, patients, away = _seen_files(run)
    test = [case for case in cohort.cases if case.split == "test" or (every and case.label is not None)]
    digests = [set(file_digests(case.image_files)) for case in test] if images else []
    same = sum(bool(found & images) for found in digests)
    if same:
        raise LeakageError(
            f"{same} of {len(test)} test images were used for pretraining (same file content); pretrain on an index whose "
            "split leaves them out (`medssl index --splits`), or choose other test cases"
        )
    both = sum(bool(found & patients) for found in digests)
    if both:
        raise LeakageError(
            f"{both} of {len(test)} test images are of patients that the weights were pretrained on, by other images of theirs; pretrain on an "
            "index whose split leaves these patients out (`medssl index --splits`), or choose other test cases"
        )
    if away:
        return f"not checked for {away} of the sources of the pretraining, whose index is not at hand; no test image was found in the others"
    return "no test image was pretrained on, nor another image of its patient as far as the index of the pretraining has both"


def _seen_files(run: Path) -> tuple[set[str], set[str], int]:
    """Return digests of the files that a run was pretrained on, of all files of its patients, and how many indexes are not at hand."""
    images: set[str] = set()
    patients: set[str] = set()
    items, away = read_items(run / "items.parquet"), 0
    for name, section in Recipe.load(run / "recipe.yaml").sources.items():
        if not Path(section.index).is_dir():
            away += 1
            continue
        archive = Archive.open(Path(section.index))
        used = {item.series_id for item in items if item.source == name}
        persons = {item.patient_id for item in items if item.source == name}
        for row in archive.select(None, rejected=True):  # what was withdrawn since has no files to compare
            if row.patient_id in persons:
                found = archive.digests(row.series_id)
                patients.update(found)
                if row.series_id in used:
                    images.update(found)
    return images, patients, away


def run_of(weights: Path | str) -> Path:
    """Return the run folder that weights lie in (which may not exist, for an exported file)."""
    file = find_part(weights)
    return file.parent.parent.parent


def file_digests(files: Iterable[Path]) -> list[str]:
    """Return the content digests of files, as the archive computes them."""
    from medssl.archive.scanning.scan import file_digest

    return [file_digest(path) for path in files]
