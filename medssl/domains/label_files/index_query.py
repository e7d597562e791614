"""Select series of an index that have labels: maps named by series id, values that `medssl labels attach` brought."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medssl.archive.operations.labels import read_labels
from medssl.archive.table import Archive, group_facts
from medssl.errors import RequestError

SUFFIXES = (".seg.nrrd", ".nii.gz", ".nii", ".nrrd", ".mha", ".mhd", ".dcm", "")


@dataclass(frozen=True)
class LabelledSeries:
    """A series with a label map, attached values, or both.

    Args:
        series_id: Its id.
        patient_id: Its patient.
        split: train, val, test or unknown.
        files: Its files.
        part: What of the files it is, see `Archive.part`.
        label: Label map; None where there is none.
        values: Attached values by column; empty where nothing is attached.
        facts: What the index says of person and scanner, see `archive.table.group_facts`.
        patient_known: Whether the index knows the patient, who otherwise may be that of other series too.
    """

    series_id: str
    patient_id: str
    split: str
    files: tuple[Path, ...]
    part: Mapping[str, Any] | None = None
    label: Path | None = None
    values: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    patient_known: bool = True


@dataclass(frozen=True)
class Labelled:
    """What a query found: labelled series in the order of their ids, and how many selected ones have no label."""

    series: tuple[LabelledSeries, ...]
    left_out: int


def select_labelled(index: Path, where: str | None, *, maps: Path | None = None, attached: Path | None = None) -> Labelled:
    """Select the labelled series of an index.

    Args:
        index: Archive folder.
        where: SQL condition, see `Archive.select`; None selects all usable series.
        maps: Folder of label maps named `<series_id>` and a suffix (.nii.gz, .seg.nrrd, .dcm ...), or folders of that name.
        attached: CSV that `medssl labels attach` wrote: `series_id` and label columns.

    Raises:
        RequestError: The condition, the folder or the table is wrong.
    """
    if maps is not None and not maps.is_dir():
        raise RequestError(f"maps {maps}: no such folder; name the folder that holds <series_id>.nii.gz and so on")
    values = {} if attached is None else _attached(attached)
    archive = Archive.open(index)
    found, left_out = [], 0
    for row in archive.select(where):
        label = None if maps is None else _map_of(maps, row.series_id)
        if label is None and row.series_id not in values:
            left_out += 1
            continue
        found.append(
            LabelledSeries(
                series_id=row.series_id,
                patient_id=row.patient_id,
                split=row.split,
                files=tuple(archive.files(row.series_id)),
                part=archive.part(row.series_id),
                label=label,
                values=values.get(row.series_id, {}),
                facts=group_facts(row),
                patient_known="patient_unknown" not in row.quality_flags,
            )
        )
    return Labelled(tuple(found), left_out)


def _map_of(folder: Path, series_id: str) -> Path | None:
    return next((path for suffix in SUFFIXES if (path := folder / f"{series_id}{suffix}").exists()), None)


def _attached(table: Path) -> dict[str, dict[str, str]]:
    header, lines = read_labels(table)
    if "series_id" not in header:
        raise RequestError(f"{table}: no column series_id; give the CSV that `medssl labels attach` wrote")
    return {line["series_id"]: {name: value for name, value in line.items() if name != "series_id"} for line in lines}
