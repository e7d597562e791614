"""Counting for cards: in an index (small cells hidden) and in a folder of files.

Two digests let `medssl card check` say whether a card and data belong together:

- `files`: SHA-256 over the sorted SHA-256 digests of all files, one per line in hex. It does not depend on names, and a shell computes
  it too: `find FOLDER -type f -exec sha256sum {} + | cut -c1-64 | sort | sha256sum`.
- `index`: the same over the digests that the index keeps in its private part for the files of its usable series. It does not depend on
  the id key (series ids do: two indexes of the same files have different ones), so a card can be checked against any index of the set.

A digest of a whole set tells nothing about one image to anybody who does not hold every other file of the set. It is left out when the
set has fewer than k patients.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from medssl.archive.operations.suppress import count_people, suppress_partitions
from medssl.archive.table import Archive, SeriesRow
from medssl.cards.schema import HIDDEN, WITHHELD, Count, FileCounts, IndexCounts, Table
from medssl.errors import MedsslError, RequestError

COLUMNS: dict[str, Callable[[SeriesRow], str]] = {
    "modality": lambda row: row.modality,
    "domain": lambda row: row.domain,
    "kind": lambda row: row.kind,
    "role": lambda row: row.role,
    "vendor": lambda row: row.vendor,
    "body_region": lambda row: "+".join(sorted(row.body_region)) or "unknown",
    "sex": lambda row: row.sex,
    "age_band": lambda row: row.age_band,
    "split": lambda row: row.split,
}
"""Partitions of the series: each series has exactly one value of each. `site` is not among them: users put real names there."""

MEASURES: dict[str, Callable[[SeriesRow], float | None]] = {
    "spacing_1_mm": lambda row: _at(row.spacing_mm, 0),
    "spacing_2_mm": lambda row: _at(row.spacing_mm, 1),
    "spacing_3_mm": lambda row: _at(row.spacing_mm, 2),
    "size_1": lambda row: _at(row.shape, 0),
    "size_2": lambda row: _at(row.shape, 1),
    "size_3": lambda row: _at(row.shape, 2),
    "mpp": lambda row: row.mpp,
    "frame_time_ms": lambda row: row.frame_time_ms,
}
"""Numbers per series, in the order of the array axes."""

SUFFIXES = (
    ".ome.tiff", ".ome.tif", ".nii.gz", ".nii", ".dcm", ".nrrd", ".nhdr", ".mha", ".mhd", ".raw", ".png", ".jpg", ".jpeg", ".tif",
    ".tiff", ".bmp", ".svs", ".ndpi", ".mrxs", ".avi", ".mp4", ".mov", ".mpeg", ".mpg", ".gif", ".npz", ".npy", ".csv", ".tsv", ".json",
    ".xml", ".txt", ".md", ".zip", ".tar", ".gz",
)  # fmt: skip
"""A closed list: the end of a file name may be part of an identifier (`1.2.840.1`)."""


def count_index(archive: Archive, k: int, where: str | None = None) -> tuple[IndexCounts, str | None]:
    """Count the usable series of an index and return the counts and the digest.

    A cell is small when it is about fewer than `k` patients, however many series they have. Series of unknown patients add nobody to a cell
    that knows one, and one person where it knows none: they may all be of one.

    Args:
        archive: The index.
        k: Smallest number of patients that a count may be about.
        where: SQL condition on the index; None counts every usable series.

    Raises:
        RequestError: There are no such series, or the condition is no SQL on the index.
    """
    rows = archive.select(where)
    if not rows:
        such = "usable series" if where is None else f"usable series where {where}"
        look = f"medssl report {archive.path}" if where is None else f"medssl archive ls {archive.path}"
        raise RequestError(f"{archive.path} has no {such}, so there is nothing to count; see `{look}`")
    patients = [_patient(row) for row in rows]
    columns = {name: [value(row) for row in rows] for name, value in COLUMNS.items()}
    shown = suppress_partitions(columns, patients, k)
    enough = count_people(patients) >= k
    series_by = {name: _table(Counter(values), shown[name]) for name, values in columns.items()}
    people = {name: _people(values, patients) for name, values in columns.items()}
    counts = IndexCounts(
        k=k,
        patients=_total(count_people(patients), enough),
        studies=_total(len({row.study_id for row in rows}), enough),
        series=_total(len(rows), enough),
        files=_total(sum(row.n_files for row in rows), enough),
        series_by=series_by,
        patients_by={name: _table(people[name], shown[name]) for name in columns},
        quartiles=_quartiles(rows, shown["domain"], k),
    )
    digest = digest_of(digest for row in rows for digest in archive.digests(row.series_id)) if enough else None
    return counts, digest


def count_files(folder: Path | str) -> tuple[FileCounts, str]:
    """Count the files below a folder and return the counts and the digest; links are not followed.

    Raises:
        RequestError: No such folder, or no file in it.
        MedsslError: Some files cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RequestError(f"no such folder: {folder}; give the folder that holds the files of the set")
    paths = [
        Path(parent) / name
        for parent, _, names in os.walk(folder)
        for name in names
        if not (Path(parent) / name).is_symlink() and (Path(parent) / name).is_file()
    ]
    if not paths:
        raise RequestError(f"{folder} holds no files; give the folder that holds the files of the set")
    size, unread = 0, 0
    digests = []
    for path in paths:
        try:
            digests.append(_sha256(path))
            size += path.stat().st_size
        except OSError:
            unread += 1
    if unread:
        raise MedsslError(
            f"{unread} of {len(paths)} files below {folder} cannot be read; correct their permissions and run it again"
        )
    suffixes = Counter(_suffix(path.name) for path in paths)
    return FileCounts(count=len(paths), bytes=size, by_suffix=dict(sorted(suffixes.items()))), digest_of(digests)


def digest_of(digests: Iterable[str]) -> str:
    """Return the SHA-256 over sorted digests, one per line."""
    whole = hashlib.sha256()
    for digest in sorted(digests):
        whole.update(f"{digest}\n".encode())
    return whole.hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _suffix(name: str) -> str:
    lower = name.lower()
    found = next((suffix for suffix in SUFFIXES if lower.endswith(suffix)), None)
    return found or ("other" if "." in name else "none")


def _patient(row: SeriesRow) -> str | None:
    return None if "patient_unknown" in row.quality_flags else row.patient_id


def _total(n: int, enough: bool) -> Count:
    return n if enough else HIDDEN


def _table(counts: Mapping[str, int], shown: set[str]) -> Table:
    if not shown:
        return WITHHELD
    return {value: counts[value] if value in shown else HIDDEN for value in sorted(counts)}


def _people(values: Sequence[str], patients: Sequence[str | None]) -> dict[str, int]:
    groups: dict[str, set[str | None]] = defaultdict(set)
    for value, patient in zip(values, patients):
        groups[value].add(patient)
    return {value: count_people(group) for value, group in groups.items()}


def _at(values: Sequence[float] | None, i: int) -> float | None:
    return float(values[i]) if values is not None and i < len(values) else None


def _quartiles(rows: Sequence[SeriesRow], domains: set[str], k: int) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Return quartiles of each measure over the series of each domain that is shown, where k patients have a value."""
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    for domain in sorted(domains):
        for name, measure in MEASURES.items():
            pairs = [(value, _patient(row)) for row in rows if row.domain == domain and (value := measure(row)) is not None]
            if count_people(patient for _, patient in pairs) >= k:
                low, middle, high = (float(f"{q:.3g}") for q in np.percentile([value for value, _ in pairs], (25, 50, 75)))
                found.setdefault(domain, {})[name] = (low, middle, high)
    return found
