"""Aggregates of an archive that are made to leave the house.

What is counted are patients. Each table puts every patient into exactly one cell: the value that all their series share, or
`several`. So a table is a partition of the same patients, its cells add up to the one total, and hiding small cells together
with their complement (`suppress_small`) leaves nothing to subtract: neither inside a table nor against the total. Tables must
not nest either: who knows that an X-ray has one slice could subtract the X-rays from the images of one slice. Spacing and
size follow from the modality in that way, so they are given within each modality that is shown, whose count is their total, and
never over all. Series are given only for cells whose patients are shown. Where no cell of a table may be shown the table is left out.

Patients without a usable identity are left out altogether: ten studies of nobody in particular may be one person.

Two releases of a growing archive can be subtracted from each other by whoever holds both. That is for the owner to
weigh; nothing here can prevent it.
"""

from __future__ import annotations

import csv
import io
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medssl.archive._parquet import TEMPORARY, write_json
from medssl.archive.operations.facts import BINS, TABLES, bin_names
from medssl.archive.operations.suppress import suppress_small
from medssl.archive.table import Archive, SeriesRow
from medssl.errors import RequestError, StoreError

FORMAT = 1
SMALLEST_K = 5
FILES = ("release.json", "release.csv")


@dataclass
class Release:
    """What a release holds.

    Args:
        k: Smallest number of patients shown.
        n_patients: Patients counted, all with a usable identity.
        n_series: Their usable series.
        tables: Table -> value -> {"patients": n, "series": n}; None twice where hidden.
        left_out: Tables in which nothing could be shown.
        n_left_out_series: Usable series without a usable patient identity, for the owner; not part of what is written.
    """

    k: int
    n_patients: int
    n_series: int
    tables: dict[str, dict[str, dict[str, int | None]]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    n_left_out_series: int = 0

    def content(self) -> dict[str, Any]:
        """Return what is written."""
        return {
            "format": FORMAT,
            "k": self.k,
            "counted": "patients; each is in one cell of every table, `several` where their series differ; null is hidden",
            "n_patients": self.n_patients,
            "n_series": self.n_series,
            "tables": self.tables,
            "left_out": self.left_out,
        }


def release(archive: Archive, out: Path, *, k: int = 10, where: str | None = None) -> Release:
    """Write the aggregates of an index into a folder.

    Args:
        archive: The index.
        out: Folder; made when absent. It gets `release.json` and `release.csv` and may hold nothing else.
        k: Smallest number of patients that is shown, 5 or more.
        where: SQL condition on the rows to count.

    Raises:
        RequestError: `k` is too small, fewer than `k` patients are there, or the folder holds other things. Nothing was written.
        StoreError: Writing failed.
    """
    if k < SMALLEST_K:
        raise RequestError(f"k: {k}; {SMALLEST_K} or more patients per cell are needed, 10 is customary")
    if out.is_file() or (out.is_dir() and {path.name for path in out.iterdir()} - set(FILES)):
        raise RequestError(f"{out} holds other things; name a new or an empty folder, so that nothing else leaves with the release")
    found = aggregate(archive.select(where), k)
    if found.n_patients < k:
        raise RequestError(
            f"the selection has fewer than {k} patients with a usable identity; nothing can be released. Patients of files that name none "
            "come from a splits table with a column patient (medssl index --splits)"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / FILES[0], found.content())
        _write_text(out / FILES[1], as_csv(found))
    except StoreError:
        raise
    except OSError as err:
        raise StoreError(f"{out} cannot be written ({err.strerror}); name a folder that you may write to") from err
    return found


def aggregate(rows: Sequence[SeriesRow], k: int) -> Release:
    """Count the patients of some rows in every table and hide what is small.

    Args:
        rows: Usable rows.
        k: Smallest number of patients shown.
    """
    known = [row for row in rows if "patient_unknown" not in row.quality_flags]
    by_patient: dict[str, list[SeriesRow]] = defaultdict(list)
    for row in known:
        by_patient[row.patient_id].append(row)
    found = Release(k, len(by_patient), len(known), n_left_out_series=len(rows) - len(known))
    for name in (name for name in TABLES if name not in BINS):
        _add_table(found, name, name, by_patient)
    for modality, counts in list(found.tables.get("modality", {}).items()):
        if counts["patients"] is not None and modality != "several":
            inside = {who: group for who, group in by_patient.items() if {row.modality for row in group} == {modality}}
            for name in BINS:
                _add_table(found, f"{name} ({modality})", name, inside)
    return found


def _add_table(found: Release, title: str, name: str, by_patient: Mapping[str, Sequence[SeriesRow]]) -> None:
    """Count patients in one table, each in one cell, and hide what is small."""
    patients: Counter[str] = Counter()
    series: Counter[str] = Counter()
    for group in by_patient.values():
        values = {TABLES[name](row) for row in group}
        cell = values.pop() if len(values) == 1 else "several"
        patients[cell] += 1
        series[cell] += len(group)
    shown = suppress_small(patients, found.k)
    if all(count is None for count in shown.values()):
        found.left_out.append(title)
        return
    found.tables[title] = {
        cell: {"patients": shown[cell], "series": None if shown[cell] is None else series[cell]} for cell in _order(name, patients)
    }


def _order(name: str, cells: Counter[str]) -> list[str]:
    """Return cells in an order that says nothing about hidden counts: that of the bins, else by name."""
    last = ("several", "unknown")
    if name in BINS:
        return [cell for cell in [*bin_names(BINS[name])[:-1], *last] if cell in cells]
    return [*sorted(set(cells) - set(last)), *(cell for cell in last if cell in cells)]


def as_csv(found: Release) -> str:
    """Return the tables as CSV with the columns table, value, patients, series; hidden counts are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("table", "value", "patients", "series"))
    writer.writerow(("all", "", found.n_patients, found.n_series))
    for name, cells in found.tables.items():
        for cell, counts in cells.items():
            writer.writerow((name, cell, *("" if counts[key] is None else counts[key] for key in ("patients", "series"))))
    return text.getvalue()


def _write_text(path: Path, text: str) -> None:
    aside = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
