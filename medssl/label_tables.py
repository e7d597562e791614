"""Labels of series from a CSV: is the table fit, and which line means which series."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medssl.data_sources import Shelf
from medssl.errors import RequestError, header_words
from medssl.evaluation.file_names import is_fixed, join_names, plain_name

SERIES_COLUMN = "series_id"
"""Column of a table that `medssl labels attach` wrote: it names series, not files."""


def check_table(table: str, file_column: str, *columns: str) -> None:
    """Refuse a CSV of labels that is not there or lacks a column: asked before the store is filled, which may take hours.

    Raises:
        RequestError: No such file, or columns are missing.
    """
    path, asked = Path(table), (file_column, *columns)
    if not path.is_file():
        raise RequestError(f"no such table: {table}; give a CSV with the columns {', '.join(dict.fromkeys(asked))}")
    with open(path, newline="") as stream:
        found = csv.DictReader(stream).fieldnames or []
    if missing := [column for column in dict.fromkeys(asked) if column not in found]:
        raise RequestError(f"{path.name} has no column {', '.join(missing)}; it has {header_words(found, asked)}")


def read_targets(table: str, file_column: str, target: str, shelf: Shelf) -> dict[str, str]:
    """Join a CSV of labels to series by the path or name of the image file, or of the DICOM folder; see `file_names.join_names`.

    A column called `series_id` that has ids of the index in it, as `medssl labels attach` writes it, is joined by these alone.

    Args:
        table: CSV with a header.
        file_column: Column with the name, or `series_id`.
        target: Column with the label.
        shelf: The rows to find.

    Returns:
        series_id -> label text; series without a label are left out.

    Raises:
        RequestError: A column is missing, nothing matches, or a name is that of several files, or of lines with several labels.
    """
    check_table(table, file_column, target)
    path = Path(table)
    with open(path, newline="") as stream:
        lines = [(row[file_column], row[target]) for row in csv.DictReader(stream)]
    lines = [(name, label) for name, label in lines if name and label not in ("", None)]
    by_id = file_column == SERIES_COLUMN and not shelf.archive.first_paths().keys().isdisjoint(name for name, _ in lines)
    labels: dict[str, set[str]] = {}
    for given, label in lines:
        labels.setdefault(given if by_id else plain_name(given, path.parent), set()).add(label)
    if by_id:
        names = {row.series_id: row.series_id for row in shelf.rows if row.series_id in labels}
    else:
        fixed = {plain_name(given, path.parent) for given, _ in lines if is_fixed(given)}
        names = _names_of_series(labels, fixed, path, shelf)
    if not names and file_column == SERIES_COLUMN:
        raise RequestError(
            f"none of the {len(shelf.rows)} selected series is named in column {file_column} of {path.name}; ids are those of one index and "
            "its key: attach the labels to this one (`medssl labels attach`), or let source.where select series that have some"
        )
    if not names:
        raise RequestError(
            f"none of the {len(shelf.rows)} selected series is named in column {file_column} of {path.name}; names are compared with the "
            "image file's path, or the DICOM folder's, then with its name; an absolute path must be where the file lies"
        )
    torn = sum(len(labels[name]) > 1 for name in set(names.values()))
    if torn:
        raise RequestError(
            f"{torn} of the {len(set(names.values()))} names in column {file_column} of {path.name} that selected series have stand in lines "
            f"with several values of {target}; write paths that end as those of the image files do, or keep one line per image"
        )
    return {series: next(iter(labels[name])) for series, name in names.items()}


def _names_of_series(listed: Mapping[str, Any], fixed: set[str], table: Path, shelf: Shelf) -> dict[str, str]:
    """Return series_id -> the listed name of its first file, else of its folder, for the rows of a shelf that a table lists.

    Raises:
        RequestError: A name is that of several files or folders.
    """
    first, wanted = shelf.archive.first_paths(), {row.series_id for row in shelf.rows}
    asked: dict[Path, bool] = {}
    for series, file in first.items():  # one folder may hold several series: it is one place
        for place in (file, file.parent):
            asked[place] = asked.get(place, False) or series in wanted
    try:
        name_of = dict(zip(asked, join_names(listed, list(asked), table.parent, fixed=fixed, chosen=list(asked.values()))))
    except RequestError as err:
        raise RequestError(f"{table.name}: {err}") from None
    found: dict[str, str] = {}
    places: dict[str, set[Path]] = {}
    for series in sorted(wanted & first.keys()):
        file = first[series]
        place = file if name_of[file] is not None else file.parent
        name = name_of[place]
        if name is not None:
            found[series] = name
            places.setdefault(name, set()).add(place)
    double = sum(len(several) > 1 for several in places.values())
    if double:
        raise RequestError(
            f"{double} of the {len(places)} names in {table.name} that selected series have are those of several files or folders, and nothing "
            "tells which one is meant; write paths that end as those of the image files do, or relative to the table"
        )
    return found
